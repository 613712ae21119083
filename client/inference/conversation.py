"""A conversation with a language model: the turns so far, and which of them the model still gets to read."""

from collections.abc import Iterator

from aggregation.errors import ConfigError, DataError
from client.inference.generate import ChatMessage, Generator
from client.inference.options import Options


class Conversation:
    """Turns between a user and a generator.

    The model reads the system's text and as many of the last turns as leave room for an answer of the allowed length;
    older ones are forgotten, a question always together with its answer. A conversation outlives a change of adapter:
    the next answer is the new adapter's, with all turns before it.
    """

    def __init__(self, generator: Generator, options: Options, system: str | None = None) -> None:
        """Begin with no turns.

        Raises:
            ConfigError: The allowed answer leaves no room for a question.
            DataError: The system's text is empty, or cannot be a message (``Generator.tokens``).
        """
        if generator.room(options) < 1:
            raise ConfigError(
                f"an answer of {options.max_tokens} tokens fills the model's {generator.context}; allow fewer"
            )
        self._generator, self._options = generator, options
        self._system = [] if system is None else [ChatMessage("system", system)]
        self._turns: list[ChatMessage] = []
        if self._system:
            generator.tokens([*self._system, ChatMessage("user", "?")])

    @property
    def turns(self) -> tuple[ChatMessage, ...]:
        """What the model would read now, without the system's text."""
        return tuple(self._turns)

    def reset(self) -> None:
        """Forget all turns."""
        self._turns.clear()

    def ask(self, text: str) -> Iterator[str]:
        """The answer, in pieces as they are written. One that is not read to its end counts as far as it was read.

        Raises:
            DataError: The text cannot be a message, or is too long even with all turns forgotten; they are then kept.
        """
        turns = self._fitting([*self._turns, ChatMessage("user", text)])
        return self._answered(turns, self._generator.answer([*self._system, *turns], self._options))

    def _answered(self, turns: list[ChatMessage], pieces: Iterator[str]) -> Iterator[str]:
        said = ""
        try:
            for piece in pieces:
                said += piece
                yield piece
        finally:
            if said.strip():
                self._turns = [*turns, ChatMessage("assistant", said)]

    def _fitting(self, turns: list[ChatMessage]) -> list[ChatMessage]:
        room = self._generator.room(self._options)
        while (needed := len(self._generator.tokens([*self._system, *turns]))) > room:
            if len(turns) < 3:
                raise DataError(
                    f"the text needs {needed} tokens, and {room} are free beside an answer of "
                    f"{self._options.max_tokens}; shorten it, or allow a shorter answer"
                )
            turns = turns[2:]
        return turns
