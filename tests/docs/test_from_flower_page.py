"""The page for users of Flower: its app runs on this version of Flower, and its table names keys that exist."""

import re
import runpy
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from safetensors.numpy import load_file

from coordinator.transport import RUN_ID, SERVER_NODE
from edgeadapt.bases.base import Base
from simulations.engine.grid import FaultModel, InProcessGrid
from simulations.scenario import Scenario

PAGE = (Path(__file__).parents[2] / "docs/how-to/from-flower.md").read_text()
APP, SIMULATION = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_app_to_migrate_trains_an_adapter_with_flower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Base, one_thread: None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("app.py").write_text(APP)
    Path("texts.csv").write_text("turn on the light,0\nplay music,1\n")
    app = runpy.run_path("app.py")
    config = {"base": str(tiny_base.folder), "labels": 2, "rounds": 1}

    def client(message: Message, context: Context) -> Message:
        own = Context(RUN_ID, context.node_id, {"texts": "texts.csv"}, RecordDict(), config)
        return app["client"](message, own)  # type: ignore[no-any-return]

    nodes = {SERVER_NODE + number: str(number) for number in (1, 2)}
    grid = InProcessGrid(client, nodes, FaultModel(0, 0.0, 1.0))
    app["server"](grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), config))
    assert any(value.any() for name, value in load_file("adapter.safetensors").items() if "lora_B" in name)


def test_the_simulation_and_the_table_name_keys_of_a_scenario() -> None:
    keys = {key for key, _ in Scenario.fields()}
    used = re.findall(r"^    (\w+__\w+)=", SIMULATION, re.MULTILINE)
    assert len(used) == 5
    assert {key.replace("__", ".") for key in used} <= keys
    rows = re.findall(r"^\|[^|]*\| (.*) \|$", PAGE, re.MULTILINE)
    named = re.findall(r"`((?:base|adapter|federation|personal)[a-z_.]*)`", "\n".join(rows))
    assert len(named) > 6
    assert all(any(key == name or key.startswith(f"{name}.") for key in keys) for name in named)
