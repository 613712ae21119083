"""Hidden states of texts below the first layer that an adapter changes, which are computed once and kept. Nothing is
approximated in float32: such states depend on the frozen base and on a text's tokens alone."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.formats.storage import PRIVATE_FOLDER, staged

STATES = "states"  # the output of a graph of the lower layers, and the input of what goes on from them
# Inputs of a decoder that goes on from states which it returned before: these, and where among them, ``[begin, end]``.
KEPT_STATES, KEPT_RANGE = "kept_states", "kept_range"
Tokens = Sequence[int] | NDArray[np.int64]
States = NDArray[np.floating]  # of a text, shape ``(tokens, hidden)``; of a picture ``(places, hidden)``
SOURCE, KEYS, ENDS, ROWS = "source", "keys.sha256", "ends.int64", "rows.float16"
MOST_SHARED = 2**32  # bytes
AT_A_TIME = 512  # texts


def key_of(tokens: Tokens) -> str:
    return hashlib.sha256(np.array(tokens, np.int64).tobytes()).hexdigest()


class SharedStates(dict[str, States]):
    """States of many texts by ``key_of``, mapped into memory: the processes of a simulation share one folder."""

    @classmethod
    def write(
        cls, folder: Path, source: str, texts: Sequence[Tokens], compute: Callable[[list[Tokens]], list[Floats]]
    ) -> None:
        """Write the states of texts in float16, the shortest first, to a new folder as a whole. What exceeds float16,
        or ``MOST_SHARED`` bytes, is left out. ``source`` names what computes them."""
        rest = sorted({key_of(text): text for text in texts}.items(), key=lambda one: (len(one[1]), one[0]))
        keys, ends, end, size = list[bytes](), list[int](), 0, 0
        with staged(folder, mode=PRIVATE_FOLDER) as stage:
            with (stage / ROWS).open("wb") as file:
                while rest and size < MOST_SHARED:
                    some, rest = rest[:AT_A_TIME], rest[AT_A_TIME:]
                    for (key, _), values in zip(some, compute([text for _, text in some]), strict=True):
                        if (rounded := _rounded(values, np.dtype(np.float16))).dtype == np.float16:
                            size += file.write(rounded.tobytes())
                            end += len(rounded)
                            keys.append(bytes.fromhex(key))
                            ends.append(end)
            (stage / KEYS).write_bytes(b"".join(keys))
            (stage / ENDS).write_bytes(np.array(ends, np.int64).tobytes())
            (stage / SOURCE).write_text(source)

    @classmethod
    def open(cls, folder: Path, source: str) -> Self:
        """Return what ``write`` wrote; nothing if it is of another source."""
        if (folder / SOURCE).read_text() != source or not (folder / ROWS).stat().st_size:
            return cls()
        keys, ends = (folder / KEYS).read_bytes(), np.frombuffer((folder / ENDS).read_bytes(), np.int64)
        texts = np.split(np.memmap(folder / ROWS, np.float16, "r").reshape(int(ends[-1]), -1), ends[:-1])
        return cls((keys[32 * at : 32 * at + 32].hex(), states) for at, states in enumerate(texts))


class StateCache:
    """The states of the texts that were used last, in memory, of at most ``limit_bytes``. Threads may share it."""

    def __init__(
        self,
        limit_bytes: int,
        stored: DTypeLike = np.float32,
        source: str = "",
        shared: Mapping[str, States] | None = None,
    ) -> None:
        """``stored``: the type in memory, float32 or float16. States that exceed float16 stay in float32. ``source``
        names what computes the states, for those who keep them elsewhere. ``shared``: states that need no memory."""
        self.limit_bytes, self.stored, self.source, self._shared = limit_bytes, np.dtype(stored), source, shared or {}
        self.size = 0  # bytes of the states that were used
        self._states: OrderedDict[str, States] = OrderedDict()  # by digest of tokens, oldest use first
        self._others: Tensors = {}  # that may be used
        self._lock = Lock()

    def rows(self, tokens: Sequence[Tokens], compute: Callable[[list[Tokens]], list[Floats]]) -> list[Floats]:
        """Return the states of each text in float32, shape ``(tokens, hidden)``; they may be read only. ``compute`` is
        called at most once, with the texts that are missing, each once and in their order. If it raises, the cache
        stays as it was. Guarantee: a text has the same states when they are computed and when they were kept."""
        keys = [key_of(text) for text in tokens]
        shared = {key: self._shared[key] for key in keys if key in self._shared}
        with self._lock:
            for key in self._others.keys() & set(keys):
                self._keep(key, _rounded(self._others.pop(key), self.stored))
            states = {key: self._states[key] for key in keys if key in self._states}
        missing = {key: text for key, text in zip(keys, tokens, strict=True) if key not in states.keys() | shared}
        if missing:  # without the lock: other threads go on, and may compute the same text
            computed = compute(list(missing.values()))
            states |= {key: _rounded(values, self.stored) for key, values in zip(missing, computed, strict=True)}
        with self._lock:
            for key, values in states.items():
                self._keep(key, values)
        states |= shared
        return [np.asarray(states[key], np.float32) for key in keys]

    def begin(self, states: Tensors) -> None:
        with self._lock:
            self._states.clear()
            self.size, self._others = 0, dict(states)

    def used(self, limit_bytes: int) -> Tensors:
        """Return the states that were used last, in float32, up to a limit, by the digest (SHA-256) of their tokens."""
        result: Tensors = {}
        with self._lock:
            kept = list(self._states.items())
        for key, values in reversed(kept):
            if (limit_bytes := limit_bytes - 4 * values.size) < 0:
                break
            result[key] = np.asarray(values, np.float32)
        return result

    def _keep(self, key: str, values: States) -> None:
        if (previous := self._states.pop(key, None)) is not None:
            self.size -= previous.nbytes
        if values.nbytes > self.limit_bytes:
            return
        self._states[key] = values
        self.size += values.nbytes
        while self.size > self.limit_bytes:
            self.size -= self._states.popitem(last=False)[1].nbytes


def _rounded(values: Floats, stored: np.dtype[Any]) -> States:
    with np.errstate(over="ignore"):
        rounded: States = np.array(values, stored)
    if not np.isfinite(rounded).all():
        rounded = np.array(values, np.float32)
    rounded.flags.writeable = False
    return rounded


class LowerLayers:
    """Runs the layers below all slots, of each text alone: in a batch, states would depend, by rounding, on the other
    texts. Threads may share it."""

    def __init__(self, session: Any, limit_bytes: int) -> None:
        """``session``: ONNX Runtime's, of a base's graph ``lower.onnx``; ``limit_bytes``: of the states in memory."""
        self._session, self.cache = session, StateCache(limit_bytes)

    def states(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Floats:
        """Return the states of texts, shape ``(texts, longest, hidden)``; padding is 0. Each text's are computed once,
        as long as the cache keeps them."""
        rows = self.cache.rows([row[:count] for row, count in zip(ids, mask.sum(axis=1), strict=True)], self.computed)
        result = np.zeros((len(rows), max(map(len, rows)), rows[0].shape[1]), np.float32)
        for states, row in zip(result, rows, strict=True):
            states[: len(row)] = row
        return result

    def computed(self, texts: Sequence[Tokens]) -> list[Floats]:
        rows = [np.array(text, np.int64)[np.newaxis] for text in texts]
        feeds = ({"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in rows)
        return [self._session.run([STATES], feed)[0][0] for feed in feeds]
