"""An export that is ended leaves the old bundle as it was; the next one deletes what a killed one left."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeadapt.bases.base import Base
from edgeadapt.formats.workfolder import HIDDEN
from edgeadapt.program import TERMINATED
from tests.support.traces import ROOT


@pytest.mark.slow
def test_an_export_that_is_terminated_leaves_nothing_and_the_next_one_deletes_what_a_killed_one_left(
    export: Callable[..., Any], key: Path, tiny_base: Base, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    command = ("make", "--base", str(tiny_base.folder), "--bundle", str(out), "--key", str(key))

    def ended(by: signal.Signals) -> int:
        """The exit code of an export that gets a signal while it writes its files."""
        program = [sys.executable, "-m", "tests.support.traces", "bundle", *command]
        with subprocess.Popen(program, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
            while not list(tmp_path.glob(f"{HIDDEN}*/content/*")):
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.002)
            process.send_signal(by)
        return process.returncode

    before = set(tmp_path.iterdir())
    assert ended(signal.SIGTERM) == TERMINATED
    assert set(tmp_path.iterdir()) == before
    assert ended(signal.SIGKILL) == -signal.SIGKILL
    assert list(tmp_path.glob(f"{HIDDEN}*/content/*"))
    assert not out.exists()
    assert export(*command).code == 0
    assert list(tmp_path.glob(f"{HIDDEN}*")) == []
    assert out.is_dir()
