"""`edgeadapt coordinator` as an operator calls it."""

import json
import math
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError
from aggregation.pki import Authority, Root, certificates, requests
from aggregation.pki.identity import IdentityKey, PublicKey
from coordinator import launch
from coordinator.cli import authority_group as group
from coordinator.cli import coordinator_group as coordinator
from coordinator.cli.privacy import privacy
from coordinator.settings import FederationSettings, PrivacySettings
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.formats.gateway.invitation import read_invitation
from edgeadapt.formats.layout import Layout, TensorSpec
from tests.support import FleetOf, refused
from tests.support.authority import PASSPHRASE, new_key


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


@pytest.mark.parametrize("other", ["dora", "bottleneck"])
@pytest.mark.parametrize("method", ["ffa", "rolora", "fedsa", "fedsb"])
def test_methods_that_tell_loras_matrices_apart_publish_no_other_adapter(
    tmp_path: Path, authority: Path, tiny_base: Any, method: str, other: Any
) -> None:
    folder, written = tmp_path / "fleet", write(tiny_base, other, tmp_path / "seed")
    call("init", folder, "--authority", authority, "--set", f"method={method}")
    refusal(ConfigError, "method", "publish", folder, "--peft", written, "--base", tiny_base.folder)
    opened = CoordinatorStateDir.open(folder)
    assert opened.registry.latest() is None
    opened.registry.close()


# `edgeadapt authority` as a person calls it, with the passphrase from a file or typed.
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(PASSPHRASE + b"\n")

    def call(*arguments: str, typed: str | None = None) -> Result:
        return CliRunner().invoke(group, arguments, input=typed)

    return call


def ok(result: Result) -> str:
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def failed(result: Result, kind: type[EdgeAdaptError], about: str = "", text: str = "") -> None:
    """The command ended with this error, about this or with this text in its one line."""
    error = result.exception
    assert isinstance(error, kind), (result.output, error)
    assert about in ("", error.about), error.about
    assert text in str(error)
    assert "\n" not in str(error)


def test_from_init_to_revoke_by_command(run: Run, tmp_path: Path) -> None:
    mine = new_key()
    (tmp_path / "kitchen.csr").write_bytes(requests.request(mine, "kitchen"))
    (tmp_path / "garage.pub").write_bytes(new_key().public.to_pem())
    secret = ("--passphrase-file", "secret")
    printed = ok(run("init", "dir", *secret))
    root = Root.from_pem((tmp_path / "dir" / "authority.pem").read_bytes())
    assert root.fingerprint in printed
    assert "pin dir/authority.pem" in printed
    printed = ok(run("issue", "dir", "--request", "kitchen.csr", "--days", "7", "--out", "kitchen.pem", *secret))
    assert mine.public.key_id in printed
    certificate = certificates.to_der((tmp_path / "kitchen.pem").read_bytes())
    assert root.verify(certificate, datetime.now(UTC))[0] == "kitchen"
    assert "BEGIN CERTIFICATE" in ok(run("issue", "dir", "--name", "garage", "--public-key", "garage.pub", *secret))
    assert "serial" in ok(run("revoke", "dir", "kitchen", "--reason", "keyCompromise", *secret))
    assert "already revoked" in ok(run("revoke", "dir", "kitchen", *secret))
    listed = json.loads(ok(run("list", "dir", "--json")))["certificates"]
    assert [(each["name"], each["status"]) for each in listed] == [
        ("kitchen", "revoked (keyCompromise)"),
        ("garage", "valid"),
    ]
    assert ok(run("list", "dir")).count("\n") == 2
    assert "revocation list 4" in ok(run("revoke", "dir", "--list-days", "5", *secret))
    with refused(TrustError, "certificate.revoked", value="kitchen"):
        root.with_revocations((tmp_path / "dir" / "revoked.crl").read_bytes()).verify(certificate)


def test_the_passphrase_is_asked_for_and_never_shown(run: Run, tmp_path: Path) -> None:
    typed = PASSPHRASE.decode()
    assert typed not in ok(run("init", "dir", typed=f"{typed}\n{typed}\n"))
    assert typed not in ok(run("revoke", "dir", typed=f"{typed}\n"))
    failed(run("revoke", "dir", typed="something else\n"), TrustError, "key.passphrase", "authority.key: ")
    assert typed.encode() not in b"".join(path.read_bytes() for path in (tmp_path / "dir").iterdir())


def test_a_key_without_a_passphrase_must_be_asked_for(run: Run) -> None:
    failed(run("init", "dir", typed=""), ConfigError, "--passphrase-file")
    ok(run("init", "dir", "--unencrypted"))
    ok(run("revoke", "dir"))
    failed(run("init", "other", "--unencrypted", "--passphrase-file", "secret"), ConfigError, "--unencrypted")


def test_options_that_contradict_each_other_are_refused(run: Run, tmp_path: Path) -> None:
    ok(run("init", "dir", "--unencrypted"))
    (tmp_path / "kitchen.csr").write_bytes(requests.request(new_key(), "kitchen"))
    (tmp_path / "kitchen.pub").write_bytes(new_key().public.to_pem())
    failed(run("issue", "dir"), ConfigError, "--request")
    failed(run("issue", "dir", "--request", "kitchen.csr", "--public-key", "kitchen.pub"), ConfigError, "--request")
    failed(run("issue", "dir", "--public-key", "kitchen.pub"), ConfigError, "--name")
    failed(run("issue", "dir", "--request", "kitchen.csr", "--out", "no/kitchen.pem"), ConfigError, "--out")
    failed(run("issue", "dir", "--request", "kitchen.csr", "--name", "garage"), ConfigError, "--name")
    failed(run("issue", "dir", "--request", "kitchen.pub"), TrustError, "request", "kitchen.pub: ")
    failed(run("issue", "dir", "--name", "a", "--public-key", "kitchen.csr"), TrustError, "key.pem", "kitchen.csr: ")
    assert run("revoke", "dir", "kitchen", "--reason", "whim").exit_code == 2
    assert ok(run("list", "dir")) == ""


def test_many_devices_are_invited_from_a_list_and_a_repeat_goes_on(run: Run, tmp_path: Path) -> None:
    ok(run("init", "dir", "--unencrypted"))
    coordinator = new_key().public.to_pem()
    (tmp_path / "c.pem").write_bytes(coordinator)
    to = ("--coordinator", "c.pem", "--enrolment", "a.example:1", "--gateway", "b.example:2", "--json")

    def invited(content: str) -> Result:
        (tmp_path / "devices.csv").write_text(content)
        return run("invite", "dir", "--names", "devices.csv", "--out", "tokens", *to)

    assert json.loads(ok(invited("\ufeffName,region\nkitchen,eu\n\ngarage\n")))["invited"] == ["kitchen", "garage"]
    kept = (tmp_path / "tokens" / "kitchen.token").read_text()
    found = read_invitation(kept.strip())
    assert (found.device, found.gateway, found.to_pem()[1]) == ("kitchen", "b.example:2", coordinator)
    assert (tmp_path / "tokens").stat().st_mode & 0o077 == 0
    assert json.loads(ok(invited("kitchen\nhall\n")))["invited"] == ["hall"]
    assert (tmp_path / "tokens" / "kitchen.token").read_text() == kept
    for content, text in (
        ("a\nb\nA\n", "devices.csv:3: 'A' is there twice"),
        ("a\n../b\n", "devices.csv:2: "),
        ('a\n"b\n', "devices.csv:2: "),
        ("name\n", "names no device"),
    ):
        failed(invited(content), DataError, "devices.csv", text)
    failed(run("invite", "dir", "--names", "devices.csv", *to), ConfigError, "--names")
    failed(run("invite", "dir", *to), ConfigError, "--names")
    assert len(list((tmp_path / "tokens").iterdir())) == 3


def test_a_file_without_an_end_is_not_waited_for(run: Run) -> None:
    failed(run("init", "dir", "--passphrase-file", "/dev/zero"), ConfigError, "passphrase")
    ok(run("init", "dir", "--unencrypted"))
    failed(run("issue", "dir", "--request", "/dev/zero"), EdgeAdaptError, text="/dev/zero")
    failed(run("issue", "dir", "--name", "garage", "--public-key", "/dev/zero"), EdgeAdaptError, text="/dev/zero")


# ``edgeadapt simulate privacy`` states what sessions of these settings account for.
NOISY = ("--set", "privacy.mechanism=skellam", "--set", "privacy.epsilon=4.0", "--set", "rounds=3")


def invoke(*arguments: str) -> str:
    done = CliRunner().invoke(privacy, ["--numbers", "2000", *arguments])
    if done.exception:
        raise done.exception
    return done.output


def test_a_plan_is_that_of_the_session_and_epsilon_is_met(tmp_path: Path) -> None:
    (found,) = json.loads(invoke(*NOISY, "--devices", "30", "--json"))["plans"]
    settings = FederationSettings(rounds=3, privacy=PrivacySettings(mechanism="skellam", epsilon=4.0))
    spec = settings.session_spec(30, Layout((TensorSpec("update", (2000,)),)), "0" * 64, 1)
    assert found["noise_multiplier"] == spec.noise_multiplier()
    assert found["epsilon"] == spec.spent(spec.minimum_survivors).times(3).epsilon(1e-6) <= 4.0
    assert found["epsilon_all"] == spec.spent(30).times(3).epsilon(1e-6) < found["epsilon"]
    assert found["noise"] == pytest.approx(spec.vector.segments[0].noise * math.sqrt(2000 / 30) / spec.clip_norm)
    path = tmp_path / "federation.toml"
    path.write_text(settings.to_toml())
    assert json.loads(invoke("--settings", str(path), "--devices", "30", "--json"))["plans"] == [found]


def test_a_plan_states_the_price_of_groups() -> None:
    grouped = (*NOISY, "--devices", "40", "--set", "aggregation.groups=5")
    (found,) = json.loads(invoke(*grouped, "--json"))["plans"]
    (one,) = json.loads(invoke(*NOISY, "--devices", "40", "--json"))["plans"]
    assert (one["groups"], one["smallest_sum"], one["price"]) == (1, one["minimum_survivors"], 1.0)
    assert (found["groups"], found["smallest_sum"]) == (5, 8)
    assert found["honest"] == 4  # 4 of 40 devices may be corrupt, and all in one group
    assert found["price"] == pytest.approx(found["noise"] / one["noise"])
    assert found["price"] == pytest.approx(math.sqrt(one["honest"] / found["honest"]), rel=0.05)
    assert "in 5 sums: one hides in a sum of 8 or more" in invoke(*grouped).splitlines()[-1]


def test_a_plan_without_noise_is_refused() -> None:
    with refused(ConfigError, "privacy.mechanism"):
        invoke()


def test_a_cohort_that_needs_more_bits_is_refused() -> None:
    with refused(ConfigError, "vector.ring_bits"):
        invoke(*NOISY, "--devices", "10000", "--set", "privacy.epsilon=0.001")


def test_too_little_noise_for_a_finite_epsilon_is_stated_as_none() -> None:
    little = ("--set", "privacy.mechanism=skellam", "--set", "privacy.noise_multiplier=0.01", "--devices", "30")
    (found,) = json.loads(invoke(*little, "--json"))["plans"]
    assert (found["epsilon"], found["noise_multiplier"]) == (None, pytest.approx(0.01))
