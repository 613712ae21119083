"""The source files, parsed once."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("aggregation", "client", "coordinator", "edgeadapt", "export", "simulations")


@dataclass(frozen=True)
class Source:
    """A Python file: its path from the root, its text and its syntax tree."""

    path: str
    text: str
    tree: ast.Module


def _read(path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    return Source(path.relative_to(ROOT).as_posix(), text, ast.parse(text))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def sources() -> tuple[Source, ...]:
    files = [file for part in PARTS for file in sorted((ROOT / part).rglob("*.py"))]
    return tuple(map(_read, files))


@pytest.fixture(scope="session")
def all_sources(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """Everything that is installed, the benchmarks and the tests."""
    return sources + tuple(
        _read(file) for part in ("benchmarks", "tests") for file in sorted((ROOT / part).rglob("*.py"))
    )
