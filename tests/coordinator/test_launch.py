"""A run on a SuperLink, with a stand-in for Flower's command line that records its calls and has an answer for each."""

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aggregation.errors import EdgeAdaptError
from coordinator import launch
from coordinator.launch import GATEWAY, JSON, STATE, Connection, connected
from tests.support import refused

FAKE = """
import json, os, pathlib, shutil, sys
folder = pathlib.Path(sys.argv[1])
arguments = sys.argv[2:]
with (folder / "calls.jsonl").open("a") as file:
    file.write(json.dumps(arguments) + "\\n")
for name in ("config.toml",):
    if (path := pathlib.Path(os.environ["FLWR_HOME"]) / name).exists():
        shutil.copy(path, folder)
if "--run-config" in arguments:
    shutil.copy(arguments[arguments.index("--run-config") + 1], folder)
answers = json.loads((folder / "answers.json").read_text())
answer = answers[arguments[0]]
print(answer["out"])
print(answer.get("err", ""), file=sys.stderr)
sys.exit(answer.get("code", 0))
"""
STARTED = {"out": 'some words\n{"success": true, "run-id": "17"}'}


@pytest.fixture
def flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Install the stand-in, with an answer for each of Flower's commands; its folder has what it was called with."""

    def install(**answers: dict[str, Any]) -> Path:
        folder = tmp_path / "flower"
        folder.mkdir()
        (folder / "answers.json").write_text(json.dumps(answers))
        monkeypatch.setattr(launch, "FLWR", (sys.executable, "-c", FAKE, str(folder)))
        return folder

    return install


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


def listed(status: str, details: str = "") -> dict[str, Any]:
    return {"out": json.dumps({"success": True, "runs": [{"status": status, "status-details": details}]})}


@pytest.mark.parametrize("name", ["coordinator", "a folder with 'quotes' and \"more\""], ids=["plain", "quotes"])
def test_a_run_is_started_with_the_bundle_and_the_state_directory(
    flower: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder = flower(run=STARTED)
    with connected("127.0.0.1:8000", tmp_path / "ca.pem", insecure=False) as connection:
        assert connection.start(tmp_path / name) == "17"
    ((command, bundle, used, *_),) = calls(folder)
    assert (command, Path(bundle).name, (Path(bundle) / "pyproject.toml").is_file()) == ("run", "flower", True)
    assert tomllib.loads((folder / "run.toml").read_text()) == {STATE: str(tmp_path / name)}
    assert tomllib.loads((folder / "config.toml").read_text()) == {
        "superlink": {used: {"address": "127.0.0.1:8000", "root-certificates": str(tmp_path / "ca.pem")}}
    }


def test_a_run_that_also_serves_light_devices_is_started_with_the_gateways_address(
    flower: Callable[..., Path], tmp_path: Path
) -> None:
    folder = flower(run=STARTED)
    Connection("mine", {"FLWR_HOME": str(tmp_path)}).start(tmp_path, "0.0.0.0:9443", as_json=True)
    found = tomllib.loads((folder / "run.toml").read_text())
    assert found == {STATE: str(tmp_path), GATEWAY: "0.0.0.0:9443", JSON: True}
    bundle = tomllib.loads((launch.BUNDLE / "pyproject.toml").read_text())
    assert found.keys() == bundle["tool"]["flwr"]["app"]["config"].keys()  # Flower refuses other keys


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"out": '{"success": false, "error-message": "not\\nreachable"}'}, "not reachable"),
        ({"out": "", "err": "Traceback\nNo module named flwr"}, "No module named flwr"),
    ],
)
def test_a_superlink_that_refuses_or_a_command_that_breaks_is_reported_in_one_line(
    flower: Callable[..., Path], tmp_path: Path, said: dict[str, str], text: str
) -> None:
    flower(run={**said, "code": 1})
    with refused(EdgeAdaptError, "superlink") as caught:
        Connection("mine", {"FLWR_HOME": str(tmp_path)}).start(tmp_path)
    assert text in str(caught.value)


@pytest.mark.parametrize("status", ["finished:failed", "finished:stopped", "running"])
def test_a_run_that_did_not_complete_is_an_error_with_its_details(
    flower: Callable[..., Path], tmp_path: Path, status: str
) -> None:
    flower(list=listed(status, "no session after 3 attempts:\n2 devices answered"))
    with refused(EdgeAdaptError, "run", value=status) as caught:
        Connection("mine", {"FLWR_HOME": str(tmp_path)}).require_completed("17")
    assert "2 devices answered" in str(caught.value)
