"""A secure sum of right answers, with noise: devices of two releases count, and a worse one is found and taken back.

The apps, the repository of channels and the commands are the real ones. The base is tiny.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from aggregation.errors import ConfigError
from client.node.privacyledger import PrivacyLedger
from client.training.examples import Example, Split, in_split, read_examples, write_examples
from coordinator.app import lead
from coordinator.rounds import RoundOutcome
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.bases.base import Base
from edgeadapt.cli import promotion
from edgeadapt.program import cli
from edgeadapt.promotion.evaluations import NoVerdictError
from edgeadapt.promotion.gates import GateError, GateSettings
from edgeadapt.releases.history import audit_repository
from edgeadapt.releases.rollback import roll_back
from edgeadapt.rounds.evaluation import RENEWAL, is_evaluation
from edgeadapt.rounds.sums import UNIFORMS
from export.bundle.sources import Origin, from_registry
from export.causal import export_causal
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from export.onnx.slotted import with_mean_head
from tests.support import FleetOf, refused
from tests.support.authors import fleet_of_authors
from tests.support.bundles import stated
from tests.support.hostile import audit_failures
from tests.support.models import llama, make_lm
from tests.support.rollout import NOISE, StagedFleet, louder, permuted, run

MARGIN = GateSettings().accuracy.margin
DEVICES = 8  # with 30 held-out examples each
NOISY = {"privacy__mechanism": "skellam", "privacy__noise_multiplier": 0.5}
KEPT = {"aggregation__keep_masked_inputs": True, "aggregation__ring_bits": 32}


__all__ = ["llama", "make_lm"]  # fixtures


@pytest.fixture(scope="module")
def exported(tiny_base: Base) -> ExportedBase:
    return export_classifier(with_mean_head(tiny_base, ["query", "value"]), tiny_base, Profile.FP32, training=True)


class Channel(StagedFleet):
    """That evaluates and watches in this process."""

    def compare(self) -> Any:
        """The record of a round of evaluation."""
        run("coordinator", "evaluate", self.fleet.out / "coordinator", "--releases", self.folder, "--channel", "stable")
        return self.fleet.federate(self.fleet.grid())[-1]

    def verdict(self, *options: str) -> str:
        call = ("release", "watch", self.fleet.out / "coordinator", "stable", "--releases", self.folder)
        return run(*call, "--dry-run", *options)

    def watch(self) -> Any:
        """What a look leads to, on a machine with the key of snapshot and timestamp alone."""
        elsewhere = self.keep_only_the_snapshots_key()
        options = ("stable", "--releases", self.folder, "--once", "--json")
        try:
            return json.loads(run("release", "watch", self.fleet.out / "coordinator", *options))
        finally:
            self.give_back(elsewhere)

    def watch_during(self, work: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The outcomes that such a machine prints when it goes on, with ``work`` between its first two looks."""
        done = list[None]()

        def sleep(_: float) -> None:
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(None if done else work())

        elsewhere = self.keep_only_the_snapshots_key()
        call = ("release", "watch", self.fleet.out / "coordinator", "stable", "--releases", self.folder, "--json")
        with monkeypatch.context() as changed:
            changed.setattr(promotion, "time", SimpleNamespace(sleep=sleep))
            printed = CliRunner().invoke(cli, [*map(str, call)]).stdout
        self.give_back(elsewhere)
        return [json.loads(line)["outcome"] for line in printed.splitlines()]


@pytest.fixture
def channel_of(app_fleet_of: FleetOf, exported: ExportedBase) -> Callable[..., Channel]:
    def make(**settings: Any) -> Channel:
        fleet = app_fleet_of(DEVICES, evaluation__noise_multiplier=NOISE, **KEPT, **settings)
        for client in fleet.population.clients:
            path = fleet.state_dir(client.name).examples
            own = read_examples(path, len(fleet.population.labels))
            extra = [Example(f"{e.text} {k}", e.label) for k in range(3) for e in in_split(own, Split.TRAIN)]
            write_examples(path, [*own, *extra])
        return Channel.of(fleet, exported)

    return make


def test_a_bad_canary_is_found_by_sums_and_taken_back_and_a_good_one_stays(
    channel_of: Callable[..., Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    channel, compared = channel_of(rounds=1, analytic__rounds=1), list[Any]()
    fleet, folder = channel.fleet, channel.fleet.out / "coordinator"
    fleet.federate(fleet.grid())
    good, before = from_registry(folder, 1, None), fleet.registry().tensors(1)
    channel.publish("stable", good, 1)
    channel.publish("canary", permuted(good), 2)
    channel.join()
    channel.promote()
    assert len(channel.having(1)) == len(channel.having(2)) == DEVICES // 2
    with refused(NoVerdictError, "evaluation"):
        channel.verdict()

    record = channel.compare()
    (found, count), (found_before, count_before) = channel.right(2), channel.right(1)
    assert (count, count_before, record.version) == (120, 120, 2)
    assert found / count < 0.4 < 0.7 < found_before / count_before
    metrics = dict(record.metrics)
    deviation = metrics.pop("deviation")
    assert 0.8 < deviation < 1.6  # examples
    expected = {"accuracy_newest": found / count, "accuracy_previous": found_before / count_before}
    assert {name: metrics.pop(name) for name in expected} == pytest.approx(expected, abs=6 * deviation / 120)
    assert metrics == pytest.approx({"examples_newest": 120.0, "examples_previous": 120.0}, abs=6 * deviation)
    assert record.epsilon is None  # the training before had no noise
    moved = {name: float(np.abs(value - before[name]).max()) for name, value in fleet.registry().tensors(2).items()}
    assert 0 < max(moved.values()) <= RENEWAL * UNIFORMS / 2 + 1e-5
    assert fleet.registry().version(2).manifest.rule.name == "Evaluation"
    assert audit_failures(folder) == set()
    with refused(GateError, "evaluation"):
        channel.verdict()

    done = channel.watch()
    assert (done["outcome"], done["release"]) == ("rolled back", 3)
    channel.update()
    assert len(channel.having(3)) == DEVICES  # at the next check the release is off every device
    assert {stated(channel.bundle(device)).labels for device in channel.devices} == {good.labels}
    with refused(ConfigError, "rollout"):
        channel.verdict()
    assert channel.watch()["outcome"] == "no rollout"

    channel.publish("canary", permuted(good), 4)  # the vendor does not believe it
    channel.promote()
    assert channel.watch()["outcome"] == "no verdict"
    with refused(NoVerdictError, "evaluation"):  # the command agrees with what watches
        channel.verdict()
    assert len(channel.having(4)) == DEVICES // 2
    roll_back(channel.repository, "stable", 3, channel.key)

    channel.publish("canary", louder(good), 6)
    channel.promote()
    with refused(NoVerdictError, "evaluation"):  # the one before compared other releases
        channel.verdict()
    assert channel.watch_during(lambda: compared.append(channel.compare()), monkeypatch) == ["no verdict", "kept"]
    assert compared[0].version == 3
    judged = json.loads(channel.verdict("--json"))
    assert not judged["worse"]
    assert judged["metrics"]["accuracy_newest"] > 0.7
    assert channel.watch()["outcome"] == channel.watch()["outcome"] == "kept"
    assert audit_failures(folder) == set()
    actions = [each.action for each in audit_repository(channel.folder, None).records]
    judged_actions = [(each.kind, each.release, each.evaluation.worse) for each in actions if each.evaluation]
    assert judged_actions == [("rollback", 3, True), ("evaluate", 6, False)]
    channel.repository.prepared.discard("stable")
    with refused(ConfigError, "prepared"):
        channel.watch()


def test_in_a_federation_with_noise_an_evaluation_has_as_much_and_the_ledger_has_it(
    channel_of: Callable[..., Channel],
) -> None:
    channel = channel_of(rounds=1, **NOISY)
    fleet, folder = channel.fleet, channel.fleet.out / "coordinator"
    good = from_registry(folder, 0, None)
    channel.publish("stable", good, 1)
    channel.publish("canary", permuted(good), 2)
    channel.join()
    channel.promote()
    few = channel.having(2)[0]
    path = fleet.state_dir(few).examples
    own = read_examples(path, len(fleet.population.labels))
    kept = [*in_split(own, Split.TRAIN), *in_split(own, Split.VALIDATION)[:3]]
    write_examples(path, kept)
    fleet.federate(fleet.grid())
    record = channel.compare()
    assert record.aborted is None, (record.aborted, record.dropped)
    assert 0 < fleet.registry().rounds()[0].epsilon < record.epsilon
    deviation = record.metrics["deviation"]
    assert 5 < deviation < 30
    # Not published below 100 examples.
    assert abs(record.metrics.get("examples_previous", 100.0) - 120) < 5 * deviation
    assert record.metrics.get("examples_newest", 0.0) < 93 + 5 * deviation  # of three devices, and three of the fourth
    assert audit_failures(folder) == set()
    assert fleet.state_dir(few).load(PrivacyLedger) is not None


def spoiled(origin: Origin, size: float, sha256: str) -> Origin:
    """Other numbers in B, of this size."""
    rng = np.random.default_rng(5)
    moved = {
        name: value + np.float32(size) * rng.standard_normal(value.shape, np.float32)
        for name, value in origin.tensors.items()
        if "lora_B" in name
    }
    return replace(origin, sha256=sha256, tensors=origin.tensors | moved)


def test_by_schedule_a_worse_release_of_a_language_model_is_taken_back_and_an_equal_one_stays(
    tmp_path: Path, llama: Base, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = fleet_of_authors(tmp_path / "fleet", llama, {"rank": 4}, devices=24)
    folder, fleet_settings = fleet.out / "coordinator", {"rounds": 1, "aggregation.ring_bits": 32}
    fleet.configure(fleet_settings | {"evaluation.noise_multiplier": NOISE})
    channel = Channel.of(fleet, export_causal(fleet.base, ("q_proj", "v_proj"), Profile.FP32, training=True))
    fleet.federate(fleet.grid())
    good = from_registry(folder, 1, None)
    channel.publish("stable", good, 1)
    channel.publish("canary", spoiled(good, 0.3, "e" * 64), 2)
    channel.join()
    fleet.configure({"rounds": 3, "evaluation.every": 1e-6, "evaluation.releases": "../releases"})
    fleet.configure({"evaluation.channel": "stable", "training.learning_rate": 1e-5})

    def following(count: int) -> list[str]:
        """Which kinds the next rounds of a run are; it ends with them, as by a signal."""
        rounds = lead(CoordinatorStateDir.open(folder), fleet.grid())
        records = [next(rounds) for _ in range(count)]
        rounds.close()
        assert [one.aborted for one in records] == [None] * count
        return ["evaluation" if is_evaluation(one.metrics) else "training" for one in records]

    def said() -> str:
        return str(json.loads(run("coordinator", "status", folder, "--json"))["evaluation"]["text"])

    channel.promote()
    assert "none of this rollout" in said()
    with monkeypatch.context() as changed:
        changed.setattr(RoundOutcome, "commit", killed)
        with pytest.raises(KeyboardInterrupt):  # before the round is recorded
            following(1)
    assert following(2) == ["evaluation", "training"]  # a worse one is decided at once
    metrics = fleet.registry().rounds()[1].metrics
    assert metrics["devices_newest"] == pytest.approx(12, abs=6 * metrics["deviation"])
    assert abs(metrics["relative_nats_previous"]) < 0.1 < metrics["relative_nats_newest"]  # it is the one on offer
    assert "worse" in said()
    assert (channel.watch()["outcome"], "rolls nothing out" in said()) == ("rolled back", True)

    channel.repository = replace(channel.repository, now=datetime.now(UTC))
    channel.publish("canary", spoiled(good, 1e-5, "f" * 64), 4)
    channel.update()
    channel.promote()
    assert "none of this rollout" in said()
    kinds = following(2)
    assert kinds[0] == "evaluation"
    assert channel.watch()["outcome"] == "kept"
    state = json.loads(run("coordinator", "status", folder, "--json"))
    assert state["rounds_wanted"] == 3 + sum(is_evaluation(one.metrics) for one in fleet.registry().rounds())
    assert audit_failures(folder) == set()


def killed(outcome: RoundOutcome) -> None:
    raise KeyboardInterrupt
