"""The pages on file formats have every field of the manifests, and every file of a state directory."""

import dataclasses
import re
from pathlib import Path

import pytest

from client.node import statedir as device
from coordinator import statedir as coordinator
from coordinator.backup import BackupManifest
from edgeadapt.formats.manifest import AdapterManifest, BaseManifest, Manifest, VersionManifest
from edgeadapt.formats.roundrecord import RoundRecord
from edgeadapt.releases.actions import ActionRecord

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
