"""The contender torch, without any export: transformers with its cache of keys and values, and peft around it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file

from edgeadapt.bases.base import find_base
from edgeadapt.formats.layout import Floats
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods import causal


class TorchEngine:
    """A causal language model in torch, in float32."""

    def __init__(self, base: str, *, threads: int, lora: PeftConfig, adapters: Sequence[Path] = ()) -> None:
        """Load a base, and adapters of the configuration ``lora``: safetensors files with peft's names."""
        torch.set_num_threads(threads)
        self._model = causal.build(find_base(base), lora)
        self._adapters = [load_file(path) for path in adapters]
        self._past: Any = None
        self._next = 0
        self.use(None)

    def use(self, adapter: int | None) -> None:
        self._model.base_model.disable_adapter_layers()
        if adapter is not None:
            causal.load(self._model, self._adapters[adapter])
            self._model.base_model.enable_adapter_layers()

    def prefill(self, tokens: Sequence[int]) -> None:
        self._past = None
        self._read(tokens)

    def step(self) -> int:
        read = self._next
        self._read([read])
        return read

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Floats:
        logits: Floats = self._model(input_ids=torch.tensor([tokens])).logits[0].numpy()
        return logits

    @torch.inference_mode()
    def _read(self, tokens: Sequence[int]) -> None:
        answer = self._model(
            input_ids=torch.tensor([tokens]), past_key_values=self._past, use_cache=True, logits_to_keep=1
        )
        self._past, self._next = answer.past_key_values, int(answer.logits[0, -1].argmax())
