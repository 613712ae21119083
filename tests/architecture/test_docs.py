"""The documents point at what is there: every file, test, section and name of the protocol core that they mention.

A claim without a test is a wish, so each row of the tables of promises names one.
"""

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from benchmarks.__main__ import bench
from edgeadapt import program

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
PROMISES = {  # document → the heading of a table of claims, and in which column the test stands
    "docs/explanation/secure-aggregation.md": [("What is implemented", 1)],
    "docs/explanation/threat-model.md": [
        ("Promises", 1),
        ("What an audit shows", 1),
        ("The fleet", 2),
        ("Releases", 2),
    ],
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
    ours = {path.name for path in (ROOT / "edgeadapt").iterdir()}  # not the contexts of signatures, edgeadapt/…/1
    named = {word for word in words if word.partition("/")[0] in PACKAGES - {"edgeadapt"}}
    named |= {word for word in words if word.startswith("edgeadapt/") and word.split("/")[1] in ours}
    assert sorted(word for word in named if not (ROOT / word).exists()) == []


@pytest.mark.parametrize("document", [*PROMISES, "docs/reference/protocol.md"])
def test_every_name_of_the_core_that_its_documents_mention_is_there(document: str) -> None:
    dotted = {tuple(word.split(".")) for word in quoted(ROOT / document) if re.fullmatch(r"[a-z]+\.\w+", word)}
    named = {(module, name) for module, name in dotted if module in MODULES and name not in ("py", "toml")}
    missing = [pair for pair in named if not hasattr(importlib.import_module(f"aggregation.{pair[0]}"), pair[1])]
    assert missing == []


def calls(text: str) -> list[list[str]]:
    """The words of every call of the program, in code blocks and in back quotes."""
    text = re.sub(r"\\\n\s*", "", text)
    blocks = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    called = r"(?:\S*python3? -m )?(?:edgeadapt |(?<= -m )(?=benchmarks ))(\w[^`\n|#&;]*)"
    found = [
        call for block in blocks for call in re.findall(rf"(?:^ *\$? *|&& |; do |; then |\$\(){called}", block, re.M)
    ]
    found += re.findall(rf"`{called}`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [shlex.split(call.replace("…", ""), posix=True) for call in found]


def unknown(words: list[str]) -> str:
    """What of a call is no command or no option of it; nothing where all is well."""
    command: click.Command = bench if words[:1] == ["benchmarks"] else program.cli
    rest = words[1:] if command is bench else list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        found = command.get_command(click.Context(command), name)
        if found is None:
            return name
        command = found
    options = {opt for parameter in command.get_params(click.Context(command)) for opt in parameter.opts}
    return next((word for word in rest if word.startswith("--") and word.partition("=")[0] not in options), "")


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_call_of_the_program_in_a_document_is_one(path: Path) -> None:
    assert [" ".join(words) for words in calls(path.read_text()) if unknown(words)] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_link_of_a_document_leads_somewhere(path: Path) -> None:
    prose = re.sub(r"^```.*?^```$|`[^`\n]+`", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
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


DECISIONS = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))


@pytest.mark.parametrize("path", DECISIONS, ids=[path.stem for path in DECISIONS])
def test_a_decision_is_a_page_with_its_number_and_a_status_that_no_search_finds(path: Path) -> None:
    front, text = path.read_text().removeprefix("---\n").split("\n---\n\n")
    title, _, status = text.split("\n")[:3]
    assert front == "search: {exclude: true}"
    assert title.startswith(f"# {int(path.name[:4])}. ")
    assert re.match(r"\*\*Status:\*\* (accepted|superseded by .*), \d{4}-\d\d-\d\d", status)
    assert sum(bool(re.search(r"\w", word)) for word in text.split()) <= 300


def test_the_index_of_decisions_has_each_of_at_most_forty_once() -> None:
    rows = re.findall(r"^\| (\d+) \| \[(.+)\]\((.+)\)", (ROOT / "docs/decisions/index.md").read_text(), re.MULTILINE)
    titles = [re.findall(r"^# (\d+)\. (.*)$", path.read_text(), re.MULTILINE)[0] for path in DECISIONS]
    assert sorted(rows) == sorted((*title, path.name) for title, path in zip(titles, DECISIONS, strict=True))
    assert len(rows) <= 40


def test_every_document_that_the_code_names_is_there(all_sources: Any) -> None:
    missing = [
        f"{source.path}: {name}"
        for source in all_sources
        for name in re.findall(r"\bdocs/[\w/-]+(?:\.md)?", source.text)
        if not list(ROOT.glob(f"{name}*")) and "://" not in source.text.partition(name)[0][-40:]
    ]
    assert missing == []


def test_every_message_that_the_page_on_troubles_lists_is_one_of_the_code(all_sources: Any) -> None:
    product = [source for source in all_sources if source.path.partition("/")[0] in PACKAGES - {"tests", "benchmarks"}]
    nodes = (node for source in product for node in ast.walk(source.tree) if isinstance(node, ast.Constant))
    said = "\0".join(node.value for node in nodes if isinstance(node.value, str))
    page = (ROOT / "docs/how-to/troubleshooting.md").read_text()
    listed = [text for row in re.findall(r"^\| (.*?) \|", page, re.MULTILINE) for text in re.findall(r"`(.+?)`", row)]
    assert len(listed) > 30
    assert [text for text in listed if any(part.strip(" '") not in said for part in text.split("…"))] == []


def test_the_site_stays_a_book_that_is_read() -> None:
    """At most 46 pages, besides decisions, and 600 words in the README."""
    pages = [path for path in DOCUMENTS if ROOT / "docs" in path.parents and path.parent.name != "decisions"]
    assert len(pages) <= 46
    assert len((ROOT / "README.md").read_text().split()) <= 600
