"""Examples as tokens, and what is learned of a language model's: the same for every engine. A text without a prompt is
continued from its first token, which is not learned. A text with one is the answer to it, in the base's chat template
if it has one; only the answer is learned. A text is cut off at ``MAX_TOKENS``, or earlier if the base reads fewer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from aggregation.errors import ConfigError, DataError
from client.training.examples import Example

MAX_TOKENS = 128  # tokens of a prompt with its text
Template = Callable[[list[dict[str, str]], bool], str]  # messages, whether an answer shall follow → text


@dataclass(frozen=True, slots=True)
class Encoded:
    ids: NDArray[np.int64]  # all tokens, shape ``(tokens,)``
    targets: NDArray[Any]  # the tokens that are learned, which follow each other, or the label, or one row: its target
    first: int | None  # where the token before the first target is; None: the target is a label
    size: int = 1  # bytes of the text that the targets stand for, at least 1
    cut: bool = False  # the text went on
    cost: int = 0  # tokens of a text that take as much memory; 0: as many as it has

    @property
    def tokens(self) -> int:
        return self.cost or len(self.ids)

    @property
    def positions(self) -> NDArray[np.int64]:
        return (self.first or 0) + np.arange(len(self.targets))


@dataclass(frozen=True, slots=True)
class TextEncoder:
    tokenizer: Tokenizer  # the base's, without truncation and padding
    template: Template | None  # its chat template; None if it has none
    end: int  # the token that ends a text
    longest: int  # tokens of the longest text

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, template: Template | None, end: int, limit: int | None, virtual: int
    ) -> "TextEncoder":
        """Make the encoder of a base that reads ``limit`` tokens, or any number, ``virtual`` of them an adapter's.
        Raises ConfigError: these leave no room for two tokens of a text."""
        if limit is not None and limit - virtual < 2:
            raise ConfigError(
                f"the base reads {limit} tokens, which leaves no room for a text after {virtual} virtual tokens: take "
                "fewer",
                about="num_virtual_tokens",
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, template, end, MAX_TOKENS if limit is None else min(MAX_TOKENS, limit - virtual))

    def encode(self, example: Example) -> Encoded:
        """Make tokens and targets of an example. Raises ConfigError: the chat template does not begin an answer with
        its prompt; DataError: the prompt leaves no room for a token of the text."""
        prompt, text, after = self._rendered(example)
        asked = self.tokenizer.encode(prompt, add_special_tokens=False).ids if prompt else []
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        closing = self.tokenizer.encode(after, add_special_tokens=False).ids if after else [self.end]
        ids = [*asked, *encoding.ids, *closing]
        first = max(len(asked), 1)  # the first token that is learned
        if len(ids) <= first or first >= self.longest:
            raise DataError(
                f"a prompt leaves no room for its text within {self.longest} tokens", about="example.prompt"
            )
        ids, cut = ids[: self.longest], len(ids) > self.longest
        # Offsets are in characters of the text, which its first token may begin without being learned.
        spans = encoding.offsets[first - len(asked) : len(ids) - len(asked)]
        size = len(text[spans[0][0] : spans[-1][1]].encode()) if spans else 0
        return Encoded(np.array(ids), np.array(ids[first:]), first - 1, max(size, 1), cut)

    def _rendered(self, example: Example) -> tuple[str, str, str]:
        """Render what comes before the text, the text, and what closes it: the end token where that is empty."""
        if not example.prompt or self.template is None:
            return example.prompt, example.text, ""
        asked = {"role": "user", "content": example.prompt}
        prompt = self.template([asked], True)
        whole = self.template([asked, {"role": "assistant", "content": example.text}], False)
        before, middle, after = whole.removeprefix(prompt).partition(example.text)
        if not whole.startswith(prompt) or before or not middle:
            raise ConfigError("the base's chat template changes a prompt or an answer", about="chat_template")
        return prompt, example.text, after
