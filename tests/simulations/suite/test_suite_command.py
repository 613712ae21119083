"""`edgeadapt simulate suite` from a file to a report, also after a kill or Ctrl-C, and the mistakes of its users."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from click.testing import CliRunner

import edgeadapt
from aggregation.errors import EdgeAdaptError
from edgeadapt import program
from tests.support import Run, refused
from tests.support.gateway import wait_until

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
LONG = 300.0  # seconds, on a machine that has other work
PAGE = Path(__file__).parents[3] / "docs/reference/python.md"


@pytest.fixture(scope="module")
def suite(scenario_file: Path) -> Path:
    path = scenario_file.with_name("suite.toml")
    path.write_text(ARMS)
    return path


def words(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "edgeadapt", "simulate", *map(str, arguments)]


@dataclass(frozen=True)
class Finished:
    """A suite that was ended twice and then went on."""

    out: Path
    summary: dict[str, Any]  # what it printed at its end
    interrupted: tuple[int, str]  # by Ctrl-C after its first result: code, standard error
    left: list[int]  # its processes that did not end
    killed: BaseException | None  # the error after its only process was killed
    kept: bool  # nothing that was finished is computed again


def resume(suite: Path, out: Path, jobs: int) -> Any:
    arguments = ["simulate", "suite", suite, "--out", out, "--jobs", jobs, "--json", "--quiet", "--resume"]
    return CliRunner().invoke(program.cli, list(map(str, arguments)))  # its processes are those of further tests


@pytest.fixture(scope="module")
def finished(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("suites") / "with a space"
    results = out / "results"
    process = subprocess.Popen(
        words("suite", suite, "--out", out, "--jobs", 2), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    workers = _workers(out, 2)
    wait_until(lambda: process.poll() is not None or (results.exists() and any(results.iterdir())), LONG)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LONG)
    left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    kept = {path: path.stat().st_mtime_ns for path in results.iterdir()}
    shutil.rmtree(out / "logs")
    killer = Thread(target=lambda: os.kill(*_workers(out, 1), signal.SIGKILL))
    killer.start()
    killed = resume(suite, out, 1).exception
    killer.join()
    done = resume(suite, out, 2)
    assert (done.exit_code, done.stderr) == (0, "")
    same = {path: path.stat().st_mtime_ns for path in kept} == kept
    return Finished(out, json.loads(done.stdout), (process.returncode, err), left, killed, same)


@pytest.mark.slow
def test_ctrl_c_ends_the_processes_and_says_how_to_go_on_with_what_was_finished(finished: Finished) -> None:
    code, err = finished.interrupted
    assert code == program.INTERRUPTED
    assert err.splitlines()[-1] == "edgeadapt: interrupted"
    assert "--resume" in err
    assert "Traceback" not in err
    assert finished.left == []
    assert finished.kept


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_suite_in_one_line(finished: Finished) -> None:
    assert isinstance(finished.killed, EdgeAdaptError)
    assert finished.killed.exit_code == 5
    assert re.search(r"code -9.*worker-1\.log|worker-1\.log.*code -9", str(finished.killed))


def test_python_resumes_it_and_has_the_same_figures(suite: Path, finished: Finished, tmp_path: Path) -> None:
    out, printed = finished.out, finished.summary
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
def test_a_suite_that_went_on_has_every_arm_and_pair_in_its_report(finished: Finished, run: Run) -> None:
    out, summary = finished.out, finished.summary
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
def test_a_folder_with_a_suite_is_continued_only_with_resume(finished: Finished, suite: Path, run: Run) -> None:
    code, _, err = run("simulate", "suite", suite, "--out", finished.out)
    assert code == 2
    assert "--resume" in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_finished_suite_computes_nothing_again_and_a_changed_one_only_what_is_new(
    finished: Finished, suite: Path, tmp_path: Path, run: Run
) -> None:
    out = Path(shutil.copytree(finished.out, tmp_path / "copy"))
    changed = suite.with_name("changed.toml")
    changed.write_text(ARMS.replace("ridge-head", "logistic-head"))
    before = {path.name for path in (out / "results").iterdir()}
    code, _, err = run("simulate", "suite", changed, "--out", out, "--resume", "--json", "--jobs", 1)
    assert code == 0, err
    assert len({path.name for path in (out / "results").iterdir()} - before) == 1


def _workers(out: Path, count: int) -> list[int]:
    """The processes of a suite, once there are so many."""

    def found() -> list[int]:
        words = [path.read_text().split() for path in (out / "logs").glob("*")]
        return [int(line[1]) for line in words if len(line) > 1]

    wait_until(lambda: len(found()) == count, LONG)
    return found()


def test_mistakes_are_named_in_one_line(suite: Path, tmp_path: Path, run: Run) -> None:
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


def test_an_unfinished_or_damaged_suite_has_no_report(suite: Path, tmp_path: Path, run: Run) -> None:
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
