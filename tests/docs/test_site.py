"""The generated pages name every command, option and scenario key; the site fetches nothing from another origin."""

import dataclasses
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
from flwr.app import Context, Message, RecordDict
from safetensors.numpy import load_file

from client.node import statedir as device
from client.node.policy import EligibilitySettings, PolicySettings
from client.training.hygiene import HygieneSettings
from coordinator import statedir as coordinator
from coordinator.backup import BackupManifest
from coordinator.transport import RUN_ID, SERVER_NODE
from edgeadapt.bases.base import Base
from edgeadapt.formats.manifest import AdapterManifest, BaseManifest, Manifest, RoundRecord, VersionManifest
from edgeadapt.releases.actions import ActionRecord
from simulations.engine.grid import FaultModel, InProcessGrid
from simulations.scenario import Scenario

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_of_commands_have_every_command_with_its_options(hooks: ModuleType) -> None:
    pages = {name: f"\n{hooks.commands(name)}" for name in hooks.top()}
    commands = {path: command for path, command in hooks.walk() if " " in path}
    assert len(commands) > 20
    for path, command in commands.items():
        name = path.removeprefix("edgeadapt ")
        section = re.split(r"\n##", re.split(rf"\n#+ {name}\n", pages[name.split()[0]])[1])[0]
        assert section, path
        if not isinstance(command, click.Group):
            shown = [each for each in command.params if isinstance(each, click.Option) and not each.hidden]
            named = {option for each in shown for option in each.opts}
            assert [option for option in named if option not in section] == [], path


def test_the_page_of_the_command_line_links_to_each_page_of_commands(hooks: ModuleType) -> None:
    assert re.findall(r"\(commands/(.+)\.md\)", hooks.index()) == list(hooks.top())


def test_the_page_of_scenario_keys_has_a_row_for_each_key(hooks: ModuleType) -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| `.+` \| .+ \|$", hooks.keys(), re.MULTILINE)
    assert {"seed", "federation.rounds", "adapter.rank"} < set(rows)
    assert len(rows) == hooks.keys().count("\n") - 1


def test_the_page_of_a_devices_policy_has_a_row_for_each_limit_and_condition(hooks: ModuleType) -> None:
    for kind, table in (
        (PolicySettings, hooks.policy()),
        (EligibilitySettings, hooks.eligibility()),
        (HygieneSettings, hooks.data()),
    ):
        rows = re.findall(r"^\| `(\w+)` \| `(.+)` \| (.+) \|$", table, re.MULTILINE)
        fields = kind.model_fields.items()
        assert rows == [(name, json.dumps(field.default), field.description) for name, field in fields]


def test_every_mark_of_a_page_is_replaced(hooks: ModuleType) -> None:
    marked = [path for path in (ROOT / "docs").rglob("*.md") if "<!-- generated:" in path.read_text()]
    assert len(marked) > 3
    for path in marked:
        assert "<!-- generated:" not in hooks.on_page_markdown(path.read_text())


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    # Not --quiet, with which mkdocs counts no warning, and --strict lets all of them pass.
    assert done.returncode == 0, [line for line in (done.stdout + done.stderr).splitlines() if "INFO" not in line]
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        fetched = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"?(https?:[^\s\">]+)", page.read_text())
        assert fetched == [], page.name


# The pages on file formats


REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"
PAGE = "\n".join((REFERENCE / name).read_text(encoding="utf-8") for name in ("bundle-format.md", "file-formats.md"))
TABLES: dict[str, type[Manifest]] = {
    "## Base manifest": BaseManifest,
    "## Adapter manifest": AdapterManifest,
    "### Registry": VersionManifest,
    "### Round record": RoundRecord,
    "### Action record": ActionRecord,
    "### Backup of a coordinator": BackupManifest,
}


@pytest.mark.parametrize("heading", TABLES)
def test_a_manifests_table_has_its_fields_in_order(heading: str) -> None:
    section = PAGE.partition(f"\n{heading}\n")[2].partition("\n##")[0]
    rows = re.findall(r"^\| (`.+?`) \| ", section, re.MULTILINE)
    fields = [field.name for field in dataclasses.fields(TABLES[heading])]  # type: ignore[arg-type]
    assert re.findall(r"`(\w+)`", " ".join(rows)) == fields
    assert f"`{TABLES[heading].payload_type()}`" in PAGE


@pytest.mark.parametrize(
    ("heading", "names"),
    [
        ("## Coordinator's state directory", [coordinator.KEY, coordinator.PUBLIC_KEY, coordinator.REVOKED]),
        ("## Device's state directory", [device.SETTINGS, device.STATE, device.LOG_STATE, device.EXAMPLES]),
    ],
)
def test_a_state_directory_has_its_files(heading: str, names: list[str]) -> None:
    section = PAGE.partition(f"\n{heading}\n")[2].partition("\n## ")[0]
    assert [name for name in names if name not in section] == []


# The page for users of Flower: its app runs on this version of Flower, and its table names keys that exist.
FROM_FLOWER = (Path(__file__).parents[2] / "docs/how-to/from-flower.md").read_text()
APP, SIMULATION = re.findall(r"^```python\n(.*?)^```", FROM_FLOWER, re.MULTILINE | re.DOTALL)


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
    rows = re.findall(r"^\|[^|]*\| (.*) \|$", FROM_FLOWER, re.MULTILINE)
    named = re.findall(r"`((?:base|adapter|federation|personal)[a-z_.]*)`", "\n".join(rows))
    assert len(named) > 6
    assert all(any(key == name or key.startswith(f"{name}.") for key in keys) for name in named)
