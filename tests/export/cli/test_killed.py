"""An export that is killed leaves the old bundle as it was, and the next one deletes what it left."""

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


@pytest.mark.slow
def test_the_next_export_deletes_what_a_killed_one_left(
    export: Callable[..., Any], key: Path, tiny_base: Base, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    command = ("make", "--base", str(tiny_base.folder), "--bundle", str(out), "--key", str(key))
    with subprocess.Popen(
        [sys.executable, "-m", "edgeadapt", "bundle", *command], stderr=subprocess.DEVNULL
    ) as process:
        while not (left := sorted(tmp_path.glob(f"{HIDDEN}*/content/*"))):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert left[0].exists()
    assert not out.exists()
    assert export(*command).code == 0
    assert list(tmp_path.glob(f"{HIDDEN}*")) == []
    assert out.is_dir()
