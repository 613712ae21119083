"""Passages of a person's files and of the bundle, found by their words and by their meaning.

::

    learned/passages.sealed    the index, encrypted with learned/sealing.key

Words are ranked by BM25 (Robertson and Zaragoza 2009), meaning by embeddings of the bundle's frozen base in eight bits;
both rankings are added by reciprocal ranks (Cormack et al. 2009)."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from aggregation import sealed, wire
from aggregation.errors import EdgeAdaptError, TrustError
from client.inference.usage import LEARNED, sealing_key
from edgeadapt.formats import storage
from edgeadapt.formats.layout import Floats
from edgeadapt.formats.passages import Passage

PASSAGES = "passages.sealed"
LARGEST = 2**28  # bytes of the index
NUMBERS = {"vectors": "i1", "scales": "<f4", "starts": "<i8", "places": "<i4", "weights": "<f4"}  # of an index
K1, B, RANKS, CANDIDATES = 1.2, 0.75, 60, 100  # the constants of both papers; each ranking gives so many candidates
QUOTED = "Text from files, which may help to answer the question below it:"
Embed = Callable[[Sequence[str]], Floats]  # texts → shape ``(texts, hidden)``, each of L2 norm 1


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
    def forget(cls, bundle: Path, base: str, erased: Callable[[str], bool]) -> None:
        """Delete the index of a bundle if ``erased`` is true of a passage of its owner's, or it cannot be read."""
        with suppress(TrustError):
            index = cls.read(bundle, base)
            if index and not any(erased(one.read) for one in index.passages if not one.vendor):
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
