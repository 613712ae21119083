"""The peer: llama.cpp through the C interface of ``llama-cpp-python``, without the overhead of its Python class.

It runs with its fastest settings: weights repacked for the processor where it can, flash attention, a batch for the
complete prompt, a context no longer than needed. The likeliest token is selected in numpy, which is faster than its
sampler.
"""

import ctypes
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aggregation.errors import DataError
from edgeadapt.formats.layout import Floats

# Imported by name, because it is in an extra of its own.
llama_cpp: Any = importlib.import_module("llama_cpp")


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: object) -> None:
    pass


class LlamaCppEngine:
    def __init__(self, model: Path, *, threads: int, context: int, adapters: Sequence[Path] = ()) -> None:
        """Load a model and its adapters, GGUF files. ``context`` limits the tokens of prompt and answer together."""
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise DataError(f"llama.cpp cannot load {model}", about="model")
        self._context = llama_cpp.llama_init_from_model(self._model, _settings(threads, context))
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._adapters = [self._load(path) for path in adapters]
        self._next = 0

    def use(self, adapter: int | None) -> None:
        chosen: list[Any] = [] if adapter is None else [self._adapters[adapter]]
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * len(chosen))(*chosen)
        scales = (ctypes.c_float * len(chosen))(*(1.0 for _ in chosen))
        llama_cpp.llama_set_adapters_lora(self._context, handles, len(chosen), scales)

    def prefill(self, tokens: Sequence[int]) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        self._read(tokens)

    def step(self) -> int:
        read = self._next
        self._read([read])
        return read

    def logits(self, tokens: Sequence[int]) -> Floats:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
            batch.logits[i] = 1
        self._run(batch)
        rows = llama_cpp.llama_get_logits(self._context)
        logits: Floats = np.ctypeslib.as_array(rows, (len(tokens), self._vocabulary)).copy()
        llama_cpp.llama_batch_free(batch)
        return logits

    def _read(self, tokens: Sequence[int]) -> None:
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        self._run(llama_cpp.llama_batch_get_one(ids, len(tokens)))
        row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), (self._vocabulary,))
        self._next = int(row.argmax())

    def _run(self, batch: object) -> None:
        if code := llama_cpp.llama_decode(self._context, batch):
            raise DataError(f"llama.cpp failed with code {code}", about="llama_decode")

    def _load(self, path: Path) -> object:
        if not (adapter := llama_cpp.llama_adapter_lora_init(self._model, str(path).encode())):
            raise DataError(f"llama.cpp cannot load the adapter {path}", about="adapter")
        return adapter


def _settings(threads: int, context: int) -> object:
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = context
    settings.n_threads = settings.n_threads_batch = threads
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    return settings
