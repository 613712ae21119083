"""Writes text with a language model and one adapter, through onnxruntime-genai. No torch, no transformers.

Everything comes verified from ``library.py``. onnxruntime-genai takes adapters as files only: one that was verified is
written, as float32, to a private temporary file, which is removed as soon as it is loaded.

The model's memory of a text (its KV cache) outlives an answer. The next one reads only what is new, if it begins with
the same tokens, as the next turn of a conversation does.
"""

import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import onnxruntime as ort

from aggregation.errors import ConfigError, DataError
from client.cache import Cache
from client.compose import Adapter, Choice
from client.library import Library, chosen
from client.options import Answer, Finish, Options
from client.session import MAX_LOADED, MAX_LOADED_BYTES
from client.stops import Stops
from client.text import checked
from client.trust import GENAI, TOKENIZER

GROWTH = 256  # tokens; room for the KV cache is made in steps, so that a few more turns fit into what is there


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str


@dataclass(slots=True)
class _Live:
    """A generator of onnxruntime-genai, and what its KV cache holds."""

    inner: Any
    made_for: tuple[Options, Choice | None]
    capacity: int  # tokens
    tokens: list[int]


class Generator:
    """A language model over the base of a bundle, and the adapter that is in use: none at first, the bare base."""

    def __init__(self, library: Library, threads: int, loaded: int, loaded_bytes: int) -> None:
        """Use ``open``, which verifies."""
        self._og = _genai()
        self._library = library
        config = self._og.Config(str(library.base.folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = self._og.Model(config)
        self._tokenizer = self._og.Tokenizer(self._model)
        self._adapters = self._og.Adapters(self._model)
        self._loaded: Cache[Adapter] = Cache(loaded, loaded_bytes, self._unload)
        self._current: Adapter | None = None
        self._live: _Live | None = None
        self._busy = False
        self._last: Answer | None = None
        stated = json.loads(library.base.files[GENAI])["model"]
        self.context = int(stated["context_length"])
        self._vocabulary = int(stated["vocab_size"])
        self._ends = frozenset(map(int, self._tokenizer.eos_token_ids))
        self._marks = _marks(library.base.files[TOKENIZER])

    @classmethod
    def open(
        cls,
        bundle: Path,
        trust: Path | None = None,
        *,
        threads: int = 2,
        loaded: int = MAX_LOADED,
        loaded_bytes: int = MAX_LOADED_BYTES,
    ) -> Self:
        """Verify the base of ``bundle`` and load it. Arguments and errors as ``Session.open``.

        Raises:
            ConfigError: Also if onnxruntime-genai is not installed.
        """
        return cls.of(Library.open(bundle, trust, "text-generation"), threads, loaded, loaded_bytes)

    @classmethod
    def of(
        cls, library: Library, threads: int = 2, loaded: int = MAX_LOADED, loaded_bytes: int = MAX_LOADED_BYTES
    ) -> Self:
        """Load a base that is verified already. Raises as ``open``."""
        try:
            generator = cls(library, threads, loaded, loaded_bytes)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"the base in {library.bundle} cannot be loaded by this client: {error}") from error
        library.base.check()
        return generator

    @property
    def library(self) -> Library:
        """The bundle: its card, the names of its adapters, the default one."""
        return self._library

    @property
    def adapter(self) -> Adapter | None:
        """The adapter in use; None for the bare base."""
        return self._current

    @property
    def last(self) -> Answer | None:
        """The answer that ended last."""
        return self._last

    def use(self, names: str | Sequence[str], weights: Sequence[float] | None = None) -> Adapter:
        """Switch to an adapter, or to several as one. Arguments and errors as ``Session.use``.

        Raises:
            ConfigError: Also while an answer is being written.
        """
        self._check_idle()
        choice = chosen(names, weights)
        if (adapter := self._loaded.get(choice)) is None:
            adapter = self._load(self._library.load(choice))
        self._current = adapter
        return adapter

    def use_base(self) -> None:
        """Switch to the bare base. Raises ConfigError while an answer is being written."""
        self._check_idle()
        self._current = None

    def complete(self, text: str, options: Options = Options()) -> Iterator[str]:  # noqa: B008  # it is immutable
        """Continue a text; pieces come as they are written. How it ended is in ``last``.

        Closing the iterator, or leaving it, ends the answer.

        Raises:
            DataError: The text is empty or not Unicode, or leaves no room for an answer; or, later, a token has no
                finite probability.
            ConfigError: Another answer is being written.
        """
        return self._answer(self._encode(checked(text)), options)

    def answer(self, messages: Sequence[Message], options: Options = Options()) -> Iterator[str]:  # noqa: B008
        """Answer the last of ``messages``, in the form of the model's chat template. Raises as ``complete``."""
        return self._answer(self.tokens(messages), options)

    def tokens(self, messages: Sequence[Message]) -> list[int]:
        """The tokens that the model reads for a conversation, up to where its answer begins.

        Raises:
            DataError: A message is empty or not Unicode, or contains a mark by which the model tells messages apart.
            ConfigError: The model has no chat template, or it cannot take these messages.
        """
        for message in messages:
            if mark := next((mark for mark in self._marks if mark in checked(message.content)), None):
                raise DataError(f"a message contains {mark!r}, which is the model's own mark; leave it out")
        listed = json.dumps([{"role": message.role, "content": message.content} for message in messages])
        try:
            text = self._tokenizer.apply_chat_template(messages=listed, add_generation_prompt=True)
        except RuntimeError as error:
            reason = f"this model cannot chat ({_first_line(error)})"
            raise ConfigError(f"{reason}; use `edgeadapt device infer`") from error
        return self._encode(text)

    def room(self, options: Options) -> int:
        """How many tokens a prompt may have, so that the whole answer fits."""
        return self.context - options.max_tokens

    def _check_idle(self) -> None:
        if self._busy:
            raise ConfigError("an answer is being written; read it to its end, or close it, first")

    def _encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text)]

    def _load(self, adapter: Adapter) -> Adapter:
        """Hand the tensors over to onnxruntime-genai; the adapter that is returned has them no more."""
        values = {name: ort.OrtValue.ortvalue_from_numpy(adapter.inputs[name]) for name in sorted(adapter.inputs)}
        container = ort.AdapterFormat()
        container.set_adapter_version(1)
        container.set_model_version(1)
        container.set_parameters(values)
        with TemporaryDirectory(prefix="edgeadapt-") as folder:  # mode 0700
            path = Path(folder) / "adapter"
            path.touch(mode=0o600)
            container.export_adapter(str(path))
            try:
                self._adapters.load(str(path), adapter.name)
            except RuntimeError as error:
                raise DataError(f"adapter {adapter.name!r} cannot be loaded: {_first_line(error)}") from error
        self._live = None  # an adapter that its generator still holds could not be given up
        handed_over = replace(adapter, inputs={})
        self._loaded.put(adapter.choice, handed_over, adapter.nbytes)
        return handed_over

    def _unload(self, adapter: Adapter) -> None:
        self._adapters.unload(adapter.name)

    def _answer(self, prompt: list[int], options: Options) -> Iterator[str]:
        self._check_idle()
        if len(prompt) >= self.context:
            raise DataError(f"a text of {len(prompt)} tokens fills the model's {self.context}; shorten it")
        return self._written(prompt, options)

    def _written(self, prompt: list[int], options: Options) -> Iterator[str]:
        self._check_idle()
        self._busy = True
        stops, stream = Stops(options.stop), self._tokenizer.create_stream()
        finish, said, count, reused = Finish.INTERRUPTED, "", 0, 0
        try:
            live, reused = self._prepared(prompt, options)
            for count, token in enumerate(self._drawn(live, options), 1):  # noqa: B007
                piece = "" if token in self._ends else stops.feed(stream.decode(token))
                said += piece
                if piece:
                    yield piece
                if token in self._ends or stops.hit is not None:
                    finish = Finish.STOP if stops.hit is not None else Finish.END
                    break
            else:
                finish = Finish.LENGTH
            if rest := stops.rest():
                said += rest
                yield rest
        except GeneratorExit:  # at a ``yield``: the KV cache holds what ``tokens`` says
            raise
        except RuntimeError as error:  # of onnxruntime-genai
            self._live = None
            raise DataError(f"{self._shown()} cannot be run: {_first_line(error)}") from error
        except BaseException:
            self._live = None
            raise
        finally:
            self._busy = False
            self._last = Answer(said, finish, count, len(prompt), reused)

    def _drawn(self, live: _Live, options: Options) -> Iterator[int]:
        """Token after token, the last one included, until the allowed number or the context is used up."""
        for _ in range(min(options.max_tokens, self.context - len(live.tokens))):
            if not np.isfinite(live.inner.get_logits()).all():
                raise DataError(f"{self._shown()} gave an answer that is not finite; use another")
            live.inner.generate_next_token()
            token = int(live.inner.get_next_tokens()[0])
            live.tokens.append(token)
            yield token

    def _shown(self) -> str:
        return "the base" if self._current is None else f"adapter {self._current.name!r}"

    def _prepared(self, prompt: list[int], options: Options) -> tuple[_Live, int]:
        """A generator that has read ``prompt``, and how many of its tokens it knew already."""
        choice = self._current.choice if self._current else None
        needed = min(self.context, len(prompt) + options.max_tokens)
        live, known = self._live, 0
        if live and live.made_for == (options, choice) and live.capacity >= needed and options.seed is None:
            # Not the last token of either: the one drawn last was never read, and what follows the prompt is asked for.
            known = _common(live.tokens[:-1], prompt[:-1])
        if live is None or not known:
            live = self._fresh(options, choice, needed)
        else:
            live.inner.rewind_to(known)
        live.tokens = prompt[:]
        live.inner.append_tokens(np.array(prompt[known:], dtype=np.int32))
        return live, known

    def _fresh(self, options: Options, choice: Choice | None, needed: int) -> _Live:
        capacity = min(self.context, -(-needed // GROWTH) * GROWTH)
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=capacity, **options.search(self._vocabulary))
        self._live = None  # frees its KV cache before the next one is made
        inner = self._og.Generator(self._model, parameters)
        if self._current is not None:
            inner.set_active_adapter(self._adapters, self._current.name)
        self._live = _Live(inner, (options, choice), capacity, [])
        return self._live


def _genai() -> Any:
    # By name, because it is an extra: a device that only classifies does without.
    try:
        og = importlib.import_module("onnxruntime_genai")
    except ModuleNotFoundError as error:
        raise ConfigError("writing text needs onnxruntime-genai: pip install 'edgeadapt[generate]'") from error
    og.disable_telemetry_events()
    return og


def _marks(tokenizer: bytes) -> tuple[str, ...]:
    """The special tokens. The tokenizer finds them in any text, so a message with one could pose as another's."""
    added = json.loads(tokenizer).get("added_tokens", [])
    return tuple(sorted(token["content"] for token in added if token.get("special") and token["content"]))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
