"""`edgeadapt coordinator` as an operator calls it."""

import json
import socket
import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, EdgeAdaptError, TrustError
from aggregation.pki import Authority
from aggregation.pki.identity import IdentityKey, PublicKey
from coordinator import launch
from coordinator.cli import coordinator_group as coordinator
from coordinator.settings import FederationSettings
from coordinator.statedir import CoordinatorStateDir
from tests.support import FleetOf


def call(*arguments: object) -> Result:
    return CliRunner().invoke(coordinator, [str(argument) for argument in arguments])


def refusal(kind: type[EdgeAdaptError], about: str, *arguments: object) -> EdgeAdaptError:
    error = call(*arguments).exception
    assert type(error) is kind, error
    assert error.about == about, error
    assert "\n" not in str(error)
    return error


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    now = datetime.now(UTC)
    made = Authority.create("test", SystemEntropy(), now - timedelta(hours=1), now + timedelta(days=1))
    path = tmp_path / "authority.pem"
    path.write_bytes(made.root.to_pem())
    return path


def test_init_makes_a_key_and_pins_the_authority(tmp_path: Path, authority: Path) -> None:
    folder = tmp_path / "fleet"
    result = call("init", folder, "--authority", authority)
    assert result.exit_code == 0, result.output
    opened = CoordinatorStateDir.open(folder)
    assert opened.settings == FederationSettings()
    assert opened.root.to_pem() == authority.read_bytes()
    assert PublicKey.from_pem((folder / "coordinator.pem").read_bytes()) == opened.key.public
    assert opened.registry.versions() == ()
    assert opened.key.public.key_id in result.output
    assert opened.root.fingerprint in result.output
    opened.registry.close()


def test_only_the_owner_can_read_the_key(tmp_path: Path, authority: Path) -> None:
    call("init", tmp_path / "fleet", "--authority", authority)
    assert stat.S_IMODE((tmp_path / "fleet").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "fleet" / "signing.pem").stat().st_mode) == 0o600
    private = [path for path in (tmp_path / "fleet").iterdir() if path.is_file() and b"PRIVATE" in path.read_bytes()]
    assert [path.name for path in private] == ["signing.pem"]


def test_init_refuses_what_is_wrong_and_leaves_nothing(tmp_path: Path, authority: Path) -> None:
    folder = tmp_path / "fleet"
    refusal(ConfigError, "round", "init", folder, "--authority", authority, "--set", "round=3")
    refusal(ConfigError, "rounds", "init", folder, "--authority", authority, "--set", "rounds=0")
    refusal(ConfigError, "--set", "init", folder, "--authority", authority, "--set", "rounds")
    assert isinstance(call("init", folder, "--authority", tmp_path / "none.pem").exception, FileNotFoundError)
    key = tmp_path / "key.pem"
    key.write_bytes(IdentityKey.generate(SystemEntropy()).public.to_pem())
    assert isinstance(call("init", folder, "--authority", key).exception, TrustError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["authority.pem", "key.pem"]


def test_init_does_not_touch_a_folder_that_holds_something(tmp_path: Path, authority: Path) -> None:
    folder = tmp_path / "fleet"
    call("init", folder, "--authority", authority)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    refusal(ConfigError, "fleet", "init", folder, "--authority", authority)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_status_prints_lines_or_json(fleet_of: FleetOf) -> None:
    fleet = fleet_of(4, rounds=1)
    fleet.federate(fleet.grid())
    folder = fleet.out / "coordinator"
    assert "rounds 1 of 1, 0 aborted" in call("status", folder).output
    found = json.loads(call("status", folder, "--json").stdout)
    assert (found["rounds_done"], found["versions"][-1]["version"]) == (1, 1)


def test_rounds_are_listed_as_lines_or_as_objects_and_those_that_come_are_followed(fleet_of: FleetOf) -> None:
    fleet = fleet_of(3, rounds=2)
    folder, listed = fleet.out / "coordinator", []
    assert call("status", folder, "--rounds").output.count("\n") == 1
    follow = threading.Thread(target=lambda: listed.append(call("status", folder, "--rounds", "--follow", "--json")))
    follow.start()
    fleet.federate(fleet.grid())
    follow.join(60)
    assert [json.loads(line)["round"] for line in listed[0].output.splitlines()] == [1, 2]
    lines = call("status", folder, "--rounds").output.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["1", "1", "3"], ["2", "2", "3"]]


def test_a_dashboard_says_what_is_wrong_before_it_listens(fleet_of: FleetOf, tmp_path: Path) -> None:
    folder = fleet_of(3).out / "coordinator"
    refusal(ConfigError, "--listen", "dashboard", folder, "--listen", "nowhere")
    refusal(ConfigError, "tls.key", "dashboard", folder, "--listen", "0.0.0.0:9500")
    assert isinstance(call("dashboard", folder, "--channels", tmp_path).exception, ConfigError)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refusal(ConfigError, "--listen", "dashboard", folder, "--listen", f"127.0.0.1:{taken.getsockname()[1]}")


@pytest.mark.parametrize("command", ["status", "run"])
def test_a_folder_that_is_not_a_state_directory_is_refused(tmp_path: Path, command: str) -> None:
    options = ["--superlink", "127.0.0.1:1"] if command == "run" else []
    error = refusal(ConfigError, "federation.toml", command, tmp_path, *options)
    assert "coordinator init" in str(error)


def test_run_needs_one_superlink(fleet_of: FleetOf) -> None:
    folder = fleet_of(3).out / "coordinator"
    refusal(ConfigError, "--superlink", "run", folder)
    refusal(ConfigError, "--superlink", "run", folder, "--superlink", "a:1", "--connection", "b")
    refusal(ConfigError, "--connection", "run", folder, "--connection", "b", "--insecure")


def test_run_refuses_an_empty_registry_before_it_asks_flower(
    tmp_path: Path, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "FLWR", ("false",))
    call("init", tmp_path / "fleet", "--authority", authority)
    refusal(EdgeAdaptError, "registry", "run", tmp_path / "fleet", "--superlink", "127.0.0.1:1")


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for Flower's command line, which has an answer for each of its commands and runs no round."""
    runs = [{"status": "finished:completed", "status-details": ""}]
    said = {"run": {"success": True, "run-id": "17"}, "list": {"success": True, "runs": runs}}
    script = (
        f"import json, sys; print(json.dumps({said!r}.get(sys.argv[1])) if sys.argv[1] in {[*said]} else 'the log')"
    )
    monkeypatch.setattr(launch, "FLWR", (sys.executable, "-c", script))


def test_run_asks_flower_for_nothing_when_no_round_is_left(fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "FLWR", ("false",))
    fleet = fleet_of(3, rounds=1)
    fleet.federate(fleet.grid())
    result = call("run", fleet.out / "coordinator", "--superlink", "127.0.0.1:1", "--insecure")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "rounds 1 of 1, 0 aborted" in result.stdout


def test_run_shows_the_log_and_fails_while_rounds_are_left(fleet_of: FleetOf, flower: None) -> None:
    arguments = ("run", fleet_of(3, rounds=1).out / "coordinator", "--superlink", "127.0.0.1:1", "--insecure")
    result = call(*arguments)
    assert result.stderr.splitlines() == ["run 17 has begun", "the log"]
    assert result.stdout == ""
    refusal(EdgeAdaptError, "rounds", *arguments)


def test_ctrl_c_ends_the_display_and_not_the_run(
    fleet_of: FleetOf, flower: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.Connection, "show_log", interrupt)
    result = call("run", fleet_of(3, rounds=1).out / "coordinator", "--connection", "mine")
    assert result.exit_code != 0
    assert "run 17 continues on the SuperLink; 'flwr stop 17' ends it" in result.stderr


def test_init_and_status_load_neither_torch_nor_flower(tmp_path: Path, authority: Path) -> None:
    script = (
        "import sys; from coordinator.cli import coordinator_group as coordinator\n"
        "try: coordinator(sys.argv[1:], standalone_mode=True)\n"
        "except SystemExit: pass\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    for arguments in (["init", "fleet", "--authority", str(authority)], ["status", "fleet"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            cwd=tmp_path,
            env={"PYTHONPATH": str(Path(__file__).resolve().parents[3])},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert not set(done.stdout.split()) & {"flwr", "grpc", "torch", "transformers"}


def write(base: Any, method: str, folder: Path) -> Path:
    """The folder of a first adapter for two labels."""
    from edgeadapt.methods.trainable import configuration
    from export.seed import write_seed

    phrases = [("on", "turn on the light"), ("off", "stop the music")]
    write_seed(base, phrases, configuration(base, method, rank=2), 0, folder)
    return folder


@pytest.fixture
def seed(tiny_base: Any, tmp_path: Path) -> Path:
    return write(tiny_base, "lora", tmp_path / "seed")


def test_publish_puts_the_adapter_into_the_registry_as_version_0(
    tmp_path: Path, authority: Path, seed: Path, tiny_base: Any
) -> None:
    folder = tmp_path / "fleet"
    call("init", folder, "--authority", authority)
    found = json.loads(call("publish", folder, "--peft", seed, "--base", tiny_base.folder, "--json").stdout)
    opened = CoordinatorStateDir.open(folder)
    adapter = opened.registry.newest_adapter()
    assert (adapter.manifest.version, adapter.manifest.labels) == (0, ("on", "off"))
    assert adapter.manifest.base_digest == tiny_base.digest
    assert found == {
        "version": 0,
        "sha256": adapter.manifest.sha256,
        "bytes": adapter.manifest.size,
        "base_digest": tiny_base.digest,
        "labels": ["on", "off"],
    }
    opened.registry.close()


def test_publish_takes_other_labels_and_refuses_a_second_first_adapter(
    tmp_path: Path, authority: Path, seed: Path, tiny_base: Any
) -> None:
    folder, labels = tmp_path / "fleet", tmp_path / "mine.txt"
    call("init", folder, "--authority", authority)
    published = ("publish", folder, "--peft", seed, "--base", tiny_base.folder, "--labels", labels)
    labels.write_text("an\n")
    refusal(ConfigError, "labels", *published)
    labels.write_text("an\naus\n")
    assert "version 0: 2 labels" in call(*published).output
    refusal(ConfigError, "version", *published)
    opened = CoordinatorStateDir.open(folder)
    assert opened.registry.newest_adapter().manifest.labels == ("an", "aus")
    opened.registry.close()


def test_an_adapter_of_another_method_is_published_as_peft_names_it(
    tmp_path: Path, authority: Path, tiny_base: Any
) -> None:
    folder, written = tmp_path / "fleet", write(tiny_base, "ia3", tmp_path / "seed")
    call("init", folder, "--authority", authority)
    done = call("publish", folder, "--peft", written, "--base", tiny_base.folder)
    assert done.exit_code == 0, done.output
    opened = CoordinatorStateDir.open(folder)
    config = opened.registry.version(0).manifest.peft_config
    assert (config.peft_type, config.feedforward_modules) == ("IA3", ("output.dense",))
    assert config.target_modules == ("key", "output.dense", "value")
    assert any(name.endswith(".output.dense.ia3_l") for name in opened.registry.tensors(0))
    opened.registry.close()


@pytest.mark.parametrize("method", ["ffa", "rolora", "fedsa", "fedsb"])
def test_methods_that_tell_loras_matrices_apart_publish_no_other_adapter(
    tmp_path: Path, authority: Path, tiny_base: Any, method: str
) -> None:
    folder, written = tmp_path / "fleet", write(tiny_base, "dora", tmp_path / "seed")
    call("init", folder, "--authority", authority, "--set", f"method={method}")
    refusal(ConfigError, "method", "publish", folder, "--peft", written, "--base", tiny_base.folder)
    opened = CoordinatorStateDir.open(folder)
    assert opened.registry.latest() is None
    opened.registry.close()
