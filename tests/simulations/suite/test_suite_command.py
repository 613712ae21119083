"""`edgeadapt simulate suite` from a file to a report, also after a kill or Ctrl-C, and the mistakes of its users."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from click.testing import CliRunner

import edgeadapt
from edgeadapt import program
from tests.support import refused

ARMS = """
name = "tiny"
scenario = "tiny.toml"
seeds = [0]
baseline = "local"
search.seeds = [7]
arms.base.kind = "base"
arms.local = {kind = "local", search = {"local.learning_rate" = [0.01, 0.03]}}
arms.ridge.kind = "ridge-head"
arms.personal.kind = "personal"
"""
PAGE = Path(__file__).parents[3] / "docs/reference/python.md"
Outcome = tuple[int, str, str]


@pytest.fixture(scope="module")
def suite(scenario_file: Path) -> Path:
    path = scenario_file.with_name("suite.toml")
    path.write_text(ARMS)
    return path


def words(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "edgeadapt", "simulate", *map(str, arguments)]


@pytest.fixture(scope="module")
def finished(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A suite that was killed once, went on, and what it printed then."""
    out = tmp_path_factory.mktemp("suites") / "with a space"
    process = subprocess.Popen(words("suite", suite, "--out", out, "--jobs", 2, "--json"), stdout=subprocess.DEVNULL)
    results = out / "results"
    deadline = time.monotonic() + 300
    while not (results.exists() and any(results.iterdir())):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in results.iterdir()}
    arguments = ["simulate", "suite", suite, "--out", out, "--jobs", 2, "--json", "--quiet", "--resume"]
    done = CliRunner().invoke(program.cli, list(map(str, arguments)))  # its processes are those of further tests
    assert (done.exit_code, done.stderr) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # nothing that was finished is computed again
    return out, json.loads(done.stdout)


def test_python_resumes_it_and_has_the_same_figures(
    suite: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, printed = finished
    with refused(edgeadapt.ConfigError, "out") as caught:
        edgeadapt.suite(suite, out=out, quiet=True)
    assert "add resume=True to continue it, or choose another out=" in str(caught.value)
    (block,) = re.findall(r"^```python\n(if __name__.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    block = block.replace("households.toml", str(suite)).replace("runs/households", str(out)).replace("=3", "=1")
    (tmp_path / "example.py").write_text(f"import edgeadapt\n{block}")
    done = runpy.run_path(str(tmp_path / "example.py"), run_name="__main__")["report"]
    assert json.dumps(done.summary.to_json()) == json.dumps(printed)
    assert done.report.is_file()
    assert "| personal |" in done._repr_markdown_()
    with refused(edgeadapt.ConfigError, "arms"):
        edgeadapt.suite(suite, arms="local")


@pytest.mark.slow
def test_a_killed_suite_goes_on_and_its_report_has_every_arm_and_pair(
    finished: tuple[Path, dict[str, Any]], run: Callable[..., Outcome]
) -> None:
    out, summary = finished
    assert set(summary["arms"]) == {"base", "local", "ridge", "personal"}
    assert [(pair["first"], pair["second"]) for pair in summary["pairs"]] == [
        ("base", "local"),
        ("ridge", "local"),
        ("personal", "local"),
    ]
    assert summary["clients"] == 5
    assert summary["arms"]["local"]["candidates"] == 2
    assert summary["arms"]["local"]["constants"]["local.learning_rate"] in (0.01, 0.03)
    code, printed, _ = run("simulate", "suite", out, "--json")
    assert (code, json.loads(printed)) == (0, summary)
    code, printed, _ = run("simulate", "suite", out)
    assert code == 0
    assert all(f"| {arm} |" in printed for arm in summary["arms"])


@pytest.mark.slow
def test_a_folder_with_a_suite_is_continued_only_with_resume(
    finished: tuple[Path, dict[str, Any]], suite: Path, run: Callable[..., Outcome]
) -> None:
    code, _, err = run("simulate", "suite", suite, "--out", finished[0])
    assert code == 2
    assert "--resume" in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_finished_suite_computes_nothing_again_and_a_changed_one_only_what_is_new(
    finished: tuple[Path, dict[str, Any]], suite: Path, tmp_path: Path, run: Callable[..., Outcome]
) -> None:
    out = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    changed = suite.with_name("changed.toml")
    changed.write_text(ARMS.replace("ridge-head", "logistic-head"))
    before = {path.name for path in (out / "results").iterdir()}
    code, _, err = run("simulate", "suite", changed, "--out", out, "--resume", "--json", "--jobs", 1)
    assert code == 0, err
    assert len({path.name for path in (out / "results").iterdir()} - before) == 1


@pytest.mark.slow
def test_ctrl_c_ends_the_processes_and_says_how_to_go_on(suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        words("suite", suite, "--out", out, "--jobs", 2), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    workers = _workers(out, 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == program.INTERRUPTED
    assert err.splitlines()[-1] == "edgeadapt: interrupted"
    assert "--resume" in err
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_suite_in_one_line(
    suite: Path, tmp_path: Path, run: Callable[..., Outcome]
) -> None:
    out = tmp_path / "run"
    killer = Thread(target=lambda: os.kill(*_workers(out, 1), signal.SIGKILL))
    killer.start()
    code, _, err = run("simulate", "suite", suite, "--out", out, "--jobs", 1, "--json", "--quiet")
    killer.join()
    assert code == 5
    assert "worker-1.log" in err
    assert "code -9" in err
    assert err.count("\n") == 1


def _workers(out: Path, count: int) -> list[int]:
    """The processes of a suite, once there are so many."""
    deadline = time.monotonic() + 300
    while True:
        words = [path.read_text().split() for path in (out / "logs").glob("*")]
        if len(workers := [int(line[1]) for line in words if len(line) > 1]) == count:
            return workers
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_mistakes_are_named_in_one_line(suite: Path, tmp_path: Path, run: Callable[..., Outcome]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    broken = suite.with_name("broken.toml")
    broken.write_text(ARMS + 'arms.other = {kind = "local", set = {"federation.round" = 3}}\n')
    for arguments, named in (
        (("suite", tmp_path / "absent.toml"), "absent.toml"),
        (("suite", suite, "--out", tmp_path), "not empty"),
        (("suite", suite, "--out", tmp_path / "x", "--seeds", 8), "seed 7"),
        (("suite", broken, "--out", tmp_path / "x"), "federation.rounds"),
        (("suite", suite, "--out", tmp_path / "x", "--set", "seed=3"), "seeds"),
        (("suite", suite, "--out", tmp_path / "x", "--arm", "nobody"), "nobody"),
        (("suite", tmp_path), "no suite"),
    ):
        code, out, err = run("simulate", *arguments)
        assert (code, out) == (2, "")
        assert named in err
        assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    code, _, err = run("simulate", "suite", suite, "--out", tmp_path / "thesis.tex" / "x")
    assert code == 1
    assert err.count("\n") == 1


def test_an_unfinished_or_damaged_suite_has_no_report(suite: Path, tmp_path: Path, run: Callable[..., Outcome]) -> None:
    from simulations.suite.store import SUITE, read_suite, taken

    out = tmp_path / "run"
    with taken(out, read_suite(suite), resume=False):
        code, _, err = run("simulate", "suite", suite, "--out", out, "--resume")
        assert code == 2
        assert "another process" in err
    code, _, err = run("simulate", "suite", out)
    assert code == 5
    assert "not finished" in err
    (out / SUITE).write_text("{}")
    code, _, err = run("simulate", "suite", out)
    assert code == 2
    assert "damaged" in err
