"""The form that an answer must have: a JSON schema, a regular expression or a grammar.

onnxruntime-genai follows a guide with llguidance: before each token it excludes those after which no answer of this
form is left. A guide says what an answer looks like, not whether it is right.
"""

import json
from dataclasses import dataclass
from enum import StrEnum

from aggregation.errors import ConfigError

MAX_GUIDE = 2**16  # characters


class GuideKind(StrEnum):
    """What a guide is written in, as onnxruntime-genai calls it."""

    JSON_SCHEMA = "json_schema"  # of the keywords of JSON Schema, those that llguidance knows
    REGEX = "regex"  # of Rust's `regex`, for the whole answer; without look-around and back references
    GRAMMAR = "lark_grammar"  # llguidance's dialect of Lark


@dataclass(frozen=True, slots=True)
class Guide:
    """What an answer must look like.

    onnxruntime-genai reads ``source`` when an answer begins; ``GenerationEngine.check`` reads it before.

    Raises:
        ConfigError: ``source`` is empty, above ``MAX_GUIDE`` characters, has a NUL or is not Unicode, a regular
            expression ends in a single backslash, or a schema is not JSON.
    """

    kind: GuideKind
    source: str

    def __post_init__(self) -> None:
        if not 0 < len(self.source) <= MAX_GUIDE:
            reason = f"the {self} has {len(self.source)} characters; give 1 to {MAX_GUIDE}"
            raise ConfigError(reason, about="guide", value=len(self.source))
        if "\0" in self.source or any("\ud800" <= char <= "\udfff" for char in self.source):
            # C libraries would read it up to the NUL only.
            raise ConfigError(f"the {self} contains a character that is not text; remove it", about="guide")
        if self.kind is GuideKind.REGEX and (len(self.source) - len(self.source.rstrip("\\"))) % 2:
            raise ConfigError(f"the {self} ends in a single backslash; write two for one", about="guide")
        if self.kind is GuideKind.JSON_SCHEMA and not parses(self.source):
            raise ConfigError(f"the {self} is not JSON; correct it", about="guide")

    def __str__(self) -> str:
        """In words."""
        return {"json_schema": "JSON schema", "regex": "regular expression", "lark_grammar": "grammar"}[self.kind]

    def holds(self, text: str) -> bool:
        """Whether a finished answer can be used: what a schema describes is JSON.

        What each token may be was decided while the answer was written. This finds only a library that decides
        otherwise: it is no second check against the schema.
        """
        return self.kind is not GuideKind.JSON_SCHEMA or parses(text)


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
