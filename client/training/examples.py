"""The device's examples: a JSON-lines file that never leaves it, read with care and held in parts.

An error names the file and the line, never the text: a message is shown and logged, an example must not be.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from adapters.storage import replace
from aggregation.errors import DataError

MAX_TEXT = 2_000  # characters
MAX_FILE = 64 * 2**20  # bytes


class Split(Enum):
    """What an example is used for. ``TEST`` exists in simulations only: a real household has no second opinion."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


@dataclass(frozen=True, slots=True)
class Example:
    """A phrase and the number of its label. The text is private, so it stays out of ``repr``."""

    text: str
    label: int
    part: Split = Split.TRAIN

    def __repr__(self) -> str:
        return f"Example(<{len(self.text)} characters>, {self.label}, {self.part.value})"


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write the file atomically, readable by its owner only. ``read_examples`` gives the same examples back."""
    rows = [json.dumps({"text": e.text, "label": e.label, "part": e.part.value}) for e in examples]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, "".join(f"{row}\n" for row in rows).encode())


def read_examples(path: Path, labels: int) -> tuple[Example, ...]:
    """Every example in the file.

    Args:
        path: JSON lines with ``text``, ``label`` and, optionally, ``part``.
        labels: Number of labels; an example's label is below it.

    Raises:
        DataError: The file is missing, empty, too large, or a line is not an example.
    """
    try:
        if path.stat().st_size > MAX_FILE:
            raise DataError(f"{path} is larger than {MAX_FILE} bytes")
        # Not splitlines: JSON may hold U+2028 and other ends of lines that are none here.
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"no readable examples in {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        # From None: the decoder's own error holds all that it read.
        raise DataError(f"no readable examples in {path}: it is not UTF-8") from None
    examples = tuple(
        _example(line, f"line {number} of {path}", labels) for number, line in enumerate(lines, 1) if line.strip()
    )
    if not any(example.part is Split.TRAIN for example in examples):
        raise DataError(f"{path} holds no training example: this device has nothing to learn from")
    return examples


def part(examples: Sequence[Example], wanted: Split) -> tuple[Example, ...]:
    """The examples of one part, in file order."""
    return tuple(example for example in examples if example.part is wanted)


def _example(line: str, where: str, labels: int) -> Example:
    try:
        row: dict[str, Any] = json.loads(line)
        text, label, use = row["text"], row["label"], Split(row.get("part", "train"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        # From None: the parser's own error quotes what it read.
        raise DataError(f"{where} is not an example") from None
    if not isinstance(text, str) or not _whole(text):
        raise DataError(f"{where} has a text that is none")
    if not text.strip() or len(text) > MAX_TEXT:
        raise DataError(f"{where} has an empty text or more than {MAX_TEXT} characters")
    if type(label) is not int or not 0 <= label < labels:
        raise DataError(f"{where} has a label outside 0 … {labels - 1}")
    return Example(text, label, use)


def _whole(text: str) -> bool:
    """Whether it is text throughout: JSON can escape halves of characters, which no tokenizer reads."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
