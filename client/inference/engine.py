"""Runs a language model with onnxruntime-genai: its adapters, and one generator with its KV cache.

onnxruntime-genai loads adapters from files only: a verified adapter is written, as float32, to a private temporary
file, which is removed after loading. The KV cache is kept after an answer: of a prompt that begins with the same
tokens, as the next message of a conversation does, only the rest is read.

A prompt is read in pieces, because the graph returns the logits of every token that it reads at once: 200 kB a token
with SmolLM2's vocabulary.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort

from aggregation.errors import ConfigError, DataError, EdgeAdaptError
from client.inference.guide import Guide, GuidedAnswer, GuideFollower, required
from client.inference.library import Adapter
from client.inference.text import Detokenizer, SamplingParams, TextDecoder, first_line, special_tokens
from edgeadapt.formats.bundle import GENERATION, TOKENIZER, VerifiedBase

GROWTH = 256  # tokens; the KV cache grows in steps, so that a few more messages fit without a new one
PIECE = 64  # tokens read at once; with SmolLM2, longer pieces are not faster


@dataclass(slots=True)
class _Live:
    inner: Any
    params: SamplingParams
    adapter: str | None  # by name
    capacity: int  # tokens
    tokens: list[int]
    guided: GuidedAnswer | None = None


class GenerationEngine:
    """A verified base, loaded. The caller verifies adapters, and reads one answer at a time."""

    def __init__(self, base: VerifiedBase, threads: int, options: Mapping[str, str] | None = None) -> None:
        """Load the model. ``options``: further session options of ONNX Runtime, such as ``enable_profiling``.

        Raises ConfigError: onnxruntime-genai is not installed; RuntimeError, ValueError, KeyError, TypeError: the base
        cannot be loaded.
        """
        self._og = genai()
        config = self._og.Config(str(base.folder))
        session = {"intra_op_num_threads": threads, **(options or {})}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = self._og.Model(config)
        self._tokenizer = self._og.Tokenizer(self._model)
        self._adapters = self._og.Adapters(self._model)
        self._live: _Live | None = None
        stated = json.loads(base.files[GENERATION])["model"]
        self.context = int(stated["context_length"])
        self.vocabulary = int(stated["vocab_size"])
        self.ends = frozenset(map(int, self._tokenizer.eos_token_ids))
        self._tokenizer_file = base.files[TOKENIZER]
        self.special_tokens = special_tokens(self._tokenizer_file)
        self._detokenizer = Detokenizer(self._tokenizer_file)
        self._follower: GuideFollower | None = None

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text)]

    def decoder(self) -> TextDecoder:
        return TextDecoder(self._detokenizer)

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> str:
        """Format a conversation by the model's chat template, up to where the answer begins. Raises ConfigError: there
        is no template, or it does not accept these messages."""
        try:
            text = self._tokenizer.apply_chat_template(messages=json.dumps(messages), add_generation_prompt=True)
        except RuntimeError as error:
            reason = f"this model cannot chat ({first_line(error)})"
            raise ConfigError(f"{reason}; use `edgeadapt device infer`", about="chat_template") from error
        return str(text)

    def load(self, adapter: Adapter) -> None:
        """Load an adapter's tensors under its name. Raises DataError: onnxruntime-genai refuses the tensors;
        EdgeAdaptError: the temporary folder has no room for the file."""
        values = {name: ort.OrtValue.ortvalue_from_numpy(adapter.inputs[name]) for name in sorted(adapter.inputs)}
        container = ort.AdapterFormat()
        container.set_adapter_version(1)
        container.set_model_version(1)
        container.set_parameters(values)
        with TemporaryDirectory(prefix="edgeadapt-") as folder:  # mode 0700
            path = Path(folder) / "adapter"
            path.touch(mode=0o600)
            try:
                container.export_adapter(str(path))
            except RuntimeError as error:
                reason = f"{folder} lacks {adapter.nbytes} bytes to load adapter {adapter.name!r}"
                raise EdgeAdaptError(f"{reason}; free some, or set TMPDIR to another folder", about="TMPDIR") from error
            try:
                self._adapters.load(str(path), adapter.name)
            except RuntimeError as error:
                reason = f"adapter {adapter.name!r} cannot be loaded: {first_line(error)}; export it again"
                raise DataError(reason, about="adapter", value=adapter.name) from error
            except KeyboardInterrupt:  # raised after the library has loaded it; free the name for the next attempt
                self._adapters.unload(adapter.name)
                raise

    def unload(self, name: str) -> None:
        self.forget()  # the generator may use the adapter
        self._adapters.unload(name)

    def forget(self) -> None:
        """Release the generator with its KV cache, which may be inconsistent after an error."""
        self._live = None

    def read(self, prompt: list[int], params: SamplingParams, adapter: str | None) -> int:
        """Read a prompt of at least one token, and fewer than ``context``, with a loaded adapter or the bare base.

        Returns the number of tokens found in the KV cache. Raises ConfigError: as ``check``; RuntimeError: the graph
        does not run.
        """
        guided = self._guided(params.guide)
        live, cached = self._usable(params, adapter, min(self.context, len(prompt) + params.max_tokens)), 0
        live.guided = guided
        if live.adapter == adapter:
            # Without the last tokens: the last sampled one is not in the cache, and the prompt's last must be read once
            # more for its logits.
            cached = _common(live.tokens[:-1], prompt[:-1])
        if live.inner.token_count():
            live.inner.rewind_to(cached)
        self._switch(live, adapter)
        live.tokens = prompt[:]
        # With beams onnxruntime-genai 0.18 ends the process at the second piece.
        append(live.inner, prompt[cached:], PIECE if params.beams == 1 else self.context)
        return cached

    def draw(self) -> Iterator[int]:
        """Sample the tokens that follow the prompt, up to ``max_tokens`` or the end of the context. Raises DataError: a
        token has no finite probability, or the guide allows none; RuntimeError: the graph does not run."""
        live = self._live
        assert live is not None  # noqa: S101  # `read` came before
        limit = min(live.params.max_tokens, self.context - len(live.tokens))
        if live.params.beams > 1:
            yield from self._search(live, limit)
            return
        for _ in range(limit):
            _step(live)
            token = int(live.inner.get_next_tokens()[0])
            live.tokens.append(token)
            if live.guided is not None:
                live.guided.append(token)
            yield token

    def _search(self, live: _Live, limit: int) -> Iterator[int]:
        """Yield the most likely answer among the beams, once all have ended."""
        for _ in range(limit):
            if live.inner.is_done():
                break
            _step(live)
        written = live.inner.get_sequence(0)[len(live.tokens) :]
        yield from map(int, written)
        if len(written) < limit:
            yield next(iter(self.ends))  # onnxruntime-genai leaves it out

    def check(self, params: SamplingParams) -> None:
        """Check that the guide of ``params``, if any, can be followed. Raises as ``GuideFollower.begin``."""
        self._guided(params.guide)

    def _guided(self, guide: Guide | None) -> GuidedAnswer | None:
        """Begin an answer, if there is a guide. Raises as ``check``."""
        if guide is None:
            return None
        if self._follower is None:
            self._follower = GuideFollower(self._tokenizer_file, self.vocabulary, self.ends)
        return self._follower.begin(guide)

    def inner(self, params: SamplingParams, adapter: str | None) -> Any:
        """Make onnxruntime-genai's generator, for ``params.max_tokens`` in all, to time single tokens. The next
        ``read`` reuses nothing of its KV cache."""
        live = self._usable(params, adapter, min(self.context, params.max_tokens))
        self._switch(live, adapter)
        live.tokens = []
        return live.inner

    def _switch(self, live: _Live, adapter: str | None) -> None:
        if live.adapter != adapter:
            live.inner.set_active_adapter(self._adapters, adapter)
            live.adapter = adapter

    def _usable(self, params: SamplingParams, adapter: str | None, needed: int) -> _Live:
        """Take the generator of the previous answer, if it can be used again, else a new one. A generator can switch to
        another adapter, but not back to the bare base."""
        live = self._live
        same = live is not None and live.params == params and params.reusable and live.capacity >= needed
        if live is not None and same and (adapter is not None or live.adapter is None):
            return live
        # Beams end where the KV cache does, and only then is the most likely answer known.
        capacity = needed if params.beams > 1 else min(self.context, -(-needed // GROWTH) * GROWTH)
        live = self._live = None  # frees its KV cache before the next one is allocated
        self._live = _Live(self._new(params, capacity), params, None, capacity, [])
        return self._live

    def _new(self, params: SamplingParams, capacity: int) -> Any:
        inner = self._og.GeneratorParams(self._model)
        inner.set_search_options(max_length=capacity, **params.search_options(self.vocabulary))
        return self._og.Generator(self._model, inner)


def append(inner: Any, tokens: Sequence[int], size: int = PIECE) -> None:
    for start in range(0, len(tokens), size):
        inner.append_tokens(np.array(tokens[start : start + size], dtype=np.int32))


def _step(live: _Live) -> None:
    """Write the next token, of each beam. Raises as ``GenerationEngine.draw``."""
    logits = live.inner.get_logits()
    if not np.isfinite(logits).all():
        reason = "the answer is not finite: the adapter's values are too large for this base; use another one"
        raise DataError(reason, about="logits", value=live.adapter)
    if live.guided is not None:
        logits[..., ~live.guided.allowed()] = -np.inf
        live.inner.set_logits(logits)
    live.inner.generate_next_token()


def genai() -> Any:
    og = required("onnxruntime_genai")
    og.disable_telemetry_events()
    return og


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
