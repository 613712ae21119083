"""Passages of a person's files, found by their words and by their meaning: what own notes say about a question.

::

    learned/passages.sealed    the index, encrypted with learned/sealing.key

A passage is a part of a section of Markdown, HTML or plain text. Words are ranked by BM25 (Robertson and Zaragoza
2009), meaning by embeddings of the bundle's frozen base in eight bits; both rankings are added by reciprocal ranks
(Cormack et al. 2009). What a passage says is data: nothing here follows it.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from aggregation import sealed, wire
from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError
from client.inference.usage import LEARNED, sealing_key
from edgeadapt.formats import storage
from edgeadapt.formats.layout import Floats

PASSAGES = "passages.sealed"
WORDS = 80  # of a passage: a base reads 128 tokens
MOST = 50_000  # passages
LARGEST_FILE, LARGEST = 2**24, 2**28  # bytes of a file, and of the index
KINDS = (".md", ".markdown", ".txt", ".rst", ".html", ".htm", ".xhtml")
NUMBERS = {"vectors": "i1", "scales": "<f4", "starts": "<i8", "places": "<i4", "weights": "<f4"}  # of an index
K1, B, RANKS, CANDIDATES = 1.2, 0.75, 60, 100  # the constants of both papers; each ranking gives so many candidates
SILENT, BLOCKS = {"script", "style", "nav", "title"}, {"p", "li", "div", "pre", "td", "dd", "dt", "br", "tr"}
QUOTED = "Text from files, which may help to answer the question below it:"
Embed = Callable[[Sequence[str]], Floats]  # texts → shape ``(texts, hidden)``, each of L2 norm 1


@dataclass(frozen=True, slots=True)
class Passage:
    """``source``: path of the file below the folder that was indexed; ``heading``: of its section, or empty."""

    source: str
    heading: str
    text: str

    @property
    def read(self) -> str:
        """What is embedded and searched."""
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
    """Read the files of a folder in order; links and hidden files are left out.

    Returns the passages, and the files that cannot be read with the reason. Raises DataError: there is no passage, or
    there are more than ``MOST``.
    """
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


_BLOBS = wire.mapping(wire.text("[a-z]+"), wire.blob(LARGEST), len(NUMBERS))


@dataclass(frozen=True, slots=True)
class _Record(sealed.SealedRecord):
    MAGIC: ClassVar[bytes] = b"edgeadapt/passages/1\x00"

    base: Annotated[str, wire.text("[0-9a-f]{64}")]  # digest of the base that embedded the passages
    texts: Annotated[bytes, wire.blob(LARGEST)] = field(repr=False)  # JSON: the passages and the words
    numbers: Annotated[Mapping[str, bytes], wire.mapping(wire.text("[a-z]+"), wire.blob(LARGEST), 8)] = field(
        repr=False
    )


@dataclass(frozen=True, slots=True)
class PassageIndex:
    """Passages, their embeddings, and where each word occurs."""

    passages: tuple[Passage, ...]
    words: dict[str, int]  # word → its number
    vectors: NDArray[np.int8]  # shape ``(passages, hidden)``: the embeddings, each divided by its scale
    scales: NDArray[np.float32]
    starts: NDArray[np.int64]  # shape ``(words + 1,)``: where a word's passages begin
    places: NDArray[np.int32]  # the passages of each word
    weights: NDArray[np.float32]  # of the word in each of them, by BM25
    _meaning: Floats = field(init=False, repr=False, compare=False)  # the embeddings: 77 MB for 50,000 passages

    def __post_init__(self) -> None:
        object.__setattr__(self, "_meaning", self.vectors * self.scales[:, None])

    @property
    def embedded(self) -> dict[str, Floats]:
        return {one.read: vector for one, vector in zip(self.passages, self._meaning, strict=True)}

    @classmethod
    def of(cls, passages: Sequence[Passage], embed: Embed, before: "PassageIndex | None" = None) -> Self:
        """Index passages. Those that ``before``, of the same base, has are not embedded again."""
        known = before.embedded if before else {}
        new = list(dict.fromkeys(one.read for one in passages if one.read not in known))
        known |= dict(zip(new, embed(new), strict=True)) if new else {}
        vectors = np.stack([known[one.read] for one in passages])
        scales = np.maximum(np.abs(vectors).max(axis=1, keepdims=True), np.float32(1e-12)) / np.float32(127)
        counts = [Counter(words_of(one.read)) for one in passages]
        lengths = np.array([sum(count.values()) for count in counts], np.float64)
        occurs: dict[str, list[tuple[int, int]]] = {}
        for place, count in enumerate(counts):
            for word, often in count.items():
                occurs.setdefault(word, []).append((place, often))
        starts = np.cumsum([0, *map(len, occurs.values())], dtype=np.int64)
        placed, times = np.array([pair for pairs in occurs.values() for pair in pairs], np.int64).reshape(-1, 2).T
        share = np.diff(starts)
        rare = np.repeat(np.log1p((len(passages) - share + 0.5) / (share + 0.5)), share)
        longer = K1 * (1 - B + B * lengths[placed] / max(lengths.mean(), 1.0))
        weights = (rare * times * (K1 + 1) / (times + longer)).astype(np.float32)
        numbers = {word: number for number, word in enumerate(occurs)}
        rounded = np.rint(vectors / scales).astype(np.int8)
        return cls(tuple(passages), numbers, rounded, scales[:, 0], starts, placed.astype(np.int32), weights)

    def search(self, text: str, meaning: Floats, top: int) -> list[Passage]:
        """Find the best ``top`` passages, the best first. ``meaning``: embedding of ``text``, shape ``(hidden,)``."""
        by_word = np.zeros(len(self.passages), np.float32)
        for word in set(words_of(text)):
            if (number := self.words.get(word)) is not None:
                run = slice(self.starts[number], self.starts[number + 1])
                by_word[self.places[run]] += self.weights[run]
        by_meaning = self._meaning @ meaning
        score: dict[int, float] = {}
        for ranking in (by_word, by_meaning):
            best = np.argsort(-ranking, kind="stable")[:CANDIDATES]
            for rank, place in enumerate(best[ranking[best] > 0].tolist(), 1):
                score[place] = score.get(place, 0.0) + 1 / (RANKS + rank)
        order = sorted(score, key=lambda place: (-score[place], place))
        return [self.passages[place] for place in order[:top]]

    def write(self, bundle: Path, base: str) -> None:
        """Encrypt it next to a bundle whose base has the digest ``base``."""
        folder = folder_of(bundle)
        folder.mkdir(mode=storage.PRIVATE_FOLDER, exist_ok=True)
        texts = {"passages": [asdict(one) for one in self.passages], "words": list(self.words)}
        raw = json.dumps(texts, ensure_ascii=False).encode("utf-8", "replace")
        numbers = {name: getattr(self, name).astype(kind).tobytes() for name, kind in NUMBERS.items()}
        storage.replace(folder / PASSAGES, _Record(base, raw, numbers).seal(sealing_key(folder)))

    @classmethod
    def read(cls, bundle: Path, base: str) -> Self | None:
        """Read the index of a bundle; None: there is none by this base. Raises TrustError: it is damaged."""
        path = folder_of(bundle) / PASSAGES
        if not path.exists():
            return None
        try:
            record = _Record.open(storage.read(path, LARGEST), sealing_key(path.parent))
        except (EdgeAdaptError, ValueError) as error:
            raise TrustError(f"{path} is damaged: index the files again", about=PASSAGES) from error
        if record.base != base:
            return None
        texts = json.loads(record.texts)
        words = {word: number for number, word in enumerate(texts["words"])}
        vectors, *numbers = (np.frombuffer(record.numbers[name], kind) for name, kind in NUMBERS.items())
        passages = tuple(Passage(**one) for one in texts["passages"])
        return cls(passages, words, vectors.reshape(len(passages), -1), *numbers)

    @classmethod
    def require(cls, bundle: Path, base: str) -> Self:
        """Read it. Raises ConfigError: nothing was indexed for this base; TrustError as ``read``."""
        if index := cls.read(bundle, base):
            return index
        reason = f"no files are indexed for {bundle}: edgeadapt device index DIR --bundle {bundle}"
        raise ConfigError(reason, about="index")

    @classmethod
    def forget(cls, bundle: Path, base: str, erased: Callable[[str], bool]) -> None:
        """Delete the index of a bundle if ``erased`` is true of a passage, or it cannot be read."""
        with suppress(TrustError):
            index = cls.read(bundle, base)
            if index and not any(erased(one.read) for one in index.passages):
                return
        (folder_of(bundle) / PASSAGES).unlink(missing_ok=True)


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def folder_of(bundle: Path) -> Path:
    return storage.real(bundle).parent / LEARNED


def quoted(passages: Iterable[Passage]) -> str:
    """Quote passages for a language model, with numbers by which an answer can name them."""
    numbered = (f"[{number}] {' '.join(one.read.split())}" for number, one in enumerate(passages, 1))
    return "\n".join([QUOTED, *numbered])
