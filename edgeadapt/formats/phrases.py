"""Phrases with their labels, one pair a line: what an exporter learns from or measures on, and what a device is taught.
A message names the line, and not the phrase: what a device is taught is private."""

from collections.abc import Iterable
from pathlib import Path

from aggregation.errors import DataError
from edgeadapt.formats.storage import LONGEST_LIST, read_lines

TAB = "\t"


def read_phrases(path: Path) -> list[tuple[str, str]]:
    """Read one pair a line: the label, a tab, the phrase. Raises DataError if one of these is missing; or as
    ``read_lines``."""
    return _pairs(read_lines(path, "phrase"), path)


def parse_phrases(raw: bytes, path: Path) -> list[tuple[str, str]]:
    """Parse the content of such a file. Raises DataError as ``read_phrases``; there may be no pair."""
    if len(raw) > LONGEST_LIST:
        reason = f"{path} has {len(raw)} bytes, above the limit of {LONGEST_LIST}: use a bundle with fewer phrases"
        raise DataError(reason, about=path.name)
    try:
        lines = raw.decode().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8", about=path.name) from error
    return _pairs([line for line in lines if line.strip()], path)


def encode_phrases(pairs: Iterable[tuple[str, str]]) -> bytes:
    """Write the content of such a file. Law: ``parse_phrases(encode_phrases(pairs), path) == pairs``. Labels and
    phrases are not empty; each pair becomes one line, with one space for each run of white space."""
    return "".join(f"{_line(label)}{TAB}{_line(phrase)}\n" for label, phrase in pairs).encode()


def _line(text: str) -> str:
    return " ".join(text.split())


def _pairs(lines: Iterable[str], path: Path) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(lines, 1):
        label, _, phrase = (part.strip() for part in line.partition(TAB))
        if not label or not phrase:
            reason = f"phrase {number} of {path} does not have the form LABEL TAB PHRASE"
            raise DataError(reason, about=path.name)
        pairs.append((label, phrase))
    return pairs
