"""The documents point at what is there: every file, test, section and name of the protocol core that they mention.

A claim without a test is a wish, so each row of the tables of promises names one.
"""

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
PROMISES = {  # document → the heading of a table of claims, and in which column the test stands
    "docs/protocol.md": [("What is built", 2)],
    "docs/threat-model.md": [("Promises", 2), ("What an audit shows", 2)],
}
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


@pytest.fixture(scope="module")
def known(all_sources: Any) -> set[str]:
    """Every test function of the suite, and every file of it."""
    suite = [source for source in all_sources if source.path.startswith("tests/")]
    functions = (node for source in suite for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef))
    return {node.name for node in functions} | {Path(source.path).name for source in suite}


PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"tests", "docs"}
MODULES = {path.stem for path in (ROOT / "aggregation").glob("*.py")}


def quoted(path: Path) -> list[str]:
    """What stands in back quotes, outside code blocks."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


def anchors(path: Path) -> set[str]:
    """The headings of a document, as links name them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_test_that_a_document_names_is_there(path: Path, known: set[str]) -> None:
    named = {word for word in quoted(path) if re.fullmatch(r"test_\w+(\.py)?", word)}
    assert sorted(named - known) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_file_that_a_document_names_is_there(path: Path) -> None:
    words = {word for word in quoted(path) if re.fullmatch(r"[\w./-]+/[\w./-]*", word)}
    named = {word for word in words if word.partition("/")[0] in PACKAGES}
    assert sorted(word for word in named if not (ROOT / word).exists()) == []


@pytest.mark.parametrize("document", PROMISES)
def test_every_name_of_the_core_that_its_documents_mention_is_there(document: str) -> None:
    dotted = {tuple(word.split(".")) for word in quoted(ROOT / document) if re.fullmatch(r"[a-z]+\.\w+", word)}
    named = {(module, name) for module, name in dotted if module in MODULES and name not in ("py", "toml")}
    missing = [pair for pair in named if not hasattr(importlib.import_module(f"aggregation.{pair[0]}"), pair[1])]
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_link_of_a_document_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize(("document", "heading", "column"), [(d, *row) for d, rows in PROMISES.items() for row in rows])
def test_every_promise_names_its_test(document: str, heading: str, column: int) -> None:
    section = (ROOT / document).read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    claims = [row for row in rows[2:] if "not yet" not in row[1]]
    assert len(claims) > 3
    for row in claims:
        assert re.search(r"test_\w+|make_\w+|fuzz_\w+", row[column]), row[0]
