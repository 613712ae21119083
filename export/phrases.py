"""Phrases with their labels, which ``export seed`` learns from and ``export adapter --calibrate`` measures on."""

from pathlib import Path

from adapters.storage import read_lines
from aggregation.errors import DataError

TAB = "\t"


def read_phrases(path: Path) -> list[tuple[str, str]]:
    """The labels and phrases in a file with one pair a line: the label, a tab, the phrase.

    Raises:
        ConfigError: There is no such file.
        DataError: A line has no tab, or nothing on one side of it; or as ``read_lines``.
    """
    pairs = []
    for number, line in enumerate(read_lines(path, "phrase"), 1):
        label, _, phrase = (part.strip() for part in line.partition(TAB))
        if not label or not phrase:
            raise DataError(
                f"phrase {number} of {path} has not the form LABEL TAB PHRASE: {line[:40]!r}",
                about=path.name,
                value=number,
            )
        pairs.append((label, phrase))
    return pairs
