"""A federation goes on from another base: its head, its rounds, its accuracies, and what is left if it is worse.

The apps are the real ones and both bases are tiny. Devices have them on their disks.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from aggregation.errors import ConfigError, EdgeAdaptError, TrustError
from client.inference.session import ClassificationSession
from client.inference.trust import Trust
from client.node.statedir import SETTINGS
from client.training.engine import classifier_trainer
from client.training.examples import Example, Split, in_split, read_examples, write_examples
from coordinator import runstate
from coordinator.migration import (
    MigrationStep,
    Target,
    WorseBaseError,
    conclude,
    migrate,
    read_target,
    take_back,
)
from coordinator.settings import SETTINGS as SETTINGS_FILE
from coordinator.settings import FederationSettings
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.auditing.transcripts import logs
from edgeadapt.formats.bundle import Bundle, adapter_names
from edgeadapt.formats.keyfiles import TLS_CERTIFICATE, TLS_KEY
from edgeadapt.formats.manifest import VersionManifest
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.registryfiles import TRANSCRIPT
from edgeadapt.formats.registryreader import open_registry_files
from edgeadapt.methods.peft.folder import LABELS
from edgeadapt.releases.lineage import Lineage
from export.seed import write_seed
from tests.support import FleetOf, refused
from tests.support.gateway import HOST, attending, authority_of, certify, free_port
from tests.support.hostile import audit_failures
from tests.support.trial import call

DEVICES = 8
NOISY = {"privacy": {"mechanism": "skellam", "noise_multiplier": 1.0}}
KEPT = {"aggregation__keep_masked_inputs": True, "aggregation__ring_bits": 32}
STEPS = [MigrationStep.BEFORE, MigrationStep.HEAD, MigrationStep.TRAINING, MigrationStep.AFTER]
CONFIG = PeftConfig.lora(rank=2, alpha=4)


def deaf_tokenizer() -> Tokenizer:
    """One that knows no word, so that all texts of a length have one embedding."""
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))  # noqa: S106  # a token of text
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


class Migrating:
    """A fleet whose devices have another base too, and where it leads."""

    def __init__(self, fleet: Any, base: Any, folder: Path) -> None:
        self.fleet, self.base, self.seed = fleet, base, folder
        for client in fleet.population.clients:
            state_dir = fleet.state_dir(client.name)
            own = read_examples(state_dir.examples, len(fleet.population.labels))
            extra = [Example(f"{e.text} {k}", e.label) for k in range(3) for e in in_split(own, Split.TRAIN)]
            write_examples(state_dir.examples, [*own, *extra])
            self.offer_base(state_dir.folder)
        self._write_seed()

    def move_to(self, base: Any, folder: Path) -> None:
        self.base, self.seed = base, folder
        for client in self.fleet.population.clients:
            path = self.fleet.state_dir(client.name).folder / SETTINGS
            path.write_text(f'next_base = "{base.folder}"\n{path.read_text().partition(chr(10))[2]}')
        self._write_seed()

    def _write_seed(self) -> None:
        phrases = [(self.fleet.population.labels[one.label], one.text) for one in self.fleet.population.public]
        write_seed(self.base, phrases, CONFIG, 0, self.seed)

    def offer_base(self, device: Path) -> None:
        path = device / SETTINGS
        path.write_text(f'next_base = "{self.base.folder}"\n{path.read_text()}')

    @property
    def folder(self) -> Path:
        return self.fleet.out / "coordinator"  # type: ignore[no-any-return]

    def opened(self) -> CoordinatorStateDir:
        return CoordinatorStateDir.open(self.folder)

    def target(self, *, rounds: int = 1, margin: float = 1.0) -> Target:
        state_dir = self.opened()
        return read_target(state_dir, str(self.base.folder), self.seed, state_dir.settings, rounds, margin)

    def run(self, to: Target, most: int = 99) -> list[Any]:
        """Do the steps that are left, at most so many rounds."""
        rounds = []
        with self.opened().leading() as leader:
            for each in migrate(leader, self.fleet.grid(), to):
                rounds.append(each)
                if len(rounds) == most:
                    break
        return rounds


@pytest.fixture
def migrating(fleet_of: FleetOf, make_base: Callable[..., Any], tmp_path: Path) -> Callable[..., Migrating]:
    def make(**settings: Any) -> Migrating:
        fleet = fleet_of(DEVICES, **(KEPT | {"rounds": 1} | settings))
        fleet.federate(fleet.grid())
        return Migrating(fleet, make_base(tmp_path / "next", 2, None, 24, 3), tmp_path / "seed")

    return make


def test_an_interrupted_migration_goes_on_to_a_version_on_the_new_base(migrating: Callable[..., Migrating]) -> None:
    fleet = migrating(server__optimizer="fedadam", server__learning_rate=0.01)
    to, rounds = fleet.target(), []
    for _ in STEPS:  # interrupted after each round
        rounds += fleet.run(to, 1)
    assert [each.step for each in rounds] == STEPS
    assert fleet.run(to) == []
    registry = fleet.fleet.registry()
    versions = [version.manifest for version in registry.versions()]
    old, new = fleet.fleet.base.digest, fleet.base.digest
    assert [each.base_digest for each in versions] == [old] * 3 + [new] * 4
    assert [each.round for each in versions] == [0, 1, 2, 2, 3, 4, 5]
    assert versions[3].begins_after(versions[2])
    assert versions[4].rule is not None
    assert versions[4].rule.name == "AnalyticHead"
    with fleet.opened().leading() as leader:
        found = conclude(leader, to)
    metrics = [each.metrics["accuracy"] for each in versions if each.plan]
    assert [found.before, found.seed, found.between, found.after] == metrics[1:]
    assert (found.version, found.old, found.worse) == (5, 2, False)
    assert FederationSettings.read(fleet.folder / "federation.toml").rounds == 5

    assert audit_failures(fleet.folder) == set()
    lineage = Lineage.read(fleet.folder, None, None)
    assert [each.record is None for each in lineage.versions] == [True, False, False, True, False, False, False]
    fleet.fleet.configure({"rounds": 6})  # the federation goes on
    assert fleet.fleet.federate(fleet.fleet.grid())[-1].version == 7
    assert audit_failures(fleet.folder) == set()


def test_a_worse_base_leaves_the_old_version_as_the_newest(
    migrating: Callable[..., Migrating], make_base: Callable[..., Any], tmp_path: Path
) -> None:
    fleet = migrating(rounds=3)
    fleet.move_to(make_base(tmp_path / "deaf", 3, deaf_tokenizer()), tmp_path / "deaf-seed")
    to, before = fleet.target(margin=0.01), (fleet.folder / SETTINGS_FILE).read_bytes()
    fleet.run(to)
    with fleet.opened().leading() as leader:
        found = conclude(leader, to)
    assert found.after < found.before - 0.2
    with refused(WorseBaseError, "accuracy"):
        found.require()
    registry = fleet.fleet.registry()
    newest, old = registry.newest_adapter().manifest, registry.version(found.old).manifest
    assert (newest.sha256, newest.base_digest, newest.labels) == (old.sha256, old.base_digest, old.labels)
    assert newest.version == found.version + 2
    assert (fleet.folder / SETTINGS_FILE).read_bytes() == before
    fleet.fleet.configure({"rounds": 8})
    *_, last = fleet.fleet.federate(fleet.fleet.grid())
    assert (last.version, len(last.survivors)) == (newest.version + 1, DEVICES)  # devices follow it back
    assert audit_failures(fleet.folder) == set()
    with refused(ConfigError, "--peft"):  # they have trained from that first adapter
        fleet.run(to)


def test_devices_without_the_new_base_are_in_none_of_its_sums(migrating: Callable[..., Migrating]) -> None:
    fleet = migrating()
    behind = fleet.fleet.population.clients[0].name
    settings = fleet.fleet.state_dir(behind).folder / SETTINGS
    settings.write_text(settings.read_text().partition("\n")[2])
    before, head, *_ = fleet.run(fleet.target(), 2)
    assert behind in before.record.survivors
    assert behind not in head.record.survivors
    assert (len(head.record.survivors), head.devices) == (DEVICES - 1, DEVICES)
    with fleet.opened().leading() as leader:
        assert take_back(leader).base_digest == fleet.fleet.base.digest


def test_what_no_base_can_follow_is_refused_before_a_round(
    migrating: Callable[..., Migrating], make_base: Callable[..., Any], tmp_path: Path
) -> None:
    fleet = migrating()
    to, rounds = fleet.target(), len(fleet.fleet.registry().rounds())
    same = fleet.opened()
    own = read_target(same, str(fleet.fleet.base.folder), fleet.seed, same.settings, 1, 0.0)
    odd = {"base": own, "labels": replace(to, manifest=replace(to.manifest, labels=()))}
    for about, table in {"privacy": NOISY, "method": {"method": "fedper"}}.items():
        odd[about] = replace(to, settings=FederationSettings.parse(table, "test"))
    for about, target in odd.items():
        with refused(ConfigError, about):
            fleet.run(target)
    (fleet.seed / LABELS).write_text("\n".join(reversed(fleet.fleet.population.labels)))
    with refused(ConfigError, "labels"):
        fleet.target()
    assert len(fleet.fleet.registry().rounds()) == rounds


def test_too_few_held_out_examples_are_refused_before_a_round(
    fleet_of: FleetOf, make_base: Callable[..., Any], tmp_path: Path
) -> None:
    fleet = fleet_of(3, rounds=1)
    moving = Migrating(fleet, make_base(tmp_path / "next", 2, None, 24, 3), tmp_path / "seed")
    fleet.configure({"aggregation.weight_cap": 33})  # 99 of three devices, whatever they have
    with refused(EdgeAdaptError, "accuracy"):
        moving.run(moving.target())
    assert not fleet.registry().rounds()
    fleet.configure({"aggregation.weight_cap": 128})
    for client in fleet.population.clients:
        state_dir = fleet.state_dir(client.name)
        write_examples(state_dir.examples, read_examples(state_dir.examples, len(fleet.population.labels))[:12])
    fleet.federate(fleet.grid())
    for _ in range(2):  # the newest sum says that there are too few
        with refused(EdgeAdaptError, "accuracy"):
            moving.run(moving.target())
    assert len(fleet.registry().rounds()) == 1


def test_an_adapter_of_a_base_of_another_width_is_refused(migrating: Callable[..., Migrating], tmp_path: Path) -> None:
    fleet = migrating()
    config = fleet.base.folder / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    with refused(ConfigError, "--peft"):
        fleet.target()


def test_the_command_migrates_a_fleet_behind_its_gateway(
    migrating: Callable[..., Migrating], capsys: pytest.CaptureFixture[str]
) -> None:
    fleet, port = migrating(aggregation__minimum_devices=DEVICES), free_port()
    key, certificate = certify(authority_of(fleet.fleet))
    (fleet.folder / TLS_KEY).write_bytes(key)
    (fleet.folder / TLS_CERTIFICATE).write_bytes(certificate)
    command = ["coordinator", "migrate", fleet.folder, "--base", fleet.base.folder, "--peft", fleet.seed]
    options = ["--gateway", f"{HOST}:{port}", "--rounds", 1, "--json", "--set", "training.learning_rate=0.02"]
    capsys.readouterr()
    with attending(port, [*fleet.fleet.nodes.values()]):
        call(*command, *options)
    said = capsys.readouterr()
    row = json.loads(said.out)
    assert [each["step"] for each in row["rounds"]] == [step.value for step in STEPS]
    assert (row["version"], row["worse"]) == (5, False)
    assert "training  round 4: accuracy" in said.err
    logged = len(logs(fleet.folder / TRANSCRIPT))
    assert runstate.read(fleet.folder).sessions == {"made": logged}  # what it waits for is where that of other runs is
    assert FederationSettings.read(fleet.folder / SETTINGS_FILE).training.learning_rate == 0.02
    call(*command, *options)  # nothing is left: it waits for no device, and says the same
    assert json.loads(capsys.readouterr().out) == row | {"rounds": []}
    archive, restored = fleet.folder.parent / "fleet.tar", fleet.folder.parent / "restored"
    call("coordinator", "backup", fleet.folder, "--out", archive, "--keys", "--quiet")
    call("coordinator", "restore", restored, "--archive", archive, "--quiet")
    copied, kept = CoordinatorStateDir.open(restored).registry.versions(), fleet.opened().registry.versions()
    assert [version.raw for version in copied] == [version.raw for version in kept]
    capsys.readouterr()
    call("coordinator", "migrate", fleet.folder, "--back", "--json")
    assert json.loads(capsys.readouterr().out)["version"] == 7


def test_a_version_of_no_round_on_the_same_base_is_found_by_whoever_reads_the_registry(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = fleet_of(DEVICES, rounds=1, **KEPT)
    fleet.federate(fleet.grid())
    folder = fleet.out / "coordinator"
    opened = CoordinatorStateDir.open(folder)
    newest = opened.registry.newest_adapter()
    place = {"version": 2, "parent": newest.manifest.sha256, "round": 1}
    unmade: dict[str, Any] = {"plan": None, "rule": None, "survivors": (), "metrics": {}}
    with monkeypatch.context() as patched:
        patched.setattr(VersionManifest, "begins_after", lambda *given: True)
        opened.registry.publish(replace(newest.manifest, **place, **unmade), newest.blob, opened.key)
    with refused(TrustError, "manifest"):
        audit_failures(folder)
    with refused(TrustError, "record"):
        Lineage.read(folder, None, None)
    with refused(TrustError, "record"):
        open_registry_files(folder, [opened.key.public]).recorded()


def test_a_release_on_the_new_base_answers_and_can_be_rolled_back(
    migrating: Callable[..., Migrating], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By channel, as every release: a private adapter of the old base is not loaded on the new one."""
    fleet, phone, releases, key = migrating(), tmp_path / "phone", tmp_path / "releases", tmp_path / "vendor.pem"
    labels = fleet.fleet.population.labels
    texts = [one for client in fleet.fleet.population.clients for one in client.validation][:120]
    call("bundle", "key", key)
    trust = (tmp_path / "vendor.pub.pem").read_bytes()
    gates = ["--set", 'gates=["size", "accuracy"]', "--set", "accuracy.held_out=held-out.tsv"]
    call("release", "init", releases, *gates)
    phone.mkdir()
    for folder in (phone, releases):
        (folder / "trust.pem").write_bytes(trust)
    (releases / "held-out.tsv").write_text("".join(f"{labels[one.label]}\t{one.text}\ten\n" for one in texts))

    def release(version: int, base: Path) -> None:
        folder = tmp_path / f"made-{version}"
        folder.mkdir()
        (folder / "trust.pem").write_bytes(trust)
        made = ["--registry", fleet.folder, "--version", version, "--base", base, "--bundle", folder / "bundle"]
        call("bundle", "add", *made, "--profile", "fp32", "--key", key)
        call("release", "publish", releases, "canary", "--bundle", folder / "bundle")
        call("release", "promote", releases, "canary", "stable")

    def followed() -> Bundle:
        call("device", "update", "--bundle", phone / "bundle")
        return Trust.open(phone / "bundle").bundle

    release(1, fleet.fleet.base.folder)
    first = ["--repository", releases / "public", "--channel", "stable", "--root", releases / "root.json"]
    call("device", "update", "--bundle", phone / "bundle", *first)
    call("device", "infer", "--bundle", phone / "bundle", "--teach", labels[1], texts[0].text)
    assert sorted(adapter_names(phone / "bundle")) == ["global", "personal"]
    to = fleet.target()
    fleet.run(to)
    with fleet.opened().leading() as leader:
        found = conclude(leader, to)
    release(found.version, fleet.base.folder)

    assert followed().base().digest == fleet.base.digest
    assert adapter_names(phone / "bundle") == ["global"]
    session, registry = ClassificationSession.open(phone / "bundle"), fleet.fleet.registry()
    trainer = classifier_trainer(fleet.base, len(labels), registry.version(found.version).manifest.peft_config)
    expected = trainer.logits(registry.tensors(found.version), [one.text for one in texts]).argmax(axis=1)
    answers = session.classify([one.text for one in texts], "global")
    assert [labels.index(each.label) for each in answers] == expected.tolist()
    shutil.copytree(phone / "updates" / "private" / fleet.fleet.base.digest, phone / "bundle", dirs_exist_ok=True)
    with refused(TrustError, "adapter-manifest.base_digest"):
        session.load("personal")

    call("release", "rollback", releases, "stable", "--to", 1, "--key", key)
    assert followed().base().digest == fleet.fleet.base.digest
