"""Writes text with a language model and verified adapters. It needs neither torch nor transformers.

``Generator`` answers one prompt, ``Conversation`` keeps the messages of a chat; ``engine.py`` runs the model.
``batch.py`` answers many prompts at once.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import Self

from aggregation.errors import ConfigError, DataError, one_line
from client.inference import usage
from client.inference.engine import GenerationEngine, ModelText
from client.inference.library import Adapter, AdapterCache, Composition, Library, Named
from client.inference.passages import quoted
from client.inference.session import MAX_LOADED, MAX_LOADED_BYTES
from client.inference.text import Answer, Finish, SamplingParams, StopFilter, TextDecoder, checked, require_plain
from edgeadapt.formats.bundle import MODEL
from edgeadapt.formats.graphinputs import with_placeholders
from edgeadapt.formats.passages import Passage
from edgeadapt.formats.policy import Policy, blocks
from edgeadapt.formats.storage import File


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str  # "system", "user" or "assistant"
    content: str


@dataclass(slots=True)
class Draft:
    """An answer that is written token by token, and given as the bundle's policy lets it be: whole or not at all, if
    that has output patterns. ``finish`` is INTERRUPTED until it ends."""

    policy: Policy
    params: SamplingParams
    prompt_tokens: int
    limit: int  # tokens
    ends: frozenset[int]
    _decoder: TextDecoder
    _stops: StopFilter
    text: str = ""
    tokens: int = 0
    reused: int = 0
    finish: Finish = Finish.INTERRUPTED

    @classmethod
    def begin(
        cls, policy: Policy, text: ModelText, asked: str, prompt_tokens: int, params: SamplingParams, virtual: int
    ) -> Self:
        """Begin the answer to a prompt of at least one token that ends with ``asked``; a text that the policy blocks
        ends it at once. Raises DataError: the prompt has no tokens, or leaves no room after the ``virtual`` ones."""
        if not prompt_tokens:
            raise DataError("the text contains no known token; give another text", about="text.tokens")
        if (room := text.context - prompt_tokens - virtual) < 1:
            before = f" after {virtual} virtual ones" if virtual else ""
            reason = f"the text has {prompt_tokens} tokens{before}, and the model's limit is {text.context}"
            raise DataError(f"{reason}; shorten it", about="prompt")
        limit, stops = min(params.max_tokens, room), StopFilter(params.stop)
        draft = cls(policy, params, prompt_tokens, limit, text.ends, text.decoder(), stops)
        if blocks(policy.input, *text.readings(asked)):
            draft._block()
        return draft

    @property
    def answer(self) -> Answer:
        counts = self.tokens, self.prompt_tokens, self.reused
        return Answer(self.text, self.finish, *counts, self.params.guide)

    def take(self, token: int) -> str:
        """Take the next token; return the text that may be given now."""
        self.tokens += 1
        ended = token in self.ends
        piece = "" if ended else self._stops.feed(self._decoder.decode(token))
        if ended or self._stops.hit is not None or self.tokens == self.limit:
            hit = Finish.LENGTH if self._stops.hit is None else Finish.STOP
            self.finish = Finish.END if ended else hit
            piece += self._stops.rest()
        self.text += piece
        if not self.policy.output:
            return piece
        if self.finish is Finish.INTERRUPTED:
            return ""
        if blocks(self.policy.output, self.text):
            self._block()
        return self.text

    def _block(self) -> None:
        self.text, self.finish = self.policy.denied, Finish.BLOCKED


class Prompts:
    """Makes prompts for the language model of a bundle."""

    def __init__(self, library: Library, text: ModelText) -> None:
        self.library, self._text = library, text

    def tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Tokenize the prompt of a conversation, up to where the answer begins.

        Raises DataError: a message is not valid (``text.checked``), or contains a special token of the model, with
        which it could pose as another message; ConfigError: the model has no chat template, or the template does not
        accept these messages.
        """
        for message in messages:
            require_plain(checked(message.content), self._text.special_tokens, "message")
        listed = [{"role": message.role, "content": message.content} for message in messages]
        return self._text.encode(self._text.apply_chat_template(listed))

    def has_special_token(self, text: str) -> bool:
        return any(token in text for token in self._text.special_tokens)

    def _draft(self, asked: str, prompt: list[int], params: SamplingParams, adapter: Adapter | None) -> Draft:
        """Begin an answer. Raises as ``Draft.begin``."""
        virtual = adapter.virtual_tokens if adapter else 0
        return Draft.begin(self.library.base.policy, self._text, asked, len(prompt), params, virtual)


class Generator(Prompts):
    """The language model of a bundle. Each call names its adapter; without one, the bare base answers. An adapter that
    a lesson or an update replaced is loaded again."""

    def __init__(self, library: Library, engine: GenerationEngine, loaded: int, loaded_bytes: int) -> None:
        super().__init__(library, engine)
        self._engine = engine
        self._loaded = AdapterCache[Adapter](
            loaded,
            loaded_bytes,
            lambda adapter: adapter.nbytes,
            library.is_current,
            lambda adapter: engine.unload(adapter.name),
        )
        self._busy = Lock()
        self.last: Answer | None = None

    @classmethod
    def open(cls, bundle: File, trust: File | None = None, **limits: int) -> Self:
        """Verify and load the base of ``bundle``. Arguments and errors as ``ClassificationSession.open``. Raises
        ConfigError: also if onnxruntime-genai is not installed."""
        return cls.of(Library.open(bundle, trust, "text-generation"), **limits)

    @classmethod
    def of(
        cls, library: Library, threads: int = 2, loaded: int = MAX_LOADED, loaded_bytes: int = MAX_LOADED_BYTES
    ) -> Self:
        """Load a verified base. Arguments and errors as ``ClassificationSession.of``."""
        try:
            generator = cls(library, GenerationEngine(library.base, threads), loaded, loaded_bytes)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = f"this version cannot load the base in {library.bundle}: {error}"
            raise DataError(reason, about=MODEL) from error
        library.base.check()
        return generator

    @property
    def context(self) -> int:
        return self._engine.context

    def load(self, adapter: Named) -> Adapter:
        """Verify an adapter or a composition, and keep it in memory, like ``ClassificationSession.load``. Raises
        ConfigError also while an answer is being written."""
        with self._exclusive():
            return self._get(Composition.of(adapter))

    def complete(
        self,
        text: str,
        params: SamplingParams = SamplingParams(),  # noqa: B008  # frozen
        adapter: Named | None = None,
    ) -> Iterator[str]:
        """Continue ``text``, piece by piece; ``last`` says how the answer ended. Closing the iterator ends the answer.

        Raises:
            DataError: The text is not valid (``text.checked``) or leaves no room for an answer; while reading: a token
                has no finite probability, or none that the guide allows can be written.
            ConfigError: Another answer is being written; while reading: the guide cannot be followed.
            TrustError, DataError, ConfigError: As ``load``.
        """
        return self._answer(self._engine.encode(checked(text)), text, params, adapter)

    def answer(
        self,
        messages: Sequence[ChatMessage],
        params: SamplingParams = SamplingParams(),  # noqa: B008
        adapter: Named | None = None,
    ) -> Iterator[str]:
        """Answer the last of ``messages``, formatted by the model's chat template. Raises as ``complete``."""
        return self._answer(self.tokens(messages), messages[-1].content, params, adapter)

    def check(self, params: SamplingParams) -> None:
        """Check that answers can be written by these parameters. Raises ConfigError as ``GenerationEngine.check``."""
        self._engine.check(params)

    def max_prompt(self, params: SamplingParams, adapter: Adapter | None = None) -> int:
        """Count the most tokens of a prompt that leave room for an answer of ``params.max_tokens`` with an adapter."""
        return self.context - params.max_tokens - (adapter.virtual_tokens if adapter else 0)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise ConfigError("an answer is being written; read it to its end, or close it, first", about="answer")
        try:
            yield
        finally:
            self._busy.release()

    def _get(self, composition: Composition) -> Adapter:
        if (adapter := self._loaded.get(composition)) is None:
            loaded = self.library.load(composition)
            self._engine.load(loaded)
            adapter = self._loaded[composition] = replace(loaded, inputs={})  # the engine holds the tensors
        return adapter

    def _answer(self, prompt: list[int], asked: str, params: SamplingParams, adapter: Named | None) -> Iterator[str]:
        composition = None if adapter is None else Composition.of(adapter)
        with self._exclusive():  # raise now, not with the first piece
            draft = self._draft(asked, prompt, params, None if composition is None else self._get(composition))
        return self._pieces(prompt, draft, composition)

    def _pieces(self, prompt: list[int], draft: Draft, composition: Composition | None) -> Iterator[str]:
        self.last = draft.answer
        if draft.finish is Finish.BLOCKED:
            yield draft.text
            return
        with self._exclusive():
            adapter = None if composition is None else self._get(composition)  # may have been evicted since
            begun = time.perf_counter()
            yield from self._generate(prompt, draft, adapter)
            if adapter:
                usage.count_answers(self.library.bundle, [(adapter, None, time.perf_counter() - begun)])

    def _generate(self, prompt: list[int], draft: Draft, adapter: Adapter | None) -> Iterator[str]:
        engine, virtual = self._engine, adapter.virtual_tokens if adapter else 0
        try:
            cached = engine.read(with_placeholders(prompt, virtual), draft.params, adapter.name if adapter else None)
            draft.reused = max(0, cached - virtual)
            for token in engine.draw():
                if piece := draft.take(token):
                    yield piece
                if draft.finish is not Finish.INTERRUPTED:
                    break
        except GeneratorExit:  # raised by a ``yield``, between two tokens: the KV cache is consistent
            raise
        except RuntimeError as error:  # of onnxruntime-genai
            engine.forget()
            reason = f"the model does not run with this adapter: {one_line(error)}"
            raise DataError(reason, about="adapter") from error
        except BaseException:
            engine.forget()
            raise
        finally:
            self.last = draft.answer


class Conversation:
    """The messages of a chat between a user and a generator.

    The model reads the system prompt and as many of the last messages as leave room for an answer of ``max_tokens``;
    the oldest are dropped, each question with its answer. After a change of adapter the conversation goes on: the new
    adapter reads the same messages.
    """

    def __init__(
        self,
        generator: Generator,
        params: SamplingParams,
        system: str | None = None,
        adapter: Named | None = None,
        sources: Callable[[str], Sequence[Passage]] | None = None,
    ) -> None:
        """Start without messages; several conversations may share a generator. ``sources`` finds passages that are
        quoted before a question (``ask``).

        Raises TrustError, DataError, ConfigError: as ``use``; ConfigError: an answer of ``max_tokens`` leaves no room
        for a question, or the guide cannot be followed; DataError: the system prompt is not a valid message
        (``Generator.tokens``).
        """
        self._generator, self._params, self._sources = generator, params, sources
        self.quoted: tuple[Passage, ...] = ()  # before the last question
        self.adapter: Adapter | None = None
        self.use(adapter)
        if generator.max_prompt(params, self.adapter) < 1:
            reason = f"an answer of {params.max_tokens} tokens leaves no room for a question: the model's limit is"
            reason = f"{reason} {generator.context} tokens; lower --max-tokens"
            raise ConfigError(reason, about="max_tokens")
        generator.check(params)
        self._system = [] if system is None else [ChatMessage("system", system)]
        self._messages: list[ChatMessage] = []
        # Last question, also if it was refused or its answer was empty, so that ``messages`` lacks it.
        self.asked: str | None = None
        if self._system:
            generator.tokens([*self._system, ChatMessage("user", "?")])

    @property
    def messages(self) -> tuple[ChatMessage, ...]:
        """Messages that the model would read now, without the system prompt."""
        return tuple(self._messages)

    @property
    def system(self) -> str | None:
        return self._system[0].content if self._system else None

    def use(self, adapter: Named | None) -> None:
        """Let another adapter answer. After an error the conversation keeps its own. Raises as ``Generator.load``."""
        self.adapter = None if adapter is None else self._generator.load(adapter)

    def reset(self) -> None:
        self._messages.clear()
        self.asked = None

    def ask(self, text: str) -> Iterator[str]:
        """Answer ``text``, piece by piece. If the answer is not read to its end, the part that was read is kept.

        The passages of ``sources`` are quoted before the text, the best of them where not all fit, and are not kept.
        One that has a special token of the model is left out: it could pose as another message.

        Raises DataError: the text is not a valid message, or is too long even without the previous messages, which
        stay, and without sources.
        """
        self.asked, plain = text, ChatMessage("user", text)
        passages = [] if self._sources is None else self._sources(text)
        passages = [one for one in passages if not self._generator.has_special_token(one.read)]
        for count in range(len(passages), -1, -1):
            self.quoted = tuple(passages[:count])
            asked = ChatMessage("user", f"{quoted(self.quoted)}\n\n{text}") if count else plain
            try:
                messages = self._fit([*self._messages, asked])
                break
            except DataError:
                if not count:
                    raise
        adapter = None if self.adapter is None else self.adapter.composition
        pieces = self._generator.answer([*self._system, *messages], self._params, adapter)
        return self._record([*messages[:-1], plain], pieces)

    def _record(self, messages: list[ChatMessage], pieces: Iterator[str]) -> Iterator[str]:
        text = ""
        try:
            for piece in pieces:
                text += piece
                yield piece
        finally:
            last = self._generator.last
            if text.strip() and not (last and last.finish is Finish.BLOCKED):  # which is not read again
                self._messages = [*messages, ChatMessage("assistant", text)]

    def _fit(self, messages: list[ChatMessage]) -> list[ChatMessage]:
        limit = self._generator.max_prompt(self._params, self.adapter)
        while (needed := len(self._generator.tokens([*self._system, *messages]))) > limit:
            if len(messages) < 3:
                reason = f"the text needs {needed} tokens, and an answer of {self._params.max_tokens} leaves {limit}"
                raise DataError(f"{reason}; shorten the text, or lower --max-tokens", about="prompt")
            messages = messages[2:]
        return messages
