"""How often the section of a heading is among the first passages that are found for it.

    python -m benchmarks retrieval /usr/share/doc/debian-handbook/html/en-US --bundle runs/demo/bundle

Each heading of a folder that only one section has is a question, and the passages of that section, which are indexed
without their headings, are right. The peer is bm25s (its Lucene variant) on the same passages.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import bm25s
import numpy as np

from aggregation.errors import DataError
from client.inference.passages import PassageIndex, words_of
from client.inference.session import ClassificationSession
from edgeadapt.formats.passages import Passage, read_folder

TOP, FEWEST = 5, 2  # passages that count, and words of a heading that is a question


@dataclass(frozen=True, slots=True)
class Found:
    """Shares of questions with a right passage among the first ``TOP``, and times of a search in milliseconds."""

    passages: int
    questions: int
    hybrid: float
    words: float  # by BM25 alone
    meaning: float  # by embeddings alone
    bm25s: float
    difference: float  # hybrid less bm25s
    low: float  # of a bootstrap over questions, 95 %
    high: float
    median_ms: float  # of embedding a question and searching
    p95_ms: float


def questions(passages: Sequence[Passage]) -> dict[str, str]:
    """Map a heading that is a question to the section that it names: of one file, and of no other one."""
    files = Counter(heading for heading, _ in {(one.heading, one.source) for one in passages})
    titles = {one.heading: re.sub(r"^[\W\d]+", "", one.heading) for one in passages if files[one.heading] == 1}
    return {heading: title for heading, title in titles.items() if len(words_of(title)) >= FEWEST}


def measure(folder: Path, bundle: Path, report: Callable[[str], object]) -> Found:
    session = ClassificationSession.open(bundle)
    passages, _ = read_folder(folder)
    bare = [replace(one, heading="") for one in passages]
    report(f"embed {len(bare)} passages")
    index = PassageIndex.of(bare, session.embed)
    if not (asked := questions(passages)):
        raise DataError(f"{folder} has no heading of two words or more that one file alone has", about="DIR")
    peer = bm25s.BM25(method="lucene")
    peer.index([words_of(one.text) for one in bare], show_progress=False)
    hits: dict[str, list[bool]] = {"hybrid": [], "words": [], "meaning": [], "bm25s": []}
    times, nothing = list[float](), np.zeros(index.vectors.shape[1], np.float32)
    places = {id(one): place for place, one in enumerate(index.passages)}
    for heading, title in asked.items():
        begun = time.perf_counter()
        vector = session.embed([title])[0]
        both = index.search(title, vector, TOP)
        times.append(time.perf_counter() - begun)
        found = {
            "hybrid": [places[id(one)] for one in both],
            "words": [places[id(one)] for one in index.search(title, nothing, TOP)],
            "meaning": [places[id(one)] for one in index.search("", vector, TOP)],
            "bm25s": peer.retrieve([words_of(title)], k=min(TOP, len(bare)), show_progress=False).documents[0].tolist(),
        }
        for name, rows in found.items():
            hits[name].append(any(passages[row].heading == heading for row in rows))
    shares = {name: float(np.mean(right)) for name, right in hits.items()}
    better = np.array(hits["hybrid"], np.float64) - np.array(hits["bm25s"], np.float64)
    draws = np.random.default_rng(0).integers(0, len(better), (2000, len(better)))
    low, high = np.quantile(better[draws].mean(axis=1), [0.025, 0.975])
    median, p95 = (float(np.quantile(times, share) * 1000) for share in (0.5, 0.95))
    difference = float(better.mean())
    return Found(
        len(bare), len(asked), **shares, difference=difference, low=low, high=high, median_ms=median, p95_ms=p95
    )


def table(found: Found) -> str:
    return "\n".join(
        f"{name:<12}{value:>10.3f}" if isinstance(value, float) else f"{name:<12}{value:>10}"
        for name, value in asdict(found).items()
    )
