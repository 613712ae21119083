"""Passages: parts of sections of Markdown, HTML and plain text, which answer questions. What they say is data. A bundle
may have some, ``base/knowledge.jsonl``, which its vendor signed: a JSON object with ``source``, ``heading`` and
``text`` on each line."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path

from aggregation.errors import DataError, EdgeAdaptError
from edgeadapt.formats import storage

WORDS = 80  # of a passage: a base reads 128 tokens
MOST = 50_000  # passages
LARGEST_FILE = 2**24  # bytes
KINDS = (".md", ".markdown", ".txt", ".rst", ".html", ".htm", ".xhtml")
SILENT, BLOCKS = {"script", "style", "nav", "title"}, {"p", "li", "div", "pre", "td", "dd", "dt", "br", "tr"}
HEADINGS = {f"h{level}" for level in range(1, 7)}
RAW = {tag: re.compile(rf"</{tag}(?=[\s/>])", re.IGNORECASE | re.ASCII) for tag in ("script", "style")}  # have no tags
# No pattern gives back what it has matched: each is linear.
_SPACES = re.compile(r"\s++")
_LARGE_NUMBER = re.compile("&#[0-9]{8,}+;?")  # of no character; ``unescape`` fails at one of 4,301 digits
_MARKUP = re.compile("<(?=[A-Za-z!?/])")
_NAME = re.compile(r"<(/?)([A-Za-z][^\s/>]*+)")
_ATTRIBUTES = re.compile(r"""(?:[^>=]++|=\s*+(?:"[^"]*+"|'[^']*+'|(?!["'])[^\s>]*+))*+>""")
_OTHER, _CLOSED = {"<!--": re.compile("--!?>"), "<![CDATA[": re.compile("]]>")}, re.compile(">")


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


def split(source: str, raw: bytes) -> Iterator[Passage]:
    """Split a file into passages of at most ``WORDS`` words, each of one section. Takes time linear in the file, which
    may be hostile. Raises DataError: it is not UTF-8."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError("it is not UTF-8", about=source) from None
    if source.lower().endswith((".html", ".htm", ".xhtml")):
        text = _as_markdown(text)
    heading, words = "", list[str]()
    for line in [*text.replace("\0", " ").split("\n"), "#"]:
        if (title := _title(line)) is not None:
            for first in range(0, len(words), WORDS):
                yield Passage(source, heading, " ".join(words[first : first + WORDS]))
            heading, words = " ".join(title.split())[:200], []
        else:
            words += (word[:100] for word in line.split())


def _title(line: str) -> str | None:
    """Return what a heading of Markdown says (CommonMark 4.2); None for another line."""
    begun = line.lstrip()
    title = begun.lstrip("#")
    if not 0 <= len(line) - len(begun) <= 3 or begun == title:
        return None
    if title.strip() and (len(begun) - len(title) > 6 or not title[0].isspace()):
        return None
    bare = title.rstrip().rstrip("#")
    return bare if not bare or bare[-1].isspace() else title  # a heading about C# keeps its sign


def _as_markdown(page: str) -> str:
    """Write the text of a page as Markdown, as far as headings are concerned.

    Markup ends where the HTML standard ends it (13.2.5); if it does not end, the rest of the page belongs to it, as in
    a browser. So nothing is read twice. ``html.parser`` looks for the end of each unfinished tag again, in time
    quadratic in the page."""
    written, silent, at = list[str](), 0, 0
    while at < len(page):
        markup = _MARKUP.search(page, at)
        begin = markup.start() if markup else len(page)
        if begin > at and not silent:
            written.append(_SPACES.sub(" ", unescape(_LARGE_NUMBER.sub("\ufffd", page[at:begin]))))
        if name := _NAME.match(page, begin):
            at = _end(_ATTRIBUTES.match(page, name.end()), page)
            tag, closing, whole = name[2].lower(), bool(name[1]), page.endswith("/>", begin, at)
            if tag in SILENT and not whole:
                silent = max(0, silent - 1) if closing else silent + 1
            if tag in HEADINGS or (tag in BLOCKS and not closing):
                written.append("\n# " if tag in HEADINGS and not closing else "\n")
            if tag in RAW and not closing and not whole:
                found = RAW[tag].search(page, at)
                at = found.start() if found else len(page)
        else:
            end = next((end for start, end in _OTHER.items() if page.startswith(start, begin)), _CLOSED)
            at = _end(end.search(page, begin + 2), page)
    return "".join(written)


def _end(found: re.Match[str] | None, page: str) -> int:
    return found.end() if found else len(page)


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
