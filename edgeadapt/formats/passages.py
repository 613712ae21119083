"""Passages: parts of sections of Markdown, HTML and plain text, which answer questions. What they say is data. A bundle
may have some, ``base/knowledge.jsonl``, which its vendor signed: a JSON object with ``source``, ``heading`` and
``text`` on each line."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from aggregation.errors import DataError, EdgeAdaptError
from edgeadapt.formats import storage

WORDS = 80  # of a passage: a base reads 128 tokens
MOST = 50_000  # passages
LARGEST_FILE = 2**24  # bytes
KINDS = (".md", ".markdown", ".txt", ".rst", ".html", ".htm", ".xhtml")
SILENT, BLOCKS = {"script", "style", "nav", "title"}, {"p", "li", "div", "pre", "td", "dd", "dt", "br", "tr"}


@dataclass(frozen=True, slots=True)
class Passage:
    """``source``: path of the file below the folder that was read; ``heading``: of its section, or empty; ``vendor``:
    the bundle has it, and not the device's owner."""

    source: str
    heading: str
    text: str
    vendor: bool = False

    @property
    def read(self) -> str:
        return f"{self.heading}\n{self.text}" if self.heading else self.text


class _Sections(HTMLParser):
    """Writes the text of a page as Markdown, as far as headings are concerned."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self._silent = list[str](), 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._silent += tag in SILENT
        if re.fullmatch("h[1-6]", tag):
            self.text.append("\n# ")
        elif tag in BLOCKS:
            self.text.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in SILENT and self._silent > 0
        if re.fullmatch("h[1-6]", tag):
            self.text.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.text.append(re.sub(r"\s+", " ", data))


def split(source: str, raw: bytes) -> Iterator[Passage]:
    """Split a file into passages of at most ``WORDS`` words, each of one section. Raises DataError: it is not UTF-8."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError("it is not UTF-8", about=source) from None
    if source.lower().endswith((".html", ".htm", ".xhtml")):
        page = _Sections()
        page.feed(text)
        page.close()
        text = "".join(page.text)
    heading, words = "", list[str]()
    for line in [*text.replace("\0", " ").split("\n"), "#"]:
        if title := re.match(r"\s{0,3}#{1,6}(?:\s+(.*?))?\s*#*\s*$", line):
            for first in range(0, len(words), WORDS):
                yield Passage(source, heading, " ".join(words[first : first + WORDS]))
            heading, words = " ".join((title[1] or "").split())[:200], []
        else:
            words += (word[:100] for word in line.split())


def read_folder(folder: Path) -> tuple[list[Passage], dict[str, str]]:
    """Read the files of a folder in order; links and hidden files are left out. Returns the passages, and the files
    that cannot be read with the reason. Raises DataError: there is no passage, or there are more than ``MOST``."""
    passages, odd = list[Passage](), dict[str, str]()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix.lower() not in KINDS or any(part.startswith(".") for part in name.parts) or path.is_symlink():
            continue
        try:
            passages += split(str(name), storage.read(path, LARGEST_FILE))
        except OSError as error:
            odd[str(name)] = error.strerror or str(error)
        except EdgeAdaptError as error:
            odd[str(name)] = str(error)
        if len(passages) > MOST:
            raise DataError(f"{folder} has more than {MOST} passages: index a part of it", about="DIR")
    if not passages:
        raise DataError(f"{folder} has no text in files of {', '.join(KINDS)}", about="DIR")
    return passages, odd


def encode_passages(passages: Iterable[Passage]) -> bytes:
    """Write the knowledge of a bundle. Law: ``parse_passages(encode_passages(p), path) == p`` for a vendor's ones."""
    rows = ({"source": one.source, "heading": one.heading, "text": one.text} for one in passages)
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parse_passages(raw: bytes, path: Path) -> list[Passage]:
    """Read them. Raises DataError: a line is none, or there are more than ``MOST``."""
    passages = list[Passage]()
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            row = json.loads(line)
            passages.append(Passage(**row, vendor=True))
        except (ValueError, TypeError, RecursionError):
            row = {}
        if number > MOST or not row or not all(isinstance(value, str) for value in row.values()):
            reason = f"line {number} of {path} is no passage, or one too many: copy the bundle again"
            raise DataError(reason, about=path.name)
    return passages
