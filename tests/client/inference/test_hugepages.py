"""A process's memory moves to huge pages where Linux has them, and keeps its content."""

import ctypes
import mmap
import sys
from pathlib import Path

import pytest

from client.inference import hugepages
from client.inference.hugepages import HUGE_PAGE, Mapping, mappings

MAP_NORESERVE = 0x4000
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="MADV_COLLAPSE is Linux's")
SMAPS = """\
7f0000200000-7f0000a00000 rw-p 00000000 00:00 0
Size:               8192 kB
Rss:                8000 kB
VmFlags: rd wr mr mw me ac sd
7f0000a00000-7f0000b00000 r--s 00000000 fe:00 42                         /a folder/model.onnx.data
Size:               1024 kB
Rss:                   0 kB
"""


def test_mappings_are_read_from_smaps() -> None:
    assert list(mappings(SMAPS.splitlines())) == [
        Mapping(0x7F0000200000, 0x7F0000A00000, "rw-p", "", 8000 * 1024),
        Mapping(0x7F0000A00000, 0x7F0000B00000, "r--s", "/a folder/model.onnx.data", 0),
    ]


@pytest.mark.parametrize("setting", ["always madvise [never]", "always [madvise] never", None])
def test_nothing_happens_where_the_system_has_no_huge_pages_never_gives_them_or_hides_its_files(
    setting: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
    monkeypatch.setattr(hugepages, "SETTING", tmp_path / "enabled")
    monkeypatch.setattr(hugepages, "MAPPINGS", tmp_path / "hidden")
    assert hugepages.collapse() == 0


@on_linux
@pytest.mark.parametrize("filled", [8, 2])
def test_memory_that_is_in_use_moves_to_huge_pages_and_memory_that_mostly_is_not_stays(filled: int) -> None:
    # Without reserve, because Linux would join the mapping with others of the same kind.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    with mmap.mmap(-1, 8 * HUGE_PAGE, flags) as memory:
        memory[: filled * HUGE_PAGE] = content = bytes(range(256)) * (filled * HUGE_PAGE // 256)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if hugepages.collapse() == 0:
            pytest.skip("this system has no huge pages, or no MADV_COLLAPSE (Linux 6.1)")
        assert (_in_huge_pages(address) >= 7 * HUGE_PAGE) == (filled == 8)
        assert memory[: len(content)] == content
        found = [
            one for one in mappings(hugepages.MAPPINGS.read_text().splitlines()) if one.start <= address < one.stop
        ]
        assert found[0].resident < (filled + 1) * HUGE_PAGE


def _in_huge_pages(address: int) -> int:
    """The bytes in huge pages of the mapping with an address."""
    inside, size = False, 0
    for line in hugepages.MAPPINGS.read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            start, _, stop = words[0].partition("-")
            inside = int(start, 16) <= address < int(stop, 16)
        elif inside and words[0] == "AnonHugePages:":
            size += 1024 * int(words[1])
    return size
