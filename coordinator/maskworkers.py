"""Processes that take masks off beside the coordinator's own: the sum is the same bit for bit, and earlier there.

Threads would not do: the library holds Python's lock while it encrypts. Masks commute, so each process adds up a share
of them, and the coordinator adds up what comes back. Bytes alone go through the pipes; keys go there and nowhere else,
and the process that gets them is this program under the same user.
"""

import struct
import subprocess
import sys
from collections.abc import Iterable
from signal import SIG_IGN, SIGINT, signal
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from aggregation import masks
from aggregation.masks import KEY, Mask
from aggregation.ring import Ring

_REQUEST = struct.Struct("<BQI")  # bytes of an element, elements, masks; then for each mask its sign and key
_MASK = struct.Struct(f"<?{KEY}s")


class MaskWorkers:
    """A context manager whose ``apply`` does what ``masks.apply`` does, on ``count`` more processes.

    A process that ends too early costs time and nothing else: its share is then done here.
    """

    def __init__(self, count: int) -> None:
        command = [sys.executable, "-P", "-m", __name__]  # -P: no module of the folder that it is started in gets keys
        self._workers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603 - this very file
            for _ in range(count)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.communicate()  # closes its input, at which it ends

    def apply(self, vector: Ring, found: Iterable[Mask]) -> None:
        """Add or subtract masks on ``vector`` in place, wrapping: see ``masks.apply``."""
        every, parts = list(found), len(self._workers) + 1
        shares = [every[part::parts] for part in range(parts)]
        asked = [_ask(worker, vector, share) for worker, share in zip(self._workers, shares[1:], strict=True)]
        masks.apply(vector, shares[0])
        for worker, share, was_asked in zip(self._workers, shares[1:], asked, strict=True):
            answer = _answer(worker, vector) if was_asked else None
            if answer is None:
                masks.apply(vector, share)
            else:
                np.add(vector, answer, out=vector)


def _ask(worker: "subprocess.Popen[bytes]", vector: Ring, share: list[Mask]) -> bool:
    request = _REQUEST.pack(vector.itemsize, vector.size, len(share))
    try:
        assert worker.stdin is not None  # noqa: S101 - Popen was told to make it
        worker.stdin.write(request + b"".join(_MASK.pack(mask.add, mask.key) for mask in share))
        worker.stdin.flush()
    except OSError:
        return False
    return True


def _answer(worker: "subprocess.Popen[bytes]", vector: Ring) -> Ring | None:
    answer = np.empty_like(vector)
    assert worker.stdout is not None  # noqa: S101 - Popen was told to make it
    return answer if worker.stdout.readinto(answer.data.cast("B")) == answer.nbytes else None  # type: ignore[attr-defined]


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    while len(head := requests.read(_REQUEST.size)) == _REQUEST.size:
        itemsize, size, count = _REQUEST.unpack(head)
        found = [Mask(key, add) for add, key in _MASK.iter_unpack(requests.read(count * _MASK.size))]
        vector: Ring = np.zeros(size, f"<u{itemsize}")
        masks.apply(vector, found)
        answers.write(vector.data.cast("B"))
        answers.flush()


if __name__ == "__main__":
    signal(SIGINT, SIG_IGN)  # Ctrl-C is for the coordinator, which then closes the pipe
    serve(sys.stdin.buffer, sys.stdout.buffer)
