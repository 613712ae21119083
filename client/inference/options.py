"""How an answer of a language model is drawn, and how it ended."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from aggregation.errors import ConfigError

MAX_STOP = 256  # characters of a stop string


@dataclass(frozen=True, slots=True)
class Options:
    """The defaults take the most likely token at every step, so that equal questions get equal answers."""

    max_tokens: int = 256  # of the answer
    temperature: float = 0.0  # 0: the most likely token; else the logits are divided by it
    top_p: float = 1.0  # draw from the fewest tokens that have this share of the probability
    top_k: int = 0  # draw from so many of the most likely tokens; 0 for all
    seed: int | None = None  # equal seeds draw equal answers; None draws anew each time
    stop: tuple[str, ...] = ()  # the answer ends before the first of these

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"an answer of {self.max_tokens} tokens is none; allow 1 at least")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 10):
            raise ConfigError(f"the temperature {self.temperature} is not between 0 and 10")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p} is no share above 0 and at most 1")
        if not 0 <= self.top_k < 2**31:
            raise ConfigError(f"top_k {self.top_k} is no number of tokens; 0 stands for all")
        if self.seed is not None and not 0 <= self.seed < 2**31:
            raise ConfigError(f"the seed {self.seed} is not between 0 and {2**31 - 1}")
        if any(not 0 < len(text) <= MAX_STOP for text in self.stop):
            raise ConfigError(f"a stop string has 1 to {MAX_STOP} characters")

    @property
    def draws(self) -> bool:
        """Whether chance has a part in the answer."""
        return self.temperature > 0

    def search(self, vocabulary: int) -> dict[str, Any]:
        """The same for onnxruntime-genai, which takes a ``top_k`` of at most the size of the vocabulary."""
        if not self.draws:
            return {"do_sample": False}
        drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        drawn["top_k"] = min(self.top_k, vocabulary)
        return drawn if self.seed is None else drawn | {"random_seed": self.seed}


class Finish(StrEnum):
    """Why an answer ended."""

    END = "end"  # the model said so
    STOP = "stop"  # a stop string came up
    LENGTH = "length"  # as many tokens as were allowed, or as fit
    INTERRUPTED = "interrupted"  # whoever read it stopped reading


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that has ended."""

    text: str
    finish: Finish
    tokens: int
    prompt_tokens: int
    reused_tokens: int  # of the prompt, that were still in the model's memory from the answer before
