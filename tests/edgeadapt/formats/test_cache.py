"""A folder of the cache is complete or absent."""

from pathlib import Path

import pytest

from aggregation.errors import ConfigError
from edgeadapt.formats.cache import VARIABLE, cache_folder, cached
from tests.support import refused


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_is_made_once(cache: Path) -> None:
    calls: list[Path] = []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "file").write_text("x")

    assert cached("a", make) == cached("a", make) == cache / "a"
    assert len(calls) == 1
    assert (cache / "a" / "file").read_text() == "x"


def test_a_failure_leaves_nothing_and_the_next_call_tries_again(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with refused(ConfigError, VARIABLE, value=str(cache / "a")) as caught:
        cached("a", fail)
    assert "No space left on device" in str(caught.value)
    assert list(cache.iterdir()) == []
    assert cached("a", lambda folder: None) == cache / "a"


def test_the_slower_of_two_processes_uses_the_folder_of_the_faster(cache: Path) -> None:
    def slow(folder: Path) -> None:
        cached("a", lambda inner: (inner / "file").write_text("first") and None)
        (folder / "file").write_text("second")

    assert (cached("a", slow) / "file").read_text() == "first"
    assert [path.name for path in cache.iterdir()] == ["a"]


def test_a_cache_that_cannot_be_written_is_named(cache: Path) -> None:
    cache.write_text("a file")
    with refused(ConfigError, VARIABLE):
        cached("a", lambda folder: None)


def test_without_the_variable_it_is_the_systems_folder_for_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder().is_relative_to(tmp_path)
    assert "edgeadapt" in cache_folder().parts
