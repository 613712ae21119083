"""What a coordinator sends to be run is names: no code of its, and nothing to install."""

import subprocess
import sys
import tomllib
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

BUNDLE = Path(__file__).resolve().parents[2] / "coordinator" / "flower"
LARGEST = 4096  # bytes, compressed


@pytest.fixture(scope="module")
def sent() -> dict[str, str]:
    """The files of the bundle as Flower builds it: path → text."""
    from flwr.cli.build import build_fab_from_disk

    packed = build_fab_from_disk(BUNDLE)
    assert len(packed) < LARGEST
    with zipfile.ZipFile(BytesIO(packed)) as archive:
        return {name: archive.read(name).decode("utf-8") for name in archive.namelist()}


def test_the_bundle_holds_its_settings_and_no_code(sent: dict[str, str]) -> None:
    assert set(sent) == {"pyproject.toml", ".info/CONTENT"}
    assert [path.name for path in BUNDLE.rglob("*")] == ["pyproject.toml"]


def test_the_bundle_installs_nothing(sent: dict[str, str]) -> None:
    assert tomllib.loads(sent["pyproject.toml"])["project"]["dependencies"] == []


def test_flower_finds_both_apps_in_the_installed_package(sent: dict[str, str]) -> None:
    from flwr.cli.config_utils import load_and_validate

    config, warnings = load_and_validate(BUNDLE / "pyproject.toml")
    components = config["tool"]["flwr"]["app"]["components"]
    assert components == {"serverapp": "coordinator.app:app", "clientapp": "client.node.app:app"}
    assert not warnings


def test_the_bundle_takes_the_coordinators_folder_and_gateway_as_the_app_reads_them(sent: dict[str, str]) -> None:
    from coordinator.launch import GATEWAY, JSON, STATE

    assert tomllib.loads(sent["pyproject.toml"])["tool"]["flwr"]["app"]["config"] == {
        GATEWAY: "",
        STATE: "",
        JSON: False,
    }


def test_the_bundles_version_is_the_packages() -> None:
    package = tomllib.loads((BUNDLE.parents[1] / "pyproject.toml").read_text())["project"]
    bundle = tomllib.loads((BUNDLE / "pyproject.toml").read_text())["project"]
    assert {key: bundle[key] for key in ("name", "version", "license")} == {
        key: package[key] for key in ("name", "version", "license")
    }


def test_a_devices_steps_load_neither_flower_nor_torch() -> None:
    # What carries the bytes is the transport's matter: a light device has no Flower.
    script = "import sys, client.node.step; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=BUNDLE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "client.node.step" in loaded
    assert not loaded & {"flwr", "grpc", "torch", "transformers", "peft", "coordinator"}
