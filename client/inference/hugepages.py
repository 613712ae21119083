"""Huge pages for a model's weights, so that a token needs fewer translations of addresses.

ONNX Runtime keeps the weights, rearranged for the processor, in memory of its own, and every token reads all of them.
SmolLM2's take 30,000 pages of 4 KiB, for which the processor's translation buffers have no room, or 60 pages of 2 MiB.
Linux gives huge pages by itself only where its setting is ``always``; the usual one is ``madvise``, where a process
asks for them: ``MADV_COLLAPSE`` of madvise(2), since Linux 6.1. Where it is ``never``, or the system is another one,
nothing happens.
"""

import ctypes
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

HUGE_PAGE = 2**21  # bytes; of x86-64, and of arm64 with pages of 4 KiB
MADV_COLLAPSE = 25
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MAPPINGS = Path("/proc/self/smaps")
MOSTLY = 0.9  # the share of a mapping that is in memory; a huge page of one that is less so would take more memory


@dataclass(frozen=True, slots=True)
class Mapping:
    """A range of addresses, its permissions and its name ("" without one), and how many bytes of it are in memory."""

    start: int
    stop: int
    permissions: str
    name: str
    resident: int


def collapse_in_background() -> None:
    """Run ``collapse`` in a thread of its own, which ends with the process."""
    Thread(target=collapse, name="huge-pages", daemon=True).start()


def collapse() -> int:
    """Move this process's own memory to huge pages, except mappings that are mostly not in memory.

    Contents and addresses stay the same, so other threads may read and write meanwhile. SmolLM2 in ``native-int4``
    takes 0.3 seconds of CPU time.

    Returns:
        The bytes that the system accepted; 0 where it has no such call, hides its files, or its setting is ``never``.
    """
    if sys.platform != "linux":
        return 0
    try:
        if "[never]" in SETTING.read_text():
            return 0
        lines = MAPPINGS.read_text(errors="replace").splitlines()
    except OSError:
        return 0
    madvise = ctypes.CDLL(None).madvise  # releases the interpreter lock while it runs
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    ranges = [_whole_pages(one) for one in mappings(lines) if _is_dense(one)]
    return sum(size for start, size in ranges if size and madvise(start, size, MADV_COLLAPSE) == 0)


def mappings(lines: Iterable[str]) -> Iterator[Mapping]:
    """The mappings of a process from the lines of its ``smaps`` (proc(5))."""
    head: list[str] = []
    for line in lines:
        words = line.split()
        if not words[0].endswith(":"):
            head = words
        elif words[0] == "Rss:":
            start, _, stop = head[0].partition("-")
            yield Mapping(int(start, 16), int(stop, 16), head[1], " ".join(head[5:]), 1024 * int(words[1]))


def _is_dense(one: Mapping) -> bool:
    private = one.permissions == "rw-p" and one.name in ("", "[heap]")
    return private and one.resident >= MOSTLY * (one.stop - one.start)


def _whole_pages(one: Mapping) -> tuple[int, int]:
    """The start and the bytes of the huge pages that fit into a mapping."""
    start, stop = -(-one.start // HUGE_PAGE) * HUGE_PAGE, one.stop // HUGE_PAGE * HUGE_PAGE
    return start, max(0, stop - start)
