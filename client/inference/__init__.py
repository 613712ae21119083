"""Inference on a device, from verified files only: classify texts or write text with a frozen base and small adapters.
It runs on the bare install: neither torch nor flwr nor transformers is imported, onnxruntime-genai only when a
``Generator`` is opened, and llguidance only for a guide."""

from client.inference.generate import ChatMessage, Conversation, Generator
from client.inference.guide import Guide, GuideKind
from client.inference.library import Adapter, Composition, Library, WeightedAdapter, compose
from client.inference.session import ClassificationSession, Prediction
from client.inference.text import Answer, Finish, SamplingParams
from client.inference.trust import Trust
from edgeadapt.formats.bundle import VerifiedAdapter, VerifiedBase, adapter_names

__all__ = [
    "Adapter",
    "Answer",
    "ChatMessage",
    "ClassificationSession",
    "Composition",
    "Conversation",
    "Finish",
    "Generator",
    "Guide",
    "GuideKind",
    "Library",
    "Prediction",
    "SamplingParams",
    "Trust",
    "VerifiedAdapter",
    "VerifiedBase",
    "WeightedAdapter",
    "adapter_names",
    "compose",
]
