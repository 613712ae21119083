"""`edgeadapt new`: the scenario is one that `simulate` reads, and the fleet is one that runs."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from client.node.app import app as client_app
from coordinator.app import STATE
from coordinator.app import app as server_app
from coordinator.statedir import CoordinatorStateDir
from coordinator.transport import RUN_ID, SERVER_NODE
from edgeadapt.cli import doctor
from edgeadapt.cli.doctor import FAIL, OK, PURPOSES, clock_row, import_errors
from edgeadapt.commandline import program
from simulations.data import populate
from simulations.engine.grid import FaultModel, InProcessGrid
from simulations.scenario import read_scenario
from simulations.suite.run import abort_warning
from tests.support import Run


def test_the_scenario_is_of_eight_clients_whose_rounds_need_not_abort(run: Run, tmp_path: Path) -> None:
    code, out, err = run("new", tmp_path / "mine")
    assert (code, err) == (0, "")
    assert f" simulate run {tmp_path / 'mine' / 'scenario.toml'}\n" in out
    scenario = read_scenario(tmp_path / "mine" / "scenario.toml", ())
    loaded = populate(scenario.data, scenario.population, scenario.seed)
    clients = loaded.population.clients
    assert (len(clients), sum(client.unseen for client in clients)) == (8, 2)
    assert loaded.facts is not None
    assert loaded.facts.broken == ()
    for client in clients:  # or local is no fair arm
        assert {one.label for one in client.train} == {one.label for one in client.test}
    assert abort_warning(scenario, 6) == ""


def test_the_program_is_what_the_shell_can_find(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "a b" / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program() == "'a b/python' -m edgeadapt"
    (tmp_path / "edgeadapt").write_text("#!/bin/sh\n")
    (tmp_path / "edgeadapt").chmod(0o755)
    assert program() == "edgeadapt"


def test_a_folder_with_a_file_is_left_as_it_is(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    code, out, err = run("new", tmp_path / "mine", "--fleet")
    assert (code, out) == (2, "")
    assert err == f"edgeadapt: {tmp_path / 'mine'} exists and is not an empty folder: choose another name\n"
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes"]


def test_a_fleet_that_cannot_be_made_leaves_nothing(run: Run, tmp_path: Path) -> None:
    code, _, err = run("new", tmp_path / "fleet", "--fleet", "--base", "nowhere", "--quiet")
    assert code != 0
    assert "nowhere" in err
    assert list(tmp_path.iterdir()) == []


def test_the_devices_of_a_fleet_finish_its_rounds(run: Run, tmp_path: Path, tiny_base: Any, one_thread: None) -> None:
    code, out, err = run("new", tmp_path / "fleet", "--fleet", "--base", tiny_base.folder, "--port", 9555)
    assert code == 0, err
    assert "edgeadapt coordinator publish coordinator " in err  # the commands that made it
    assert out.endswith(f"next: {tmp_path / 'fleet' / 'start.sh'}\n")
    names = ("ann", "ben", "cleo")
    nodes = {number: str(tmp_path / "fleet" / "devices" / name) for number, name in enumerate(names, SERVER_NODE + 1)}
    state = tmp_path / "fleet" / "coordinator"
    grid = InProcessGrid(client_app, nodes, FaultModel(0, 0.0, 1.0))
    server_app(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), {STATE: str(state)}))
    assert [(record.aborted, record.survivors) for record in CoordinatorStateDir.open(state).registry.rounds()] == [
        (None, names)
    ] * 2
    script = tmp_path / "fleet" / "start.sh"
    assert os.access(script, os.X_OK)
    assert "127.0.0.1:9555 " in script.read_text()
    assert subprocess.run(["sh", "-n", script]).returncode == 0


# `edgeadapt doctor`: what is broken is found, what is missing is no error, and nothing is needed to run it.
ROOT = Path(__file__).parents[3]


def test_each_extra_has_a_row_and_a_purpose_and_a_broken_package_fails(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(PURPOSES) == set(extras)
    errors: dict[str, str] = {}
    monkeypatch.setattr(doctor, "import_errors", lambda modules: errors)
    code, out, err = run("doctor", "--json")
    assert (code, err) == (0, "")
    rows = {row["name"]: row for row in json.loads(out)["checks"]}
    assert {"needs", "cores", "memory", "disk", "clock", "packages", *extras} <= set(rows)
    assert {"click", "numpy"} <= set(rows["needs"]["versions"])
    assert rows["gateway"]["status"] == OK
    errors["grpcio"] = "ImportError: a library is missing"
    code, out, err = run("doctor")
    assert code == 1
    assert "\nFAIL     gateway        grpcio " in out
    assert "gateway" in err
    assert err.count("\n") == 1


def test_a_package_is_broken_if_its_import_raises_or_ends_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raises.py").write_text("raise OSError('libx.so: cannot\\nopen')")
    (tmp_path / "ends.py").write_text("import os; os._exit(3)")
    (tmp_path / "speaks.py").write_text("print('hello')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert import_errors({name: name for name in ("raises", "speaks", "ends", "json")}) == {
        "raises": "OSError: libx.so: cannot open",
        "speaks": "",
        "ends": "its import ends Python with code 3",
        "json": "",
    }


def test_a_clock_that_was_never_set_or_jumps_fails() -> None:
    now = 1_800_000_000.0
    assert [clock_row(*pair).status for pair in ((now, 0.0), (0.0, 0.0), (now, -30.0))] == [OK, FAIL, FAIL]


def test_it_and_new_run_on_the_bare_install() -> None:
    block = "import sys; sys.modules.update(dict.fromkeys(['flwr', 'rich', 'sqlalchemy', 'torch', 'packaging']))"
    script = f"{block}; from edgeadapt.cli import doctor, new"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
