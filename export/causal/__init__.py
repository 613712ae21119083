"""Causal language models with a KV cache, exported as a base. Imports torch and transformers."""

from export.causal.base import export_causal

__all__ = ["export_causal"]
