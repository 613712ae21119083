"""Packages of Python's standard library as projects: each has its conventions, and its functions are texts. They are
those of the Python that runs, and differ from one version to the next."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

from aggregation.errors import ConfigError

PACKAGES = (
    "asyncio", "concurrent", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "xml",
)  # fmt: skip
PIECES = 56  # of a package, from all of its files
LONGEST = 360  # characters of a piece, some 120 tokens
FEWEST = 3  # lines of a piece


def rows() -> Iterator[dict[str, str]]:
    """Yield pieces of each package, for ``data.function``: functions and methods, or their first lines. No two overlap,
    and none is of a test. Raises ConfigError."""
    for package in PACKAGES:
        folder = Path(sysconfig.get_path("stdlib"), package)
        files = (path for path in sorted(folder.rglob("*.py")) if "test" not in path.relative_to(folder).parts)
        found = [piece for path in files for piece in pieces(path)]
        if not found:
            reason = f"{folder} has no Python sources: install those of the standard library"
            raise ConfigError(reason, about="data.function")
        yield from ({"project": package, "text": text} for text in found[:: -(-len(found) // PIECES)])


def pieces(path: Path) -> Iterator[str]:
    """Yield the functions and methods of a file, without those within functions; of long ones the first lines."""
    source = path.read_text(encoding="utf-8")
    lines, module = source.splitlines(keepends=True), ast.parse(source)
    classes = (node.body for node in module.body if isinstance(node, ast.ClassDef))
    for node in (node for body in (module.body, *classes) for node in body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text, begin = "", min(one.lineno for one in (node, *node.decorator_list))
            for line in dedent("".join(lines[begin - 1 : node.end_lineno])).splitlines(keepends=True):
                if len(text + line) > LONGEST:
                    break
                text += line
            if text.count("\n") >= FEWEST:
                yield text
