"""The peer: llama.cpp through ``llama-cpp-python``, by its C interface, without what the Python class does around it.

It gets its best: weights repacked for the processor where it can, flash attention, a batch that takes the whole prompt,
a context no longer than needed, and the likeliest token picked without its sampler, which is slower than numpy.
"""

import ctypes
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapters.layout import Floats
from aggregation.errors import DataError

# By name, because it is an extra of its own.
llama_cpp: Any = importlib.import_module("llama_cpp")


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: object) -> None:
    pass


class LlamaCpp:
    """A model in llama.cpp, with at most one adapter switched on."""

    def __init__(self, model: Path, *, threads: int, context: int, adapters: Sequence[Path] = ()) -> None:
        """Load; no adapter is on yet.

        Args:
            model: GGUF.
            threads: For prompt and generation alike.
            context: Tokens of prompt and answer together, at most.
            adapters: GGUF adapters that ``use`` can switch to, by their place in this list.

        Raises:
            DataError: The model or an adapter cannot be loaded.
        """
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise DataError(f"llama.cpp cannot load {model}")
        self._context = llama_cpp.llama_init_from_model(self._model, _settings(threads, context))
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._adapters = [self._load(path) for path in adapters]
        self._next = 0

    def use(self, adapter: int | None) -> None:
        """As ``Engine.use``."""
        chosen: list[Any] = [] if adapter is None else [self._adapters[adapter]]
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * len(chosen))(*chosen)
        scales = (ctypes.c_float * len(chosen))(*(1.0 for _ in chosen))
        llama_cpp.llama_set_adapters_lora(self._context, handles, len(chosen), scales)

    def prefill(self, tokens: Sequence[int]) -> None:
        """As ``Engine.prefill``."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        self._read(tokens)

    def step(self) -> int:
        """As ``Engine.step``."""
        read = self._next
        self._read([read])
        return read

    def logits(self, tokens: Sequence[int]) -> Floats:
        """As ``Engine.logits``."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
            batch.logits[i] = 1
        self._run(batch)
        rows = llama_cpp.llama_get_logits(self._context)
        found: Floats = np.ctypeslib.as_array(rows, (len(tokens), self._vocabulary)).copy()
        llama_cpp.llama_batch_free(batch)
        return found

    def _read(self, tokens: Sequence[int]) -> None:
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        self._run(llama_cpp.llama_batch_get_one(ids, len(tokens)))
        row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), (self._vocabulary,))
        self._next = int(row.argmax())

    def _run(self, batch: object) -> None:
        if code := llama_cpp.llama_decode(self._context, batch):
            raise DataError(f"llama.cpp failed with code {code}")

    def _load(self, path: Path) -> object:
        if not (adapter := llama_cpp.llama_adapter_lora_init(self._model, str(path).encode())):
            raise DataError(f"llama.cpp cannot load the adapter {path}")
        return adapter


def _settings(threads: int, context: int) -> object:
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = context
    settings.n_threads = settings.n_threads_batch = threads
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    return settings
