"""The policy of a bundle, ``base/policy.json``: what may be answered, and what is said instead.

The base manifest and each shared adapter name its digest: neither opens without it, or with another one.
``client/browser/page/policy.js`` has the same rules, and ``tests/vectors/policy.json`` holds both to them.

A pattern consists of characters and classes, of which one at most varies in number: Python and JavaScript read it
alike, and match it in time linear in the text."""

import re
import unicodedata
from collections.abc import Collection, Sequence
from enum import StrEnum
from typing import Annotated, Self

from pydantic import AfterValidator, Field

from aggregation.errors import ConfigError, TrustError
from edgeadapt.formats import jsontext
from edgeadapt.formats.settings import LONGEST, Settings

PRIVATE = "*"  # stands for every private adapter in ``combine``
_IN_CLASS = r"(?:[^\\^\[\]&~|-]|\\[\\^\[\]-])"
_ATOM = rf"(?:[^\\^$.|?*+()\[\]{{}}]|\\[\\^$.|?*+()\[\]{{}}]|\[\^?(?:{_IN_CLASS}(?:-{_IN_CLASS})?)+\])"
_FIXED = rf"(?:{_ATOM}(?:\{{\d\d?\}})?)*"
_PATTERN = re.compile(rf"{_FIXED}(?:{_ATOM}(?:\?|\{{\d,\d\}}){_FIXED})?")


def _checked(pattern: str) -> str:
    reason = f"pattern {pattern!r} is not allowed: write lower-case characters, classes such as [a-z], and a number "
    try:
        if _PATTERN.fullmatch(pattern) and _lower(pattern) == pattern and not re.match(pattern, ""):
            return pattern
    except re.error:  # of the order of two numbers or letters
        pass
    raise ValueError(reason + "{3} after one; only one may vary, by ? or {0,9}, and the empty text may not match")


_MARKS = str.maketrans("", "", "⟦⟧")  # of a word, which a model does not read (edgeadapt.bases.markedwords)


def _lower(text: str) -> str:
    lower = unicodedata.normalize("NFKC", text.translate(_MARKS)).lower()
    return "".join(sign for sign in lower if sign.isspace() or unicodedata.category(sign) not in ("Cc", "Cf"))


def blocks(patterns: Sequence[str], *readings: str) -> bool:
    """Whether a pattern is in a text, however it is spelled: that is read as NFKC, in lower case, without control and
    format characters and marks of words, with one space for white space, at both ends too. ``readings``: the text, and
    where a model reads another one, also that (``edgeadapt.bases.readers.normalized``)."""
    read = [f" {' '.join(_lower(text).split())} " for text in readings] if patterns else []
    return any(re.search(pattern, text) for pattern in patterns for text in read)


class Outcome(StrEnum):
    ANSWERED = "answered"
    CONFIRM = "confirm"  # answered, and a person must agree before it is carried out
    UNSURE = "unsure"  # below the label's threshold, or an unknown text
    BLOCKED = "blocked"  # a denied label, or a pattern


Text = Annotated[str, Field(max_length=500)]
Share = Annotated[float, Field(ge=0, le=1)]
Labels = Annotated[tuple[str, ...], Field(max_length=1000)]
Pattern = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_checked)]
Patterns = Annotated[tuple[Pattern, ...], Field(max_length=64)]


class Policy(Settings):
    unsure: Text = "I am not sure what you mean."  # said instead of an answer below its threshold
    denied: Text = "I may not answer that."  # said instead of an answer that is blocked
    least: Share = 0.0  # least probability of a label that ``thresholds`` does not have
    thresholds: dict[str, Share] = Field(default_factory=dict, max_length=1000)  # label → its least probability
    deny: Labels = ()  # never answered
    confirm: Labels = ()  # answered with the outcome confirm
    input: Patterns = ()  # of texts that get no answer
    output: Patterns = ()  # of written answers that are withheld
    combine: tuple[Labels, ...] | None = None  # groups of adapters that may be combined; None: any

    def encode(self) -> bytes:
        return jsontext.encode(self.model_dump(mode="json"))

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Read what ``encode`` wrote. Raises TrustError: a key is unknown or ill-formed."""
        try:
            if len(raw) > LONGEST:
                raise ValueError(f"it has more than {LONGEST} bytes")
            return cls.parse(jsontext.decode(raw), "policy.json")
        except (ConfigError, ValueError) as error:
            raise TrustError(f"the policy cannot be read: {error}; update edgeadapt", about="policy.json") from error

    def outcome(self, readings: Sequence[str], label: str, probability: float) -> Outcome:
        """Judge a label of a text. ``readings``: as of ``blocks``."""
        if label in self.deny or blocks(self.input, *readings):
            return Outcome.BLOCKED
        if probability < self.thresholds.get(label, self.least):
            return Outcome.UNSURE
        return Outcome.CONFIRM if label in self.confirm else Outcome.ANSWERED

    def says(self, outcome: Outcome) -> str:
        """Return what is said instead of an answer; empty if there is one, or no policy."""
        return {Outcome.UNSURE: self.unsure, Outcome.BLOCKED: self.denied}.get(outcome, "")

    def check_combination(self, names: Collection[str]) -> None:
        """Check that adapters may answer as one; ``names`` has ``PRIVATE`` for a private one. Raises ConfigError."""
        if len(names) > 1 and self.combine is not None and not any({*names} <= {*group} for group in self.combine):
            reason = f"the policy of the bundle does not combine {' and '.join(names)}; use one at a time"
            raise ConfigError(reason, about="composition.policy")

    def check_labels(self, labels: Collection[str]) -> None:
        """Check that adapters have all labels of the policy: a misspelled one would be answered. Raises ConfigError."""
        if unknown := sorted({*self.deny, *self.confirm, *self.thresholds}.difference(labels)):
            raise ConfigError(f"no adapter has the label {unknown[0]!r} of the policy", about="--policy")


NO_POLICY = Policy(unsure="")
