"""The page on real machines: its commands on loopback, its systemd units, and its files for containers."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from flwr.common.config import parse_config_args
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

from aggregation.entropy import SystemEntropy
from aggregation.errors import TrustError
from aggregation.pki.identity import IdentityKey
from client.node.statedir import DeviceStateDir
from coordinator.gateway.places import DESCRIPTORS
from coordinator.statedir import AUTHORITY, KEY, PUBLIC_KEY, CoordinatorStateDir
from edgeadapt import program
from edgeadapt.authority import AuthorityStore
from edgeadapt.formats.keyfiles import TLS_KEY, read_public_keys
from edgeadapt.formats.registryfiles import BLOBS, DATABASE, TRANSCRIPT
from tests.support.gateway import free_port, wait_until
from tests.support.trial import call

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "deploy"
UNITS = sorted((FOLDER / "systemd").iterdir())
PROGRAM = "/opt/edgeadapt/bin/edgeadapt"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
MANIFESTS = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
SET, SERVICE = (next(each for each in MANIFESTS if each["kind"] == kind)["spec"] for kind in ("StatefulSet", "Service"))
TEMPLATE = SET["template"]["spec"]
POD, COORDINATOR = TEMPLATE["containers"][0], COMPOSE["services"]["coordinator"]


@pytest.fixture(scope="module")
def page(reader: Any, blocks: Callable[[str], list[Any]], tiny_base: Any) -> Path:
    """The folder in which the blocks of the page were run."""
    seed = ("--phrases", reader.folder / "phrases.tsv", "--rank", 2, "--out", reader.folder / "first")
    (reader.folder / "phrases.tsv").write_text("light_on\tturn on the light\nlight_off\tturn off the lamp\n")
    call("base", "start", "--base", tiny_base.folder, *seed)
    commands = "\n".join(block.commands for block in blocks("how-to/deploy.md"))
    for port in ("9443", "9444"):
        commands = commands.replace(port, str(free_port()))
    reader.run(f"BASE='{tiny_base.folder}'\n{commands}")
    return Path(reader.folder)


@pytest.mark.slow
def test_keys_that_were_rotated_are_in_use_and_the_old_ones_are_not(page: Path) -> None:
    state_dir, authority = CoordinatorStateDir.open(page / "fleet"), AuthorityStore(page / "authority")
    state_dir.read_tls(datetime.now(UTC))  # the certificate is for the new key
    assert (page / "restored" / "fleet" / TLS_KEY).read_bytes() != (page / "fleet" / TLS_KEY).read_bytes()
    revoked = state_dir.read_root(datetime.now(UTC))
    with pytest.raises(TrustError):
        revoked.verify(DeviceStateDir.open(page / "kitchen").certificate, datetime.now(UTC))
    renewed = DeviceStateDir.open(page / "kitchen-2")
    assert revoked.verify(renewed.certificate, datetime.now(UTC)) == ("kitchen", renewed.identity.public)
    authority.unlock((page / "passphrase").read_bytes().strip())
    with pytest.raises(TrustError):
        authority.unlock(b"a passphrase that nobody guesses")
    assert len(read_public_keys(page / "trust.pem")) == 2
    state_dir.registry.close()


@pytest.mark.slow
def test_keys_that_cannot_be_rotated_are_refused(page: Path, tmp_path: Path) -> None:
    key, authority = tmp_path / "key", tmp_path / "authority"
    for folder in (key, authority):
        shutil.copytree(page / "fleet", folder)
    (key / KEY).write_bytes(IdentityKey.generate(SystemEntropy()).to_pem())
    with pytest.raises(TrustError):
        call("coordinator", "up", key)
    other = AuthorityStore.create(tmp_path / "other", "another", 30, 30, None)
    (authority / AUTHORITY).write_bytes(other.root.to_pem())
    with pytest.raises(TrustError):
        call("coordinator", "up", authority)


READ_ONLY = """
mount --make-rprivate /
mount --bind "$STATE" "$STATE"
mount --bind "$TMPDIR" "$TMPDIR"
awk '{print $5}' /proc/self/mountinfo | while read -r at; do
  case $at in "$STATE"|"$TMPDIR"|/proc*|/sys*|/dev*) ;; *) mount -o remount,bind,ro "$at" 2>/dev/null || true ;; esac
done
if touch "$STATE/../writable" 2>/dev/null; then exit 99; fi
exec "$@"
"""  # in a mount namespace of its own: nothing can be written but two folders


@pytest.mark.slow
def test_the_coordinator_runs_on_a_read_only_file_system(page: Path, tmp_path: Path) -> None:
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody make a mount namespace")
    state, scratch, shown = tmp_path / "fleet", tmp_path / "scratch", tmp_path / "shown"
    shutil.copytree(page / "fleet", state)
    scratch.mkdir()
    program = [sys.executable, "-m", "edgeadapt", "coordinator", "up", str(state)]
    environment = {"STATE": str(state), "TMPDIR": str(scratch), "HOME": "/nonexistent", "PYTHONPATH": str(ROOT)}
    with shown.open("wb") as file:
        running = subprocess.Popen(
            [*namespace, "sh", "-euc", READ_ONLY, "sh", *program],
            env={**environment, "PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"},
            cwd=tmp_path,
            stderr=file,
        )
    try:
        wait_until(lambda: "rounds ready" in shown.read_text() or running.poll() is not None, seconds=120)
        assert "rounds ready" in shown.read_text(), shown.read_text()
    finally:
        running.terminate()
        running.wait(120)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each file with the words after the program's name of each command in it."""
    for unit in UNITS:
        text = unit.read_text().replace("\\\n", " ")
        yield from ((unit.name, shlex.split(call)) for call in re.findall(rf"^ExecStart={PROGRAM} (.*)$", text, re.M))
    yield "Dockerfile", json.loads(re.findall(r"^CMD (.*)$", (FOLDER / "Dockerfile").read_text(), re.M)[0])
    yield "compose.yaml", COORDINATOR["command"]
    yield "compose.yaml", COORDINATOR["healthcheck"]["test"][2:]
    yield "kubernetes.yaml", POD["args"]
    yield "kubernetes.yaml", POD["livenessProbe"]["exec"]["command"][1:]


def parse(words: list[str]) -> None:
    """Let the program's own parser read a command, with all of its options, and do nothing."""
    command: click.Command = program.cli
    rest = list(words)
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), rest.pop(0))
        assert found is not None, words
        command = found
    command.make_context(command.name, rest)


@pytest.mark.parametrize(("file", "words"), [pytest.param(*each, id=each[0]) for each in commands()])
def test_every_command_is_one_of_the_program(file: str, words: list[str]) -> None:
    parse(words)
    with pytest.raises(click.UsageError):
        parse([*words, "--nonsense"])


def test_every_unit_that_runs_something_has_a_command() -> None:
    services = {unit.name for unit in UNITS if unit.suffix == ".service"}
    found = {file for file, _ in commands() if file.endswith(".service")}
    assert services == found | {"edgeadapt-supernode.service"}
    timed = {unit.stem for unit in UNITS if unit.suffix == ".timer"}
    assert {f"{name}.service" for name in timed} < services


def test_the_unit_of_a_supernode_starts_flowers_program_with_the_device() -> None:
    text = (FOLDER / "systemd" / "edgeadapt-supernode.service").read_text().replace("\\\n", " ")
    words = shlex.split(re.findall(r"^ExecStart=/opt/edgeadapt/bin/flower-supernode (.*)$", text, re.M)[0])
    given = _parse_args_run_supernode().parse_args(words)
    assert not given.insecure
    assert parse_config_args([given.node_config]) == {"state": "/var/lib/edgeadapt/device"}
    assert set(re.findall(r"FLWR_\w+=1|FLWR_TELEMETRY_ENABLED=0", text)) == {
        "FLWR_TELEMETRY_ENABLED=0",
        "FLWR_DISABLE_UPDATE_CHECK=1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1",
    }


def test_the_user_of_the_watch_is_given_what_it_reads_and_no_key() -> None:
    units = {name: (FOLDER / "systemd" / f"edgeadapt-{name}.service").read_text() for name in ("watch", "coordinator")}
    user, owner = (re.findall(r"^User=(.*)$", units[name], re.M)[0] for name in ("watch", "coordinator"))
    assert user != owner
    page = (ROOT / "docs" / "how-to" / "deploy.md").read_text()
    given = [line.split() for line in re.findall(r"^\$ setfacl (.*)$", page, re.M)]
    assert all(
        part.split(":")[-2] == user for words in given for rule in words if ":" in rule for part in rule.split(",")
    )
    files = {word for words in given for word in words if "/" in word}
    assert files == {f"fleet/{name}" for name in (PUBLIC_KEY, DATABASE, BLOBS, TRANSCRIPT)}


def verify(folder: Path) -> str:
    """What systemd says of the units in a folder. Of keys that it does not know it says so, and ends with 0."""
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, sorted(folder.iterdir()))], capture_output=True, text=True
    )
    return f"{done.stderr}{done.returncode or ''}"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    for unit in UNITS:
        (tmp_path / unit.name).write_text(re.sub(r"/opt/edgeadapt/bin/\S+", sys.executable, unit.read_text()))
    assert verify(tmp_path) == ""
    first = tmp_path / "edgeadapt-agent.service"
    first.write_text(first.read_text().replace("ProtectSystem", "ProtectSistem"))
    assert "ProtectSistem" in verify(tmp_path)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_each_service_has_few_rights_by_the_score_of_systemd(tmp_path: Path) -> None:
    def passes(unit: Path) -> bool:
        words = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", "--no-pager", str(unit)]
        return subprocess.run(words, capture_output=True).returncode == 0

    assert [unit.name for unit in UNITS if unit.suffix == ".service" and not passes(unit)] == []
    text = (FOLDER / "systemd" / "edgeadapt-coordinator.service").read_text()
    (tmp_path / "wide.service").write_text(
        re.sub(r"^(CapabilityBoundingSet|SystemCallFilter)=.*\n", "", text, flags=re.M)
    )
    assert not passes(tmp_path / "wide.service")
    assert re.findall(r"^LimitNOFILE=(.*)$", text, re.M) == [str(DESCRIPTORS)]


def test_the_image_is_built_from_what_the_package_consists_of() -> None:
    given = {line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tools = project["tool"]["setuptools"]
    packages = {name.rstrip("*") for name in tools["packages"]["find"]["include"]}
    assert given == {
        "pyproject.toml",
        "setup.py",
        project["project"]["readme"],
        *project["project"]["license-files"],
        *packages,
    }


def test_containers_have_no_rights_and_get_the_keys_as_files() -> None:
    assert re.findall(r"^USER (.*)$", (FOLDER / "Dockerfile").read_text(), re.M) == ["10001:10001"]
    for service in COMPOSE["services"].values():
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        assert "privileged" not in service
    assert TEMPLATE["securityContext"]["runAsNonRoot"]
    assert not TEMPLATE["automountServiceAccountToken"]
    assert POD["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    files = {f"/var/lib/edgeadapt/fleet/{name}" for name in (KEY, TLS_KEY)}
    assert {secret["target"] for secret in COORDINATOR["secrets"]} == files
    assert {mount["mountPath"] for mount in POD["volumeMounts"] if "subPath" in mount} == files
    assert not any("environment" in service or "env_file" in service for service in COMPOSE["services"].values())
    assert "env" not in POD


def test_containers_come_back_after_a_reboot_or_a_drained_node_and_do_not_end_with_their_rounds() -> None:
    """``up`` ends with 0 when it is asked to stop: a policy for failures would leave it down, and a job be complete."""
    assert COORDINATOR["restart"] == "unless-stopped"
    assert (SET["replicas"], TEMPLATE.get("restartPolicy", "Always")) == (1, "Always")
    assert SET["selector"]["matchLabels"] == SET["template"]["metadata"]["labels"] == SERVICE["selector"]
    image = json.loads(re.findall(r"^CMD (.*)$", (FOLDER / "Dockerfile").read_text(), re.M)[0])
    for command in (COORDINATOR["command"], POD["args"], image):
        assert command[:2] == ["coordinator", "up"]
        assert "--stay" in command


def test_probes_use_the_verdict_and_none_of_them_keeps_devices_out_or_restarts_for_want_of_them() -> None:
    assert COORDINATOR["healthcheck"]["test"][2:4] == ["coordinator", "status"]  # Compose only shows it
    assert POD["livenessProbe"]["exec"]["command"][-1] == "--liveness"
    assert POD["readinessProbe"].keys() & {"tcpSocket", "exec"} == {"tcpSocket"}


def test_the_gateway_sees_the_addresses_of_devices() -> None:
    """Otherwise all are one network, which has few places and turns."""
    assert SERVICE["externalTrafficPolicy"] == "Local"


def test_the_compose_file_is_valid_by_the_schema_of_compose(tmp_path: Path) -> None:
    check = pytest.importorskip("check_jsonschema").main

    def code(file: Path) -> int:
        return CliRunner().invoke(check, ["--builtin-schema", "vendor.compose-spec", str(file)]).exit_code

    assert code(FOLDER / "compose.yaml") == 0
    wrong = (FOLDER / "compose.yaml").read_text().replace("read_only:", "read_onli:")
    (tmp_path / "compose.yaml").write_text(wrong)
    assert code(tmp_path / "compose.yaml") == 1


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda each: each["kind"])
def test_each_manifest_is_valid_by_the_schemas_of_kubernetes(manifest: dict[str, Any]) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    kubernetes.validate(manifest, "1.37", strict=True)
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate({**manifest, "specs": {}}, "1.37", strict=True)
