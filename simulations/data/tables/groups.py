"""Texts that are variants of one another, in groups: no group may be on both sides of a split.

A test on texts at random measures memory where data have near-duplicates: templates, forwarded mails, retries.
"""

import re
from collections.abc import Sequence

from datasketch import MinHash, MinHashLSH

SHINGLE = 3  # characters
PERMUTATIONS = 64
_NUMBERS, _REST = re.compile(r"\d+"), re.compile(r"[\W_]+")


def normalized(text: str) -> str:
    """What two near-duplicates share: no case, punctuation or white space, and every number as 0.

    >>> normalized("Turn it to 21 °C,  please!")
    'turn it to 0 c please'
    """
    return _REST.sub(" ", _NUMBERS.sub("0", text.casefold())).strip()


def group_texts(texts: Sequence[str], keys: Sequence[str], threshold: float) -> list[int]:
    """The group of each text, as the index of the group's first text.

    Texts whose sets of three-character pieces have a Jaccard index of at least ``threshold`` are in one group, and so
    are those that a chain of such pairs connects. The index is estimated from 64 hashes (Broder 1997; its standard
    deviation is at most 0.0625) for pairs that locality-sensitive hashing finds (Indyk and Motwani 1998).

    Args:
        texts: Any number of them.
        keys: One for each text; those with the same key that is not empty belong together too.
        threshold: From 0.3 to 1; at 1, only texts that ``normalized`` makes equal are in one group.
    """
    first: dict[str, int] = {}
    parent = list(range(len(texts)))
    for index, text in enumerate(texts):
        parent[index] = first.setdefault(normalized(text), index)
    if threshold < 1:
        _join_similar(list(first.items()), parent, threshold)
    keyed: dict[str, int] = {}
    for index, key in enumerate(keys):
        if key:
            _join(parent, keyed.setdefault(key, index), index)
    return [_root(parent, index) for index in range(len(texts))]


def _join_similar(distinct: Sequence[tuple[str, int]], parent: list[int], threshold: float) -> None:
    rows = (
        4 if threshold >= 0.7 else 2
    )  # of a band: a pair at the threshold is found with a probability of 0.95 or more
    index = MinHashLSH(num_perm=PERMUTATIONS, params=(PERMUTATIONS // rows, rows))
    sketches: dict[int, MinHash] = {}
    for text, number in distinct:
        sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch(sorted({text[i : i + SHINGLE].encode() for i in range(max(1, len(text) - SHINGLE + 1))}))
        for other in index.query(sketch):
            if sketches[other].jaccard(sketch) >= threshold:
                _join(parent, other, number)
        sketches[number] = sketch
        index.insert(number, sketch)


def _join(parent: list[int], one: int, other: int) -> None:
    low, high = sorted((_root(parent, one), _root(parent, other)))
    parent[high] = low


def _root(parent: list[int], index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = parent[index]
    return index
