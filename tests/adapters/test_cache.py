"""A folder of the cache is whole or not there."""

from pathlib import Path

import pytest

from adapters.cache import cache_folder, made_once
from aggregation.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEADAPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_is_made_once(cache: Path) -> None:
    calls: list[Path] = []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "file").write_text("x")

    assert made_once("a", make) == made_once("a", make) == cache / "a"
    assert len(calls) == 1
    assert (cache / "a" / "file").read_text() == "x"


def test_a_failure_leaves_nothing_and_the_next_call_tries_again(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match="No space left"):
        made_once("a", fail)
    assert list(cache.iterdir()) == []
    assert made_once("a", lambda folder: None) == cache / "a"


def test_who_comes_second_uses_the_folder_of_the_first(cache: Path) -> None:
    def slow(folder: Path) -> None:
        made_once("a", lambda inner: (inner / "file").write_text("first") and None)
        (folder / "file").write_text("second")

    assert (made_once("a", slow) / "file").read_text() == "first"
    assert [path.name for path in cache.iterdir()] == ["a"]


def test_a_cache_that_cannot_be_written_is_named(cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(ConfigError, match="EDGEADAPT_CACHE"):
        made_once("a", lambda folder: None)


@pytest.mark.parametrize(("system", "part"), [("linux", ".cache"), ("darwin", "Caches"), ("win32", "AppData")])
def test_without_the_variable_it_is_the_systems_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str, part: str
) -> None:
    for name in ("EDGEADAPT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("adapters.cache.sys.platform", system)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    found = cache_folder()
    assert found.is_relative_to(tmp_path)
    assert part in found.parts
