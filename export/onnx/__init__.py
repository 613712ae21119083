"""ONNX graphs of a frozen base: slots for adapters, quantization, shared weights."""
