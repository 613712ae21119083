"""A causal language model with KV cache as an exported base."""

from export.causal.base import export_causal

__all__ = ["export_causal"]
