"""The generated pages name every command, option and scenario key; the site fetches nothing from another origin."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

from client.node import statedir as device
from client.node.eligibility import EligibilitySettings
from client.node.policy import PolicySettings
from coordinator import statedir as coordinator
from coordinator.backup import BackupManifest
from edgeadapt.formats.manifest import AdapterManifest, BaseManifest, Manifest, VersionManifest
from edgeadapt.formats.roundrecord import RoundRecord
from edgeadapt.releases.actions import ActionRecord

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
    for kind, table in ((PolicySettings, hooks.policy()), (EligibilitySettings, hooks.eligibility())):
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
