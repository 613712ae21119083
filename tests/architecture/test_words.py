"""One word for one thing: the words of ``retired_words.md`` are not used.

A word counts wherever it stands: in identifiers, strings, comments, docstrings, documents and names of files.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("retired_words.md")
SUFFIXES = {".py", ".md", ".toml", ".js", ".html", ".css", ".yml", ".json", ".svg", ""}
PACKAGES = ("adapters", "aggregation", "client", "coordinator", "export", "simulations", "tests")
PATHS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs",
    "mkdocs.yml",
    "pyproject.toml",
    "edgeadapt.py",
    *PACKAGES,
)
# words: phrases of households; test_words.py: this file
EXCEPT = {
    "node_modules",
    "__pycache__",
    "package-lock.json",
    "retired_words.md",
    "cases.json",
    "expected.json",
    "rounds.json",
    "test_words.py",
    "words",
}
DEFINED = {"docs/glossary.md": {"witness"}}  # a page may name what a word does not mean


def table() -> list[tuple[re.Pattern[str], re.Pattern[str] | None]]:
    """Each retired pattern, and what permits it in a line."""
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in TABLE.read_text().splitlines() if line[:3] == "| `"]
    found = []
    for cells in rows:
        allowed = re.search(r"`(.+)`", cells[2].replace(r"\|", "|")) if len(cells) > 2 else None
        for pattern in re.findall(r"`([^`]+)`", cells[0].replace(r"\|", "|")):
            found.append((_compiled(pattern), re.compile(allowed[1]) if allowed else None))
    return found


def _compiled(pattern: str) -> re.Pattern[str]:
    left = r"\b" if re.match(r"\w|\(", pattern) else ""
    right = r"\b" if re.search(r"[\w?)]$", pattern) else ""
    return re.compile(f"{left}(?:{pattern}){right}", 0 if re.search(r"(?<!\\)[A-Z]", pattern) else re.IGNORECASE)


RETIRED = table()


def split(text: str) -> str:
    """``EncryptedBox`` and ``box_key`` as words."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text).replace("_", " ")


def retired(text: str) -> list[str]:
    """The retired words of ``text``, each with its line."""
    return [
        f"{number}: {found[0]}"
        for number, line in enumerate(text.splitlines(), 1)
        for pattern, allowed in RETIRED
        if (found := pattern.search(line) or pattern.search(split(line))) and not (allowed and allowed.search(line))
    ]


def files(path: Path) -> list[Path]:
    """The texts at ``path``."""
    texts = [path] if path.is_file() else sorted(path.rglob("*"))
    return [file for file in texts if file.is_file() and file.suffix in SUFFIXES and not EXCEPT & set(file.parts)]


@pytest.mark.parametrize("path", PATHS)
def test_no_conflict_of_a_merge_was_left(path: str) -> None:
    marks = re.compile(r"^(<{7}|>{7}) ", re.MULTILINE)
    assert not [str(file) for file in files(ROOT / path) if marks.search(file.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", PATHS)
def test_no_retired_word_is_used(path: str) -> None:
    found = []
    for file in files(ROOT / path):
        name = file.relative_to(ROOT).as_posix()
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".md":  # a test's name is the test's matter
            text = re.sub(r"\btest_\w+", "", text)
        words = [*retired(name), *retired(text)]
        found += [f"{name}:{word}" for word in words if word.partition(": ")[2].lower() not in DEFINED.get(name, set())]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "def box_key(): ...",
        "class EncryptedBox:",
        "Boxes for each neighbor",
        "a neighbour",
        "--home DIR",
        "the coordinator's home",
        "return Opening(x)",
        "two devices are lost",
        "the general road",
        "proofs ride beside the plan",
    ],
)
def test_a_retired_word_is_found(text: str) -> None:
    assert retired(text) != []


@pytest.mark.parametrize(
    "text",
    [
        "from rich import box",
        "a Home Assistant intent",
        "besides, the opening of the session",
        "key agreement by X25519",
        "once a round",
        "a coordinator that lost its transcripts",
        "def sandbox(): ...",
    ],
)
def test_an_ordinary_word_is_permitted(text: str) -> None:
    assert retired(text) == []
