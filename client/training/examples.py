"""The device's examples: a JSON-lines file that never leaves the device, and an adapter's score on them. An error names
the file and the line, never the text: errors are shown and logged, and examples are private."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced
from enum import Enum
from pathlib import Path
from typing import Any

from aggregation.errors import DataError
from edgeadapt.bases.markedwords import unmarked
from edgeadapt.bases.media import MARK, MAX_MEDIUM, MAX_SOURCE, is_medium, variants
from edgeadapt.bases.readers import COLUMNS
from edgeadapt.bases.tasks import Target, label_text
from edgeadapt.formats.storage import read, replace
from edgeadapt.rounds.task import MAX_LOSS

MAX_TEXT = 2_000  # characters; of a picture ``MAX_PICTURE``
MAX_FILE = 64 * 2**20  # bytes
NO_LABEL = -1
TargetOf = Callable[[str], Target]


class Split(Enum):
    """The use of an example. ``TEST`` exists only in simulations, which know the right label of every phrase."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


@dataclass(frozen=True, slots=True)
class Example:
    """A text, with the number of its label, its target in a task of others, or the prompt that it answers. ``repr``
    does not show them."""

    text: str
    label: int = NO_LABEL  # ``NO_LABEL`` for a language model
    split: Split = Split.TRAIN
    prompt: str = ""  # what comes before the text, for a language model; it is not learned
    target: Target = ()  # what a task of others made of the label; empty: ``label`` counts

    def __repr__(self) -> str:
        return f"Example(<{len(self.text)} characters>, {self.label}, {self.split.value})"


@dataclass(frozen=True, slots=True)
class Score:
    """An adapter's score on some examples.

    A language model's ``correct`` adds up the shares of tokens that it would have written, and ``loss`` the nats for
    each byte. A task of others adds up its scores and losses.

    >>> Score(correct=3, count=4, loss=1.5).accuracy
    0.75
    """

    correct: float  # examples whose most probable label is right
    count: int
    loss: float  # sum of the examples' cross-entropies in nats, each at most ``edgeadapt.rounds.task.MAX_LOSS``

    @classmethod
    def worst(cls, count: int) -> "Score":
        """Score where no answer could be computed: all of them wrong."""
        return cls(0, count, MAX_LOSS * count)

    @property
    def accuracy(self) -> float:
        return self.correct / self.count if self.count else float("nan")


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write the file atomically, readable by its owner only. Law: ``read_examples`` returns the same examples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, encode_examples(examples))


def encode_examples(examples: Iterable[Example]) -> bytes:
    """Encode the content of a file. Law: ``parse_examples`` returns the same examples."""
    lines = [json.dumps(_row(example)) for example in examples]
    return "".join(f"{line}\n" for line in lines).encode()


def read_examples(path: Path, labels: int) -> tuple[Example, ...]:
    """Read all examples in the file. Raises DataError as ``parse_examples`` and ``read_file``."""
    return parse_examples(read_file(path), path, labels)


def read_file(path: Path) -> bytes:
    """Read an examples file, and the pictures that its lines name: ``image``, a path from the file, becomes ``text``.
    Raises DataError if it is missing, not a file, or above ``MAX_FILE`` bytes, with pictures as well; or a picture is
    missing or damaged."""
    try:
        raw = read(path, MAX_FILE)
    except DataError as error:
        raise DataError(str(error), about="examples") from None
    except OSError as error:
        raise DataError(f"cannot read the examples in {path}: {error.strerror}", about="examples") from error
    if not any(f'"{column}"'.encode() in raw for column in COLUMNS):
        return raw
    lines, size = [], 0
    for number, line in enumerate(raw.split(b"\n"), 1):
        lines.append(_with_file(line, path, number))
        if (size := size + len(lines[-1]) + 1) > MAX_FILE:
            raise DataError(f"with its files, {path} has more than {MAX_FILE} bytes: shorten it", about="examples")
    return b"\n".join(lines)


def _with_file(line: bytes, path: Path, number: int) -> bytes:
    try:
        row = json.loads(line)
        (column,) = COLUMNS.keys() & row.keys()
        name = row.pop(column)
        if "text" in row or not isinstance(name, str):
            return line
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return line  # ``parse_examples`` refuses it if it is no example
    try:
        row["text"] = COLUMNS[column].of_file(read(path.parent / name, MAX_SOURCE))
    except (DataError, OSError) as error:
        reason = f"{error.strerror if isinstance(error, OSError) else error} (line {number} of {path})"
        raise DataError(f"cannot read a {COLUMNS[column].noun}: {reason}", about=f"example.{column}") from None
    return json.dumps(row).encode()


def parse_examples(
    raw: bytes, path: Path, labels: int | None = None, target: TargetOf | None = None
) -> tuple[Example, ...]:
    """Parse the content of a file.

    Args:
        raw: JSON lines with ``text``, which may be a file (``edgeadapt.bases.media``), ``label`` and, optionally,
            ``split`` (default ``train``), in UTF-8, also after a byte order mark. For a language model with ``text``
            and, optionally, ``prompt`` and ``split``.
        path: Of the file, for messages.
        labels: The number of labels; every example's label must be below it. None: any label is accepted. 0: for a
            language model, a label is neither needed nor read.
        target: Of a task of others: makes the target of a line's label, unless the line has a ``target``. The target of
            a label that the task refuses is empty.

    Raises DataError: it is not UTF-8, a line is not an example, or there is no training example."""
    try:
        # Not splitlines: JSON strings may contain U+2028 and other line separators.
        lines = raw.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        # From None: the decoder's error contains the text.
        raise DataError(f"{path} is not UTF-8; convert it", about="examples") from None
    examples = tuple(
        _example(line, f"line {number} of {path}", labels, target)
        for number, line in enumerate(lines, 1)
        if line.strip()
    )
    if not any(example.split is Split.TRAIN for example in examples):
        raise DataError(f"{path} has no training example; add some to take part", about="examples.split")
    return examples


def longest(text: str) -> int:
    """Return the most characters of such a text: a picture or sound may have more."""
    return MAX_MEDIUM if is_medium(text) else MAX_TEXT


def in_split(examples: Sequence[Example], split: Split) -> tuple[Example, ...]:
    return tuple(example for example in examples if example.split is split)


def with_variants(examples: Sequence[Example], count: int) -> list[Example]:
    """Add ``count`` variants of each picture and sound that is a training example; the others choose and count."""
    of = [variants(one.text, count) if one.split is Split.TRAIN else [] for one in examples]
    pairs = zip(examples, of, strict=True)
    return [each for one, texts in pairs for each in (one, *(replaced(one, text=text) for text in texts))]


def _example(line: str, where: str, labels: int | None, target: TargetOf | None) -> Example:
    try:
        row: dict[str, Any] = json.loads(line)
        label = NO_LABEL if labels == 0 or "target" in row else row["label"]
        text, prompt, split = row["text"], row.get("prompt", ""), Split(row.get("split", "train"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        # From None: the parser's error quotes the line.
        keys = '{"text": …}' if labels == 0 else '{"text": …, "label": …}'
        raise DataError(f"{where} is not an object {keys}", about="example") from None
    for name, value in (("text", text), ("prompt", prompt)):
        if not isinstance(value, str) or any("\ud800" <= char <= "\udfff" for char in value):
            # JSON can escape a lone surrogate, which no tokenizer reads.
            raise DataError(f"the {name} in {where} is not a string of Unicode", about=f"example.{name}")
        if len(unmarked(value)) > longest(value) or (value is text and not value.strip()):
            reason = f"the {name} in {where} is empty or longer than {longest(value)} characters"
            raise DataError(reason, about=f"example.{name}")
    if is_medium(text) and MARK in text:
        raise DataError(f"the text in {where} is a variant, which a device makes itself", about="example.text")
    if labels == 0:
        return Example(text, NO_LABEL, split, prompt)
    if target is not None:
        return Example(text, NO_LABEL, split, target=_target(row, where, target))
    if type(label) is not int or label < 0 or (labels is not None and label >= labels):
        highest = "on" if labels is None else f"to {labels - 1}"
        raise DataError(f"the label in {where} is not an integer from 0 {highest}", about="example.label")
    return Example(text, label, split)


def _target(row: dict[str, Any], where: str, target: TargetOf) -> Target:
    if "target" not in row:
        try:
            return target(label_text(row["label"]))
        except ValueError:
            return ()
    try:
        known = tuple(map(float, row["target"])) if isinstance(row["target"], list) else ()
    except (OverflowError, TypeError, ValueError):
        known = ()
    if not known or not all(map(math.isfinite, known)):
        raise DataError(f"the target in {where} is not a list of finite numbers", about="example.target")
    return known


def _row(example: Example) -> dict[str, Any]:
    row: dict[str, Any] = {"text": example.text, "split": example.split.value}
    if example.label != NO_LABEL:
        row["label"] = example.label
    if example.target:
        row["target"] = list(example.target)
    return row | ({"prompt": example.prompt} if example.prompt else {})
