"""Runs a language model with onnxruntime-genai: its adapters, and one generator with its KV cache.

onnxruntime-genai loads adapters from files only: a verified adapter is written, as float32, to a private temporary
file, which is removed after loading. The KV cache is kept after an answer: of a prompt that begins with the same
tokens, as the next message of a conversation does, only the rest is read. If another adapter answers, a base with slots
in its last layers keeps the cache of the layers below: the last ones alone read that beginning again, from its states.
What is kept of tokens that were written is rounded as one row was: ONNX Runtime multiplies a quantized matrix with one
row in another way, so that a fresh chat, which reads them in pieces, may write another text in those profiles.

A prompt is read in pieces, because the graph returns the logits of every token that it reads at once: 200 kB a token
with SmolLM2's vocabulary.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from aggregation.errors import ConfigError, DataError, EdgeAdaptError, one_line
from client.inference.guide import Guide, GuidedAnswer, GuideFollower, required
from client.inference.library import Adapter
from client.inference.text import Detokenizer, SamplingParams, TextDecoder, special_tokens
from edgeadapt.bases.readers import normalized
from edgeadapt.bases.states import KEPT_RANGE, KEPT_STATES, STATES
from edgeadapt.formats.bundle import CHAT, GENERATION, TOKENIZER, VerifiedBase
from edgeadapt.formats.graphinputs import empty_inputs
from edgeadapt.formats.layout import Floats, Tensors

GROWTH = 256  # tokens; the KV cache grows in steps, so that a few more messages fit without a new one
PIECE = 64  # tokens read at once; with SmolLM2, longer pieces are not faster
MAX_UNUSED = 8  # adapters that a generator holds, and nobody else
BARE = "#"  # of the library: an adapter that changes nothing, because a generator cannot go back to none


@dataclass(slots=True)
class _States:
    """The states below all slots of the tokens that a generator read. Its graph reads these very arrays, because
    onnxruntime-genai does not copy an input, and takes it once."""

    values: Floats  # (1, capacity, width)
    range: NDArray[np.int64]  # the tokens that the next run does not read, but goes on from; [0, 0]: none
    count: int = 0

    @classmethod
    def of(cls, inner: Any, capacity: int, width: int) -> Self:
        states = cls(np.zeros((1, capacity, width), np.float32), np.zeros(2, np.int64))
        inner.set_model_input(KEPT_STATES, states.values)
        inner.set_model_input(KEPT_RANGE, states.range)
        return states

    def add(self, inner: Any) -> None:
        """Keep those of the tokens of the last run."""
        added = inner.get_output(STATES)[0]
        self.values[0, self.count : self.count + len(added)] = added
        self.count += len(added)


@dataclass(slots=True)
class _Live:
    inner: Any
    params: SamplingParams
    adapter: str | None  # by its name in the library
    capacity: int  # tokens
    tokens: list[int]
    states: _States | None  # None: the base does not return them
    guided: GuidedAnswer | None = None

    @property
    def kept(self) -> _States | None:
        """The states, if a later answer may use them."""
        return self.states if self.params.reusable else None


class ModelText:
    """What a verified language model reads and writes as text, and the guides of its answers."""

    def __init__(self, base: VerifiedBase, config: Any) -> None:
        """``config``: onnxruntime-genai's, of the base. Raises as ``GenerationEngine``."""
        stated = json.loads(base.files[GENERATION])["model"]
        self.context, self.vocabulary = int(stated["context_length"]), int(stated["vocab_size"])
        self._tokenizer, self._tokenizer_file = genai().Tokenizer(config), base.files[TOKENIZER]
        self.ends = frozenset(map(int, self._tokenizer.eos_token_ids))
        self.special_tokens = special_tokens(self._tokenizer_file)
        self._detokenizer = Detokenizer(self._tokenizer_file)
        self._follower: GuideFollower | None = None

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text)]

    def readings(self, text: str) -> tuple[str, ...]:
        """Return a text, and what the tokenizer makes of it: a policy judges both."""
        return text, normalized(self._detokenizer.tokenizer, text)

    def decoder(self) -> TextDecoder:
        return TextDecoder(self._detokenizer)

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> str:
        """Format a conversation by the model's chat template, up to where the answer begins. Raises ConfigError: there
        is no template, or it does not accept these messages."""
        try:
            text = self._tokenizer.apply_chat_template(messages=json.dumps(messages), add_generation_prompt=True)
        except RuntimeError as error:
            reason = f"this model cannot chat ({one_line(error)})"
            raise ConfigError(f"{reason}; use `edgeadapt device infer`", about="chat_template") from error
        return str(text)

    def check(self, params: SamplingParams) -> None:
        """Check that the guide of ``params``, if any, can be followed. Raises as ``GuideFollower.begin``."""
        self.guided(params.guide)

    def guided(self, guide: Guide | None) -> GuidedAnswer | None:
        """Begin an answer, if there is a guide. Raises as ``check``."""
        if guide is None:
            return None
        if self._follower is None:
            self._follower = GuideFollower(self._tokenizer_file, self.vocabulary, self.ends)
        return self._follower.begin(guide)


class GenerationEngine(ModelText):
    """A verified base, loaded. The caller verifies adapters, and reads one answer at a time."""

    def __init__(self, base: VerifiedBase, threads: int, options: Mapping[str, str] | None = None) -> None:
        """Load the model. ``options``: further session options of ONNX Runtime, such as ``enable_profiling``.

        Raises ConfigError: onnxruntime-genai is not installed; RuntimeError, ValueError, KeyError, TypeError: the base
        cannot be loaded.
        """
        self._og = genai()
        config = self._og.Config(str(base.folder))
        session = {"intra_op_num_threads": threads, **(options or {})}
        self._chat = CHAT in base.manifest.files
        decoder = {"session_options": session} | ({"filename": CHAT} if self._chat else {})
        config.overlay(json.dumps({"model": {"decoder": decoder}}))
        self._model = self._og.Model(config)
        super().__init__(base, config)
        self._adapters = self._og.Adapters(self._model)
        self._live: _Live | None = None
        self._names: dict[str, str] = {}  # of loaded adapters: name → name in the library
        self._unused: list[str] = []  # unloaded adapters that the generator may hold, by name in the library
        stated = json.loads(base.files[GENERATION])["model"]["decoder"]
        self._width = int(stated["hidden_size"]) if self._chat else 0
        if self._chat:
            self._load(BARE, empty_inputs(base.manifest.slots))

    def load(self, adapter: Adapter) -> None:
        """Load an adapter's tensors under its name. Raises DataError: onnxruntime-genai refuses the tensors;
        EdgeAdaptError: the temporary folder has no room for the file."""
        name = adapter.name
        while name in self._unused:
            name += "#"
        self._load(name, adapter.inputs)
        self._names[adapter.name] = name

    def _load(self, name: str, inputs: Tensors) -> None:
        values = {slot: ort.OrtValue.ortvalue_from_numpy(inputs[slot]) for slot in sorted(inputs)}
        container = ort.AdapterFormat()
        container.set_adapter_version(1)
        container.set_model_version(1)
        container.set_parameters(values)
        shown = name.rstrip("#")
        with TemporaryDirectory(prefix="edgeadapt-") as folder:  # mode 0700
            path = Path(folder) / "adapter"
            path.touch(mode=0o600)
            try:
                container.export_adapter(str(path))
            except RuntimeError as error:
                size = sum(value.nbytes for value in inputs.values())
                reason = f"{folder} lacks {size} bytes to load adapter {shown!r}"
                raise EdgeAdaptError(f"{reason}; free some, or set TMPDIR to another folder", about="TMPDIR") from error
            try:
                self._adapters.load(str(path), name)
            except RuntimeError as error:
                reason = f"adapter {shown!r} cannot be loaded: {one_line(error)}; export it again"
                raise DataError(reason, about="adapter") from error
            except KeyboardInterrupt:  # raised after the library has loaded it; free the name for the next attempt
                self._adapters.unload(name)
                raise

    def unload(self, name: str) -> None:
        """Unload an adapter, or leave it to a generator whose KV cache other adapters can use. That may hold it."""
        self._unused.append(self._names.pop(name, name))
        if not self._chat or self._live is None or len(self._unused) > MAX_UNUSED:
            self.forget()

    def forget(self) -> None:
        """Release the generator with its KV cache, which may be inconsistent after an error."""
        self._live = None
        while self._unused:
            self._adapters.unload(self._unused.pop())

    def read(self, prompt: list[int], params: SamplingParams, adapter: str | None) -> int:
        """Read a prompt of at least one token, and fewer than ``context``, with a loaded adapter or the bare base.

        Returns the number of tokens found in the KV cache. Raises ConfigError: as ``check``; RuntimeError: the graph
        does not run.
        """
        guided = self.guided(params.guide)
        live = self._usable(params, adapter, min(self.context, len(prompt) + params.max_tokens))
        live.guided = guided
        # Without the last tokens: the last sampled one is not in the cache, and the prompt's last must be read once
        # more for its logits.
        pairs = zip(live.tokens[:-1], prompt[:-1], strict=False)
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        cached = start = known if live.adapter == self._name(adapter) else 0
        if live.inner.token_count():
            live.inner.rewind_to(cached)
        self._switch(live, adapter)
        live.tokens = prompt[:]
        if live.kept is not None:
            self._read_states(live, live.kept, cached, known)
            start = known
        # With beams onnxruntime-genai 0.18 ends the process at the second piece.
        size = PIECE if params.beams == 1 else self.context
        for at in range(start, len(prompt), size):
            append(live.inner, prompt[at : at + size], size)
            if live.kept is not None:
                live.kept.add(live.inner)
        return cached

    def _read_states(self, live: _Live, states: _States, begin: int, end: int) -> None:
        """Let the layers with slots read some tokens, whose states and cache in the layers below are there."""
        for at in range(begin, end, PIECE):
            states.range[:] = at, min(at + PIECE, end)
            append(live.inner, live.tokens[at : min(at + PIECE, end)])
        states.range[:] = 0
        states.count = end

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
            self._step(live)
            token = int(live.inner.get_next_tokens()[0])
            live.tokens.append(token)
            if live.guided is not None:
                live.guided.append(token)
            yield token

    def _step(self, live: _Live) -> None:
        """Write the next token, of each beam. Raises as ``draw``."""
        logits = live.inner.get_logits()
        if live.kept is not None and live.kept.count < len(live.tokens):  # it read the last one that was written
            live.kept.add(live.inner)
        if not np.isfinite(logits).all():
            raise not_finite()
        if live.guided is not None:
            logits[..., ~live.guided.allowed()] = -np.inf
            live.inner.set_logits(logits)
        live.inner.generate_next_token()

    def _search(self, live: _Live, limit: int) -> Iterator[int]:
        """Yield the most likely answer among the beams, once all have ended."""
        for _ in range(limit):
            if live.inner.is_done():
                break
            self._step(live)
        written = live.inner.get_sequence(0)[len(live.tokens) :]
        yield from map(int, written)
        if len(written) < limit:
            yield next(iter(self.ends))  # onnxruntime-genai leaves it out

    def inner(self, params: SamplingParams, adapter: str | None) -> Any:
        """Make onnxruntime-genai's generator, for ``params.max_tokens`` in all, to time single tokens. The next
        ``read`` reuses nothing of its KV cache."""
        live = self._usable(params, adapter, min(self.context, params.max_tokens))
        self._switch(live, adapter)
        live.tokens = []
        return live.inner

    def _name(self, adapter: str | None) -> str | None:
        if adapter is None:
            return BARE if self._chat else None
        return self._names[adapter]

    def _switch(self, live: _Live, adapter: str | None) -> None:
        if live.adapter != (name := self._name(adapter)):
            live.inner.set_active_adapter(self._adapters, name)
            live.adapter = name

    def _usable(self, params: SamplingParams, adapter: str | None, needed: int) -> _Live:
        """Take the generator of the previous answer, if it can be used again, else a new one. A generator can switch to
        another adapter, but not back to the bare base."""
        live = self._live
        same = live is not None and live.params == params and params.reusable and live.capacity >= needed
        if live is not None and same and (self._chat or adapter is not None or live.adapter is None):
            return live
        # Beams end where the KV cache does, and only then is the most likely answer known.
        capacity = needed if params.beams > 1 else min(self.context, -(-needed // GROWTH) * GROWTH)
        live = None
        self.forget()  # frees its KV cache before the next one is allocated
        inner = self._new(params, capacity)
        states = _States.of(inner, capacity, self._width) if self._chat else None
        self._live = _Live(inner, params, None, capacity, [], states)
        return self._live

    def _new(self, params: SamplingParams, capacity: int) -> Any:
        inner = self._og.GeneratorParams(self._model)
        inner.set_search_options(max_length=capacity, **params.search_options(self.vocabulary))
        return self._og.Generator(self._model, inner)


def not_finite() -> DataError:
    reason = "the answer is not finite: the adapter's values are too large for this base; use another one"
    return DataError(reason, about="logits")


def append(inner: Any, tokens: Sequence[int], size: int = PIECE) -> None:
    for start in range(0, len(tokens), size):
        inner.append_tokens(np.array(tokens[start : start + size], dtype=np.int32))


def genai() -> Any:
    og = required("onnxruntime_genai")
    og.disable_telemetry_events()
    return og
