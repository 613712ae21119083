"""ONNX graphs of a frozen base: traced with an adapter as input, quantized, split into headers and weights.
``classifier``, ``dequantize``, ``graph``, ``peftmodel`` and ``tasks`` are not imported here, because they import
torch."""

from export.onnx.exported import ExportedBase, Profile

__all__ = ["ExportedBase", "Profile"]
