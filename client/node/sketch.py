"""Sketches of adapters: a few numbers of each, from which the distance between any two follows, up to some percent.

A device compares the adapter of a plan with many earlier ones, and need not keep them: a sketch adds the numbers of
each part up in ``BUCKETS`` sums, in places and with signs that a secret key chooses (Charikar, Chen and Farach-Colton
2002, "Finding Frequent Items in Data Streams"; Alon, Matias and Szegedy 1999 for the norm). The squared norm of the
difference of two sketches has that of the difference of the adapters as its mean, and a relative variance of at most
2 / ``BUCKETS``. Who does not know the key cannot choose an adapter that only seems to be far away.
"""

import hashlib
from collections.abc import Collection

import numpy as np

from aggregation.keystream import Keystream
from edgeadapt.formats.layout import Tensors
from edgeadapt.methods.parts import Part, part_of

BUCKETS = 32
_PLACES = tuple(Part)
SIZE = len(_PLACES) * BUCKETS * 4  # bytes


def sketch(tensors: Tensors, key: bytes) -> bytes:
    """Sketch an adapter: float32, little-endian, ``BUCKETS`` numbers for each part.

    ``key``: 32 secret bytes, the same for sketches that are compared.
    """
    sums = np.zeros((len(_PLACES), BUCKETS))
    for name, tensor in tensors.items():
        drawn = np.empty(tensor.size, np.uint8)
        Keystream(hashlib.sha256(b"edgeadapt/sketch/1\x00" + key + name.encode()).digest()).read_into(drawn.data)
        signed = np.where(drawn & 0x80, -1.0, 1.0) * tensor.ravel()
        sums[_PLACES.index(part_of(name))] += np.bincount(drawn % BUCKETS, signed, BUCKETS)
    return sums.astype("<f4").tobytes()


def separation(one: bytes, other: bytes, parts: Collection[Part]) -> float:
    """Measure the distance between two adapters over some parts, from their sketches."""
    left, right = (np.frombuffer(each, "<f4").astype(float).reshape(-1, BUCKETS) for each in (one, other))
    chosen = [part in parts for part in _PLACES]
    return float(np.linalg.norm((left - right)[chosen]))
