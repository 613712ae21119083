"""What `make exhaustive` runs: all cases of the matrices of which `make test` runs a few.

CI runs it again for a file of tests whose sources changed: ``exhaustive.json`` has the digest for which it last passed.

    python -m tests.support.exhaustive all              # the files of tests, one a line
    python -m tests.support.exhaustive changed          # those whose sources changed
    python -m tests.support.exhaustive passed FILE…     # note the sources for which they passed
"""

import json
import sys
import tomllib
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PASSED = ROOT / "tests" / "exhaustive.json"
EXPORTER = ("edgeadapt/bases", "edgeadapt/methods", "export/causal", "export/onnx")
WEBGPU = tuple(f"client/browser/page/{name}.js" for name in ("engine", "learning/trainer", "runtime"))
SOURCES = {  # file of tests → what its cases depend on, besides itself
    "tests/attacks/test_29_files_that_never_end.py": (
        *("client/cli", "client/inference", "client/node", "coordinator/cli"),
        *("edgeadapt", "export/bundle", "export/cli"),
    ),
    "tests/benchmarks/test_bench_simulation.py": ("benchmarks/simulation", "simulations/engine"),
    "tests/benchmarks/test_flowerengine.py": ("benchmarks/simulation", "simulations/engine"),
    "tests/edgeadapt/bases/test_readers.py": ("edgeadapt/bases/readers.py", "edgeadapt/formats/policy.py"),
    "tests/export/causal/test_builder.py": EXPORTER,
    "tests/export/causal/test_traced.py": EXPORTER,
    "tests/export/causal/test_training.py": EXPORTER,
    "tests/export/causal/test_vectors.py": EXPORTER,
    "tests/export/causal/test_virtual_tokens.py": EXPORTER,
    "tests/export/cli/test_bases.py": ("edgeadapt/bases", "export/cli", "export/prune.py"),
    "tests/export/cli/test_peft_methods.py": ("edgeadapt/methods", "export"),
    "tests/browser/test_learning.py": WEBGPU,
    "tests/browser/test_webgpu.py": WEBGPU,
    "tests/export/cli/test_peft_recipes.py": ("client/learning", "client/training", "edgeadapt/methods", "export"),
    "tests/export/onnx/test_cut.py": EXPORTER,
    "tests/export/onnx/test_families.py": EXPORTER,
    "tests/export/onnx/test_rows.py": EXPORTER,
    "tests/export/onnx/test_training.py": EXPORTER,
    "tests/export/test_architectures.py": (*EXPORTER, "docs/reference/methods.md"),
    "tests/integration/test_faults.py": (
        *("aggregation", "benchmarks/faults", "client/gateway", "client/node", "coordinator", "edgeadapt/formats"),
    ),
    "tests/simulations/engine/test_bases.py": ("client/training", "edgeadapt/methods", "export", "simulations"),
    "tests/simulations/engine/test_language.py": ("client/training", "edgeadapt/methods", "simulations"),
    "tests/integration/test_methods.py": ("client/training", "edgeadapt/methods", "export/causal", "export/onnx"),
    "tests/properties/test_large_cohorts.py": ("aggregation",),
}


def few(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Cases of a matrix, of which those not ``kept`` are left to `make exhaustive`."""
    return [case if case in kept else pytest.param(case, marks=pytest.mark.exhaustive) for case in cases]


def digest(file: str) -> str:
    """SHA-256, hex, of the paths and the contents of a file of tests and its sources, and of what the project needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = sha256(json.dumps([project["dependencies"], project["optional-dependencies"]]).encode())
    for path in sorted({*_files(ROOT / file), *_all(SOURCES[file])}):
        found.update(f"{path.relative_to(ROOT).as_posix()}\0{sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


def changed() -> list[str]:
    """The files of tests whose sources are not those for which all their cases last passed."""
    passed = json.loads(PASSED.read_text()) if PASSED.exists() else {}
    return [file for file in SOURCES if passed.get(file) != digest(file)]


def note(files: Iterable[str]) -> None:
    """Note the sources for which all cases of files passed."""
    passed = json.loads(PASSED.read_text()) if PASSED.exists() else {}
    passed |= {file: digest(file) for file in files}
    PASSED.write_text(json.dumps(passed, indent=2, sort_keys=True) + "\n")


def _all(folders: Iterable[str]) -> Iterator[Path]:
    return (file for folder in folders for file in _files(ROOT / folder))


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


if __name__ == "__main__":
    if sys.argv[1] == "passed":
        note(sys.argv[2:] or SOURCES)
    else:
        print(*(SOURCES if sys.argv[1] == "all" else changed()), sep="\n")
