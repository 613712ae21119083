"""Text of a language model or classifier: which texts are accepted, how an answer is sampled, and where it ends."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from aggregation.errors import ConfigError, DataError, check_fields
from client.inference.guide import Guide
from edgeadapt.formats.layout import Floats

MAX_TEXT = 2**16  # characters; most models accept far fewer tokens
MAX_STOP = 256  # characters of a stop string
MAX_BEAMS = 32  # limit of onnxruntime-genai; each beam needs a KV cache
MAX_PENALTY = 10.0


def checked(text: str) -> str:
    """Check that a model can read ``text``, and return it. Raises DataError: the text is empty or white space, longer
    than ``MAX_TEXT`` characters, not Unicode, or contains NUL."""
    if not text.strip():
        raise DataError("the text is empty; give a phrase", about="text")
    if len(text) > MAX_TEXT:
        reason = f"the text has {len(text)} characters, above the limit of {MAX_TEXT}; shorten it"
        raise DataError(reason, about="text")
    if "\0" in text:
        # C libraries would read the text up to the NUL only.
        raise DataError("the text contains a NUL character; remove it", about="text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError("the text is not valid Unicode; give it in UTF-8", about="text") from error
    return text


def special_tokens(tokenizer: bytes) -> tuple[str, ...]:
    added = json.loads(tokenizer).get("added_tokens", [])
    return tuple(sorted(token["content"] for token in added if token.get("special") and token["content"]))


def require_plain(text: str, special: Sequence[str], about: str) -> None:
    """Check that a text has no special token: a tokenizer recognizes them in any text, which could pose as another.
    ``special``: as ``special_tokens``; ``about``: what the text is. Raises DataError."""
    if token := next((token for token in special if token in text), None):
        raise DataError(f"the {about} contains {token!r}, a special token of the model; remove it", about=about)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an answer is sampled. By default greedily, so that equal questions get equal answers. Raises ConfigError."""

    max_tokens: int = 256  # tokens of the answer
    temperature: float = 0.0  # divides the logits; 0 takes the most likely token
    top_p: float = 1.0  # sample from the smallest set of tokens with this probability
    top_k: int = 0  # sample from the k most likely tokens; 0 for all
    seed: int | None = None  # equal seeds give equal answers; None gives a new answer each time
    stop: tuple[str, ...] = ()  # the answer ends before the first of these
    repetition_penalty: float = 1.0  # above 1, a token that occurred becomes less likely (Keskar et al. 2019)
    beams: int = 1  # answers that are searched at once for the most likely one; above 1, it comes as one piece
    guide: Guide | None = None  # what the answer must look like

    def __post_init__(self) -> None:
        ranges = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 10, "between 0 and 10"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", 0 <= self.top_k < 2**31, f"between 0 and {2**31 - 1}; 0 stands for all tokens"),
            ("seed", self.seed is None or 0 <= self.seed < 2**31, f"between 0 and {2**31 - 1}"),
            (
                "repetition_penalty",
                0 < self.repetition_penalty <= MAX_PENALTY,
                f"above 0 and at most {MAX_PENALTY:g}; 1 changes nothing",
            ),
            ("beams", 1 <= self.beams <= MAX_BEAMS, f"between 1 and {MAX_BEAMS}"),
        )
        check_fields(self, "", ranges)
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP:
                reason = f"a stop string of {len(text)} characters is not between 1 and {MAX_STOP} characters long"
                raise ConfigError(reason, about="stop")
        if self.beams > 1 and self.temperature > 0:
            reason = "beams search for the most likely answer, and a temperature samples; leave one of them out"
            raise ConfigError(reason, about="beams")
        if self.guide is not None and (self.beams > 1 or self.stop):
            reason = f"a {self.guide} excludes beams and stop strings, which could cut it; leave one of them out"
            raise ConfigError(reason, about="guide")

    def sample(self, logits: Floats, rng: np.random.Generator) -> int:
        """Sample the next token from finite logits, or some of minus infinity, shape ``(vocabulary,)``; without beams
        and penalty."""
        if self.temperature == 0:
            return int(logits.argmax())
        weights = np.exp((logits - logits.max()).astype(np.float64) / self.temperature)
        order = np.flatnonzero(weights >= (1 - self.top_p) * weights.mean())  # the rest is less than 1 - top_p
        if self.top_k or self.top_p < 1:
            order = order[np.argsort(-weights[order], kind="stable")][: self.top_k or None]
        total = np.cumsum(weights[order])
        kept = total[: np.searchsorted(total, self.top_p * total[-1]) + 1]
        return int(order[np.searchsorted(kept, rng.random() * kept[-1], side="right")])

    @property
    def reusable(self) -> bool:
        """Whether one generator of onnxruntime-genai can write several such answers. A seed fixes its random numbers
        from the start, and beams have a KV cache each."""
        return self.seed is None and self.beams == 1

    def search_options(self, vocabulary: int) -> dict[str, Any]:
        """Make the parameters for onnxruntime-genai, which refuses a ``top_k`` above the size of the vocabulary."""
        options: dict[str, Any] = {"repetition_penalty": self.repetition_penalty, "num_beams": self.beams}
        if self.temperature == 0:
            return options | {"do_sample": False}
        options |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        options["top_k"] = min(self.top_k, vocabulary)
        return options if self.seed is None else options | {"random_seed": self.seed}


class Finish(StrEnum):
    END = "end"  # the model ended it
    STOP = "stop"  # a stop string
    LENGTH = "length"  # ``max_tokens``, or the end of the context
    INTERRUPTED = "interrupted"  # the caller stopped reading
    BLOCKED = "blocked"  # the policy of the bundle withholds it


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    finish: Finish
    tokens: int
    prompt_tokens: int
    reused_tokens: int  # tokens of the prompt, found in the KV cache
    guide: Guide | None = None

    @property
    def valid(self) -> bool:
        """Whether it has the form of its guide: an answer that was cut does not, and without a guide any does."""
        return self.guide is None or (self.finish is Finish.END and self.guide.holds(self.text))


class Detokenizer:
    def __init__(self, tokenizer: bytes) -> None:
        stated = json.loads(tokenizer)
        vocabulary, added = stated["model"]["vocab"], stated.get("added_tokens", [])
        self.pieces = (
            {token: piece for piece, token in vocabulary.items()}
            if isinstance(vocabulary, dict)
            else {token: piece for token, (piece, _) in enumerate(vocabulary)}  # Unigram models store pairs
        )
        self.pieces |= {token["id"]: "" if token["special"] else token["content"] for token in added}
        # The library's whole tokenizer would take some 30 MB with SmolLM2's vocabulary.
        bare = stated | {
            "model": {"type": "BPE", "vocab": {}, "merges": []},
            "added_tokens": [],
            "post_processor": None,
        }
        self.tokenizer = Tokenizer.from_str(json.dumps(bare))  # without its vocabulary
        decoder = self.tokenizer.decoder
        self.decode: Callable[[list[str]], str] = decoder.decode if decoder else " ".join


class TextDecoder:
    """Decodes tokens that come one by one, without a character at its end that is not complete yet.

    Law: with a byte-level tokenizer, the pieces together are what the tokenizers library decodes at once, without ``�``
    at the end. Bytes that are not a character become ``�``, and the letters after them stay. With byte fallback, the
    library makes ``�`` also of the characters right before such bytes, which here were already emitted."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        """Begin after a point: a decoder may strip the beginning of a text, and an answer is not one."""
        self._texts = detokenizer
        self._pieces = ["."]
        self._before = self._written = 1  # numbers of pieces and letters that were emitted

    def decode(self, token: int) -> str:
        """Take the next token; return the text that it completes. Special tokens have none."""
        if not (piece := self._texts.pieces.get(token, "")):
            return ""
        self._pieces.append(piece)
        text = self._texts.decode(self._pieces)
        completed = text.rstrip("\ufffd")[self._written :]
        self._written += len(completed)
        if completed and self._written == len(text):  # only the last emitted pieces may matter from here
            del self._pieces[: self._before]
            self._before, self._written = len(self._pieces), len(self._texts.decode(self._pieces))
        return completed


@dataclass(slots=True)
class StopFilter:
    """Cuts a stream of text before the first stop string, and never emits part of one.

    Law: ``feed`` and ``rest`` together return the text up to the first stop string, however it is cut into pieces.

    >>> stops = StopFilter(("STOP",))
    >>> [stops.feed(piece) for piece in ("one S", "T", "OP two")], stops.hit
    (['one ', '', ''], 'STOP')
    """

    strings: tuple[str, ...]  # not empty
    hit: str | None = None  # the stop string that ended the text
    _held: str = field(default="", repr=False)  # may be the beginning of a stop string

    def feed(self, piece: str) -> str:
        """Take the next piece; return the text that certainly precedes any stop string, or "" after a hit."""
        if self.hit is not None:
            return ""
        text = self._held + piece
        hits = [(at, string) for string in self.strings if (at := text.find(string)) >= 0]
        if hits:
            end, self.hit = min(hits)
            self._held = ""
        else:
            end = len(text) - self._overlap(text)
            self._held = text[end:]
        return text[:end]

    def rest(self) -> str:
        held, self._held = self._held, ""
        return held

    def _overlap(self, text: str) -> int:
        """Measure the longest suffix of ``text`` that begins a stop string."""
        longest = max((len(string) for string in self.strings), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((n for n in sizes if any(s.startswith(text[-n:]) for s in self.strings)), 0)
