"""Writes text with a language model and one adapter. No torch, no transformers.

Everything comes verified from ``library.py``; ``engine.py`` runs it, ``chat.py`` keeps a conversation.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Self

from aggregation.errors import ConfigError, DataError
from client.inference.cache import Cache
from client.inference.compose import Adapter
from client.inference.engine import GenerationEngine, first_line
from client.inference.library import Library, chosen
from client.inference.options import Answer, Finish, Options
from client.inference.session import MAX_LOADED, MAX_LOADED_BYTES
from client.inference.stops import Stops
from client.inference.text import checked


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str


class Generator:
    """A language model over the base of a bundle, and the adapter that is in use: none at first, the bare base."""

    def __init__(self, library: Library, threads: int, loaded: int, loaded_bytes: int) -> None:
        """Use ``open``, which verifies."""
        self._library = library
        self._engine = GenerationEngine(library.base, threads)
        self._loaded: Cache[Adapter] = Cache(loaded, loaded_bytes, lambda adapter: self._engine.unload(adapter.name))
        self._current: Adapter | None = None
        self._busy = Lock()
        self._last: Answer | None = None

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
    def context(self) -> int:
        """How many tokens the model can read and write together."""
        return self._engine.context

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
        choice = chosen(names, weights)
        with self._alone():
            if (adapter := self._loaded.get(choice)) is None:
                adapter = self._load(self._library.load(choice))
            self._current = adapter
        return adapter

    def use_base(self) -> None:
        """Switch to the bare base. Raises ConfigError while an answer is being written."""
        with self._alone():
            self._current = None

    def complete(self, text: str, options: Options = Options()) -> Iterator[str]:  # noqa: B008  # it is immutable
        """Continue a text; pieces come as they are written. How it ended is in ``last``.

        Closing the iterator, or leaving it, ends the answer.

        Raises:
            DataError: The text is empty or not Unicode, or leaves no room for an answer; or, later, a token has no
                finite probability.
            ConfigError: Another answer is being written.
        """
        return self._answer(self._engine.encode(checked(text)), options)

    def answer(self, messages: Sequence[ChatMessage], options: Options = Options()) -> Iterator[str]:  # noqa: B008
        """Answer the last of ``messages``, in the form of the model's chat template. Raises as ``complete``."""
        return self._answer(self.tokens(messages), options)

    def tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The tokens that the model reads for a conversation, up to where its answer begins.

        Raises:
            DataError: A message is empty or not Unicode, or contains a mark by which the model tells messages apart.
            ConfigError: The model has no chat template, or it cannot take these messages.
        """
        for message in messages:
            if mark := next((mark for mark in self._engine.marks if mark in checked(message.content)), None):
                raise DataError(f"a message contains {mark!r}, which is the model's own mark; leave it out")
        listed = [{"role": message.role, "content": message.content} for message in messages]
        return self._engine.encode(self._engine.templated(listed))

    def room(self, options: Options) -> int:
        """How many tokens a prompt may have, so that the whole answer fits."""
        return self.context - options.max_tokens

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise ConfigError("an answer is being written; read it to its end, or close it, first")
        try:
            yield
        finally:
            self._busy.release()

    def _load(self, adapter: Adapter) -> Adapter:
        """Hand the tensors over to the engine; the adapter that is returned has them no more."""
        self._engine.load(adapter)
        handed_over = replace(adapter, inputs={})
        self._loaded.put(adapter.choice, handed_over, adapter.nbytes)
        return handed_over

    def _answer(self, prompt: list[int], options: Options) -> Iterator[str]:
        with self._alone():  # say at once what the first piece would say
            pass
        if not prompt:
            raise DataError("the text has no sign that the model knows; give another")
        if len(prompt) >= self.context:
            raise DataError(f"a text of {len(prompt)} tokens fills the model's {self.context}; shorten it")
        return self._written(prompt, options)

    def _written(self, prompt: list[int], options: Options) -> Iterator[str]:
        with self._alone():
            yield from self._drawn(prompt, options)

    def _drawn(self, prompt: list[int], options: Options) -> Iterator[str]:
        engine, stops, decoder = self._engine, Stops(options.stop), self._engine.decoder()
        finish, said, count, known = Finish.INTERRUPTED, "", 0, 0
        try:
            known = engine.read(prompt, options, self._current.name if self._current else None)
            for count, token in enumerate(engine.draw(), 1):  # noqa: B007
                piece = "" if token in engine.ends else stops.feed(decoder.decode(token))
                said += piece
                if piece:
                    yield piece
                if token in engine.ends or stops.hit is not None:
                    finish = Finish.STOP if stops.hit is not None else Finish.END
                    break
            else:
                finish = Finish.LENGTH
            if rest := stops.rest():
                said += rest
                yield rest
        except GeneratorExit:  # at a ``yield``, where what the engine remembers is sound
            raise
        except RuntimeError as error:  # of onnxruntime-genai
            engine.forget()
            raise DataError(f"the model cannot be run with this adapter: {first_line(error)}") from error
        except BaseException:
            engine.forget()
            raise
        finally:
            self._last = Answer(said, finish, count, len(prompt), known)
