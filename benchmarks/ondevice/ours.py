"""Our contenders: a verified bundle in onnxruntime-genai, as ``edgeadapt device chat`` runs it.

The client returns text. The benchmark times single tokens and reads all logits of a text, so it uses the generator of
onnxruntime-genai that the client uses for an answer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from client.inference.engine import GenerationEngine, append
from client.inference.library import Composition, Library
from client.inference.text import SamplingParams
from edgeadapt.formats.layout import Floats


class BundleEngine:
    """A bundle's language model, with adapters of the bundle by name."""

    def __init__(self, bundle: Path, *, threads: int, context: int, adapters: Sequence[str] = ()) -> None:
        """Verify and load, with the errors of ``client.inference.generate.Generator.open``."""
        self._library = Library.open(bundle, None, "text-generation")
        self._engine = GenerationEngine(self._library.base, threads)
        self._library.base.check()
        self._options = SamplingParams(max_tokens=context + 1)  # the last one is selected and not read
        self._adapters = adapters
        self._loaded: dict[int, str] = {}  # place → its name in the engine
        self.use(None)

    def use(self, adapter: int | None) -> None:
        """As ``ContenderEngine.use``. An adapter is verified when it is first used."""
        if adapter is not None and adapter not in self._loaded:
            verified = self._library.load(Composition.of(self._adapters[adapter]))
            self._engine.load(verified)
            self._loaded[adapter] = verified.name
        self._inner: Any = None  # of two generators, only one is in memory
        self._inner = self._engine.inner(self._options, None if adapter is None else self._loaded[adapter])

    def prefill(self, tokens: Sequence[int]) -> None:
        self._rewind()
        append(self._inner, tokens)
        self._inner.generate_next_token()  # selects only: the logits are there

    def step(self) -> int:
        read = int(self._inner.get_next_tokens()[0])
        self._inner.generate_next_token()
        return read

    def logits(self, tokens: Sequence[int]) -> Floats:
        self._rewind()
        append(self._inner, tokens, len(tokens))  # at once: only the logits of the last piece are kept
        logits: Floats = np.asarray(self._inner.get_output("logits"), np.float32).reshape(len(tokens), -1)
        return logits

    def _rewind(self) -> None:
        if self._inner.token_count():
            self._inner.rewind_to(0)
