"""A folder in which the commands of a page are run, as a reader of the page would."""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Block:
    """Commands of a page, and the output that the page shows before its next commands."""

    commands: str
    shown: str


def blocks_of(page: Path) -> Iterator[Block]:
    """The ``sh`` blocks of a page in order, each with the ``text`` blocks after it."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    starts = [index for index, (kind, _) in enumerate(fences) if kind == "sh"]
    for start, end in itertools.pairwise([*starts, len(fences)]):
        yield Block(fences[start][1], "".join(text for kind, text in fences[start + 1 : end] if kind == "text"))


@dataclass(frozen=True)
class Reader:
    """Runs commands in ``folder``, where ``edgeadapt`` is this checkout, with the graphs that were traced before."""

    folder: Path
    programs: Path

    def run(self, commands: str) -> str:
        """What the commands print; the test fails if one of them fails."""
        # Flower looks each second for a message to start a process for.
        settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
        path = os.pathsep.join([str(self.programs), str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            ["sh", "-euc", commands],
            cwd=self.folder,
            env={**os.environ, **settings, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}"
        return done.stdout


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = tmp_path_factory.mktemp("reader")
    program = folder / "bin" / "edgeadapt"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.support.traces "$@"\n')
    program.chmod(0o755)
    (folder / "work").mkdir()
    return Reader(folder / "work", program.parent)


@pytest.fixture(scope="session")
def blocks() -> Callable[[str], list[Block]]:
    """The blocks of a page, by its path below ``docs``."""
    return lambda name: list(blocks_of(ROOT / "docs" / name))
