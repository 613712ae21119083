"""Programs that tests start: a missing one skips a test, and with EDGEADAPT_REQUIRE_BROWSER=1, as in CI, fails it."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

REQUIRED = os.environ.get("EDGEADAPT_REQUIRE_BROWSER") == "1"


def need(what: Any, how: str, *, required: bool = REQUIRED) -> None:
    """Return if ``what`` is there; else skip or fail, saying ``how`` to get it."""
    if not what:
        pytest.fail(how) if required else pytest.skip(how)


def node() -> str:
    program = shutil.which("node")
    need(program, "no node on the path: apt install nodejs")
    return str(program)


READER = Path(__file__).resolve().parents[1] / "vectors" / "reader"


def other_reader(folder: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``tests/vectors/reader``, which shares no code with the project, answers to cases (``main.mjs``)."""
    command, text = [node(), str(READER / "main.mjs"), str(folder)], json.dumps(cases)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers
