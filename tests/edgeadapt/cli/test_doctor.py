"""`edgeadapt doctor`: what is broken is found, what is missing is no error, and nothing is needed to run it."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from edgeadapt.cli import doctor
from edgeadapt.cli.doctor import FAIL, OK, PURPOSES, clock_row, import_errors
from tests.support import Run

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
