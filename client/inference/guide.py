"""The form that an answer must have: a JSON schema, a regular expression or a grammar. A guide is followed with
llguidance: before each token it excludes those after which no answer of this form is left. A guide decides the form of
an answer, not whether it is right."""

import importlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from aggregation.errors import ConfigError, DataError

MAX_GUIDE = 2**16  # characters


class GuideKind(StrEnum):
    JSON_SCHEMA = "json_schema"  # of the keywords of JSON Schema, those that llguidance knows
    REGEX = "regex"  # of Rust's `regex`, for the whole answer; ``\\d`` is ``[0-9]``; no look-around, no back references
    GRAMMAR = "lark_grammar"  # llguidance's dialect of Lark


@dataclass(frozen=True, slots=True)
class Guide:
    """What an answer must look like. ``GuideFollower.begin`` reads ``source`` when an answer begins;
    ``GenerationEngine.check`` reads it before. Raises ConfigError: ``source`` is empty, above ``MAX_GUIDE`` characters,
    has a NUL or is not Unicode, a regular expression ends in a single backslash, or a schema is not JSON."""

    kind: GuideKind
    source: str

    def __post_init__(self) -> None:
        if not 0 < len(self.source) <= MAX_GUIDE:
            reason = f"the {self} has {len(self.source)} characters; give 1 to {MAX_GUIDE}"
            raise ConfigError(reason, about="guide")
        if "\0" in self.source or any("\ud800" <= char <= "\udfff" for char in self.source):
            # C libraries would read it up to the NUL only.
            raise ConfigError(f"the {self} contains a character that is not text; remove it", about="guide")
        if self.kind is GuideKind.REGEX and (len(self.source) - len(self.source.rstrip("\\"))) % 2:
            raise ConfigError(f"the {self} ends in a single backslash; write two for one", about="guide")
        if self.kind is GuideKind.JSON_SCHEMA and not parses(self.source):
            raise ConfigError(f"the {self} is not JSON; correct it", about="guide")

    def __str__(self) -> str:
        return {"json_schema": "JSON schema", "regex": "regular expression", "lark_grammar": "grammar"}[self.kind]

    @property
    def letters(self) -> str:
        spelled = self.source
        if self.kind is GuideKind.JSON_SCHEMA:
            spelled = json.dumps(json.loads(spelled), ensure_ascii=False)
        return "".join(char for char in spelled if not char.isascii())

    def holds(self, text: str) -> bool:
        """Whether a finished answer can be used: what a schema describes is JSON. What each token may be was decided
        while the answer was written. This finds only a library that decides otherwise: it is not a second check against
        the schema."""
        return self.kind is not GuideKind.JSON_SCHEMA or parses(text)


class GuideFollower:
    def __init__(self, tokenizer: bytes, vocabulary: int, ends: Collection[int]) -> None:
        """Read a tokenizer.json, which takes up to a second. Its tokens have bytes: it is byte-level, or falls back to
        bytes. ``vocabulary``: the number of logits. ``ends``: the tokens that end an answer. Raises ConfigError:
        llguidance is not installed, or the tokens have no bytes."""
        self._llguidance = required("llguidance")
        read = Tokenizer.from_str(tokenizer.decode())
        read.no_padding()
        read.no_truncation()
        try:
            self._tokenizer = self._llguidance.LLTokenizer(read.to_str(), n_vocab=vocabulary, eos_token=sorted(ends))
        except ValueError as error:
            reason = (
                f"a guide needs the bytes of the model's tokens, which its tokenizer does not state ({_line(error)})"
            )
            raise ConfigError(f"{reason}; ask without a guide", about="guide") from error

    def begin(self, guide: Guide) -> "GuidedAnswer":
        """Begin an answer. Raises ConfigError: llguidance cannot read the guide, or it contains a letter that the model
        cannot write."""
        matcher = self._llguidance.LLMatcher
        try:
            if guide.kind is GuideKind.JSON_SCHEMA:
                grammar = matcher.grammar_from_json_schema(guide.source)
            elif guide.kind is GuideKind.REGEX:
                grammar = f"start: /{self._llguidance.regex_to_lark(guide.source, 'd')}/"
            else:
                grammar = guide.source
        except ValueError as error:
            raise _unreadable(guide, str(error)) from error
        limits = self._llguidance.LLParserLimits(verbose_errors=False)
        state = matcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if state.is_error():
            raise _unreadable(guide, state.get_error())
        for char in sorted(set(guide.letters)):
            if self._tokenizer.decode_bytes(self._tokenizer.tokenize_str(char)) != char.encode():
                raise ConfigError(
                    f"the {guide} contains {char!r}, which this model cannot write; leave it out", about="guide"
                )
        return GuidedAnswer(guide, state)


class GuidedAnswer:
    def __init__(self, guide: Guide, state: Any) -> None:
        self._guide, self._state = guide, state

    def allowed(self) -> NDArray[np.bool_]:
        """Whether each token may be next. Raises DataError if none may, or the guide has too many states."""
        mask = np.frombuffer(self._state.compute_logit_bias(), np.uint8) > 0
        if self._state.is_error():
            reason = f"the model cannot go on by the {self._guide} ({_line(self._state.get_error())}); simplify it"
            raise DataError(reason, about="guide")
        return mask

    def append(self, token: int) -> None:
        self._state.consume_token(token)


def required(library: str) -> Any:
    """Import a library of an extra that a device which only classifies lacks. Raises ConfigError without it."""
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        name = library.replace("_", "-")
        reason = f"{name} is not installed; install it with: pip install 'edgeadapt[generate]'"
        raise ConfigError(reason, about=name) from error


def _unreadable(guide: Guide, why: str) -> ConfigError:
    return ConfigError(f"the {guide} cannot be followed ({_line(why)}); correct or simplify it", about="guide")


def _line(error: object) -> str:
    return " ".join(str(error).removesuffix("<non-verbose/>").split())[:200]


def parses(text: str) -> bool:
    """Whether a text is JSON (RFC 8259).

    >>> parses('{"intent": "on"}'), parses('{"intent": "o'), parses("NaN")
    (True, False, False)
    """
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(name: str) -> None:
    raise ValueError(name)
