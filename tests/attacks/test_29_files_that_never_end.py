"""A pipe, a device without an end, a folder, or gigabytes of nothing in the place of a file that a command reads.

Whoever can put a file where a device, a coordinator, an authority, an exporter or an auditor reads one could stop it:
a pipe is waited for, ``/dev/zero`` fills the memory. Every command ends in time, in one line, within a bound of memory.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from client.node.app import app as client_app
from coordinator.app import run
from coordinator.statedir import CoordinatorStateDir
from coordinator.transport import SERVER_NODE
from edgeadapt import program
from edgeadapt.formats import storage
from simulations.engine.grid import FaultModel, InProcessGrid
from tests.support.limits import TooLate, limited
from tests.support.trial import call, make_trial_fleet

PHRASES = [("Light", "turn on the light"), ("Music", "play music"), ("Timer", "set a timer")]
EXAMPLES = [("switch the lamp on", 0, "train"), ("play the song", 1, "train"), ("make it bright", 0, "validation")]
DEVICES = ("attic", "garage", "hall", "kitchen")
SPARSE = 3 * 2**30  # bytes, of which the disk holds none

# command, with paths in a fleet → the files that it reads
COMMANDS: dict[str, tuple[str, ...]] = {
    "device policy --state kitchen": ("kitchen/device.toml",),
    "device enrol --state kitchen --certificate kitchen.pem": (
        "kitchen.pem",
        "kitchen/authority.pem",
        "kitchen/identity.pem",
        "kitchen/revoked.crl",
    ),
    "device enrol --state kitchen --revoked authority/revoked.crl": ("authority/revoked.crl",),
    "device enrol --state new --name new --base base --authority authority/authority.pem "
    "--coordinator coordinator/coordinator.pem": ("authority/authority.pem", "coordinator/coordinator.pem"),
    "bundle list --bundle bundle": (
        "trust.pem",
        "bundle/base/manifest.json",
        "bundle/adapters/global.json",
        "bundle/adapters/global.onnx_adapter",
    ),
    "device infer --bundle bundle light": ("bundle/base/model.onnx", "bundle/base/tokenizer.json"),
    "authority revoke authority": (
        "authority/authority.key",
        "authority/authority.pem",
        "authority/record.jsonl",
    ),
    "authority list authority": ("authority/record.jsonl",),
    "authority issue authority --request kitchen/request.csr": ("kitchen/request.csr",),
    "authority issue authority --name attic --public-key attic.pub": ("attic.pub",),
    "coordinator status coordinator": (
        "coordinator/federation.toml",
        "coordinator/signing.pem",
        "coordinator/authority.pem",
        "coordinator/registry.db",
        "coordinator/transcript/session-000001.log",
    ),
    "coordinator init other --authority authority/authority.pem": ("authority/authority.pem",),
    "coordinator publish empty --peft first --base base": (
        "first/adapter_config.json",
        "first/adapter_model.safetensors",
        "base/config.json",
        "base/tokenizer.json",
    ),
    "audit verify coordinator --revoked authority/revoked.crl": (
        "coordinator/transcript/authority.pem",
        "coordinator/transcript/coordinator.pem",
        "coordinator/transcript/session-000001.log",
        "coordinator/registry.db",
        "authority/revoked.crl",
    ),
    "bundle add --registry coordinator --bundle bundle --key vendor.pem": (
        "vendor.pem",
        "coordinator/signing.pem",
        "coordinator/registry.db",
        "bundle/base/manifest.json",
    ),
    "bundle add --peft first --labels first/labels.txt --bundle bundle --key vendor.pem": (
        "first/adapter_config.json",
        "first/adapter_model.safetensors",
    ),
    "bundle make --base base --bundle new --key vendor.pem": (
        "base/config.json",
        "base/tokenizer.json",
        "base/model.safetensors",
    ),
}
# Nothing in these files is no error: defaults hold, or there is nothing yet. Without a registry an audit says so.
# Logs and weights are as large as their sessions and models; only their formats limit them.
SOUND = {
    ("coordinator/registry.db", "dangling"),
    ("coordinator/transcript/session-000001.log", "sparse"),
    ("base/model.safetensors", "sparse"),
    ("kitchen/revoked.crl", "dangling"),
    ("authority/record.jsonl", "empty"),
    ("coordinator/federation.toml", "empty"),
    ("coordinator/registry.db", "empty"),
    ("coordinator/transcript/session-000001.log", "empty"),
}


def pipe(path: Path) -> None:
    os.mkfifo(path)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def empty(path: Path) -> None:
    path.touch()


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, SPARSE)


KINDS = (pipe, zeros, folder, dangling, empty, sparse)
CASES = [
    pytest.param(
        command,
        file,
        kind,
        id=f"{command.replace('/', ' ')}: {Path(file).name}: {kind.__name__}",
        marks=() if kind in (pipe, sparse) else pytest.mark.exhaustive,
    )
    for command, files in COMMANDS.items()
    for file in files
    for kind in KINDS
    if (file, kind.__name__) not in SOUND
]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, tiny_base: Any) -> Path:
    """A fleet after a round, with a bundle, a copy of its base, and a coordinator that has published nothing."""
    made = tmp_path_factory.mktemp("fleet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        shutil.copytree(tiny_base.folder, made / "base")
        make_trial_fleet(Path(), str(made / "base"), PHRASES, dict.fromkeys(DEVICES, EXAMPLES), "rounds=1", rank=2)
        call("coordinator", "init", "empty", "--authority", "authority/authority.pem")
        federate(made)
        call("bundle", "key", "vendor.pem")
        shutil.copy("vendor.pub.pem", "trust.pem")
        call("bundle", "make", "--base", "base", "--bundle", "bundle", "--key", "vendor.pem")
        call("bundle", "add", "--registry", "coordinator", "--bundle", "bundle", "--key", "vendor.pem")
        call("device", "enrol", "--state", "kitchen", "--revoked", "authority/revoked.crl")
        shutil.copy("coordinator/coordinator.pem", "attic.pub")
        Path("scenario.toml").write_text("unknown = 1\n")
    return made


def federate(made: Path) -> tuple[Any, ...]:
    """Run the rounds that are still to do; their records."""
    state_dir = CoordinatorStateDir.open(made / "coordinator")
    nodes = {number: str(made / device) for number, device in enumerate(DEVICES, SERVER_NODE + 1)}
    records = tuple(run(state_dir, InProcessGrid(client_app, nodes, FaultModel(0, 0.0, 1.0))))
    state_dir.registry.close()
    return records


@pytest.fixture
def fleet(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "fleet"
    shutil.copytree(template, made)
    monkeypatch.chdir(made)
    return made


@pytest.mark.parametrize(("command", "file", "kind"), CASES)
def test_a_command_ends_in_one_line(
    fleet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, file: str, kind: Any
) -> None:
    path = fleet / file
    assert path.is_file()
    path.unlink()
    kind(path)
    monkeypatch.setattr(sys, "argv", ["edgeadapt", *command.split()])
    with limited(), pytest.raises(SystemExit) as caught:
        program.main()
    out, err = capsys.readouterr()
    assert caught.value.code in (1, 2, 4, 5), out
    assert "Traceback" not in err
    (line,) = [each for each in err.splitlines() if each.startswith("edgeadapt: ")]
    assert "memory" not in line


@pytest.mark.parametrize("kind", [pipe, zeros])
def test_a_command_that_opens_what_it_finds_never_ends(fleet: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    (fleet / "kitchen" / "request.csr").unlink()
    kind(fleet / "kitchen" / "request.csr")
    monkeypatch.setattr(storage, "read", lambda path, limit: path.read_bytes())
    with pytest.raises((TooLate, MemoryError)), limited(2):
        call("authority", "issue", "authority", "--request", "kitchen/request.csr")


@pytest.mark.parametrize(
    ("name", "takes_part"),
    [
        ("certificate.der", False),
        ("sealing.key", False),
        ("adapter.state", False),
        ("session.sealed", True),  # replaced by the new session
        ("examples.jsonl", True),  # with nothing: no answer depends on examples
    ],
)
def test_one_device_with_such_a_file_does_not_stop_a_round(fleet: Path, name: str, takes_part: bool) -> None:
    settings = fleet / "coordinator" / "federation.toml"
    settings.write_text(settings.read_text().replace("rounds = 1 ", "rounds = 2 "))
    (fleet / "kitchen" / name).unlink(missing_ok=True)
    pipe(fleet / "kitchen" / name)
    with limited():
        (record,) = federate(fleet)
    assert record.survivors == (DEVICES if takes_part else DEVICES[:-1])
