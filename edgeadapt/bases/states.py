"""Hidden states of texts below the first layer that an adapter changes, which are computed once and kept.

Nothing is approximated in float32: such states depend on the frozen base and on a text's tokens alone.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgeadapt.formats.layout import Floats


class StateCache:
    """The states of the texts that were used last, in memory, of at most ``limit_bytes``; not for several threads."""

    def __init__(self, limit_bytes: int, stored: DTypeLike = np.float32) -> None:
        """``stored``: the type in memory, float32 or float16. States that exceed float16 stay in float32."""
        self.limit_bytes, self.stored = limit_bytes, np.dtype(stored)
        self.size = 0  # bytes of all states
        self._states: OrderedDict[bytes, NDArray[np.floating]] = OrderedDict()  # by tokens, oldest use first

    def rows(
        self, tokens: Sequence[Sequence[int]], compute: Callable[[list[Sequence[int]]], list[Floats]]
    ) -> list[Floats]:
        """Return the states of each text in float32, shape ``(tokens, hidden)``; they may be read only.

        ``compute`` is called at most once, with the texts that are missing, each once and in their order. If it raises,
        the cache stays as it was. Guarantee: a text has the same states when they are computed and when they were kept.
        """
        keys = [np.array(text, np.int64).tobytes() for text in tokens]
        missing = {key: text for key, text in zip(keys, tokens, strict=True) if key not in self._states}
        states = {key: self._states[key] for key in keys if key in self._states}
        if missing:
            computed = compute(list(missing.values()))
            states |= {key: self._rounded(values) for key, values in zip(missing, computed, strict=True)}
        for key, values in states.items():
            self._keep(key, values)
        return [np.asarray(states[key], np.float32) for key in keys]

    def clear(self) -> None:
        self._states.clear()
        self.size = 0

    def _rounded(self, values: Floats) -> NDArray[np.floating]:
        with np.errstate(over="ignore"):
            rounded: NDArray[np.floating] = np.array(values, self.stored)
        if not np.isfinite(rounded).all():
            rounded = np.array(values, np.float32)
        rounded.flags.writeable = False
        return rounded

    def _keep(self, key: bytes, values: NDArray[np.floating]) -> None:
        if (previous := self._states.pop(key, None)) is not None:
            self.size -= previous.nbytes
        if values.nbytes > self.limit_bytes:
            return
        self._states[key] = values
        self.size += values.nbytes
        while self.size > self.limit_bytes:
            self.size -= self._states.popitem(last=False)[1].nbytes
