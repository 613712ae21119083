"""Ours: a verified bundle in onnxruntime-genai, as ``edgeadapt device chat`` runs it.

The client hands out text; here single tokens are timed and all scores of a text are read, so this goes one layer
deeper, to the very generator that the client makes for an answer.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adapters.layout import Floats
from client.inference.engine import GenerationEngine
from client.inference.library import Composition, Library
from client.inference.text import SamplingParams


class OnDevice:
    """A bundle's language model, its adapters called by name."""

    def __init__(self, bundle: Path, *, threads: int, context: int, adapters: Sequence[str] = ()) -> None:
        """Verify and load. Raises as ``client.inference.generate.Generator.open``."""
        self._library = Library.open(bundle, None, "text-generation")
        self._engine = GenerationEngine(self._library.base, threads)
        self._library.base.check()
        self._options = SamplingParams(max_tokens=context + 1)  # the last is picked, and never read
        self._adapters = adapters
        self._loaded: dict[int, str] = {}  # place → the engine's name for it
        self.use(None)

    def use(self, adapter: int | None) -> None:
        """As ``GenerationEngine.use``: verified when it is first used, and in use when this returns."""
        if adapter is not None and adapter not in self._loaded:
            self._loaded[adapter] = self._load(self._adapters[adapter])
        self._inner = self._engine.inner(self._options, None if adapter is None else self._loaded[adapter])

    def prefill(self, tokens: Sequence[int]) -> None:
        """As ``GenerationEngine.prefill``."""
        self._read(tokens)
        self._inner.generate_next_token()  # only picks it: what was read has given the scores

    def step(self) -> int:
        """As ``GenerationEngine.step``."""
        read = int(self._inner.get_next_tokens()[0])
        self._inner.generate_next_token()
        return read

    def logits(self, tokens: Sequence[int]) -> Floats:
        """As ``GenerationEngine.logits``."""
        self._read(tokens)
        found: Floats = np.asarray(self._inner.get_output("logits"), np.float32).reshape(len(tokens), -1)
        return found

    def _load(self, name: str) -> str:
        verified = self._library.load(Composition.of(name))
        self._engine.load(verified)
        return verified.name

    def _read(self, tokens: Sequence[int]) -> None:
        if self._inner.token_count():
            self._inner.rewind_to(0)
        self._inner.append_tokens(np.array(tokens, np.int32))
