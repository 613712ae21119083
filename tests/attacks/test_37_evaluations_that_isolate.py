"""The sum of an evaluation is over the devices that have a release, and the channel's owner knows how many these are.

No device can tell. It may be the first that updated, or the last that did not; the share may have been higher in
between, and was never more than what the channel's key signed. So whatever a device reckons with, its counts can be
the whole sum, and the noise that its policy demands is what hides them.
"""

import tomllib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import tomli_w

from aggregation import rotation
from aggregation.entropy import SystemEntropy
from aggregation.errors import ProtocolError
from aggregation.policy import Policy
from aggregation.privacy.accounting import Mechanism
from aggregation.spec import CELLS, COUNTS, OBSERVED, Privacy
from aggregation.vector import Segment, VectorSpec
from client.inference.session import ClassificationSession
from client.node.statedir import SETTINGS
from client.training.examples import Split, in_split, read_examples
from client.updates import update
from edgeadapt.bases.base import Base
from edgeadapt.formats import jsontext
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.rounds import evaluation
from edgeadapt.rounds.evaluation import EvaluationTask
from edgeadapt.rounds.sums import Bounds, noisy_spec
from export.bundle.sources import from_registry
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from export.onnx.slotted import with_mean_head
from tests.support import FleetOf, refused
from tests.support.fleet import BASE
from tests.support.hostile import audit_failures
from tests.support.rollout import StagedFleet, louder, run

DEVICES, MOST = 8, 32
BARE = 1e-4  # a noise multiplier: counts can be read
HONEST = 1.1  # that of the settings


@pytest.fixture(scope="module")
def exported(tiny_base: Base) -> ExportedBase:
    return export_classifier(with_mean_head(tiny_base, ["query", "value"]), tiny_base, Profile.FP32, training=True)


class HostileFleet(StagedFleet):
    """A coordinator that evaluates when it likes, and reads the sums."""

    def rolled_out(self) -> None:
        """Release 1 is on all devices, and release 2 in the channel for half of them, on none yet."""
        good = from_registry(self.fleet.out / "coordinator", 0, None)
        self.publish("stable", good, 1)
        self.publish("canary", louder(good), 2)
        self.join()
        self.update()
        self.repository.promote("canary", 1, "stable", (), share=50)

    def share(self, percent: int, *, without: str = "") -> None:
        """Sign another share; the devices update, except for one."""
        self.repository.set_rollout("stable", percent)
        for device in self.devices:
            if device != without:
                update(self.bundle(device), entropy=SystemEntropy())

    def demand(self, **policy: float) -> None:
        for device in self.devices:
            file = self.fleet.state_dir(device).folder / SETTINGS
            settings = tomllib.loads(file.read_text())
            del settings["policy"]["minimum_evaluation_noise"]
            file.write_text(tomli_w.dumps(settings | {"policy": settings["policy"] | policy}))

    def summed(self, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], float]:
        """What an evaluation sums, right answers and examples of each release; and the deviation of its noise."""
        seen: list[Any] = []
        real = evaluation.evaluated

        def evaluated(spec: Any, sums: Any, survivors: int, digest: bytes) -> dict[str, float]:
            seen.append(rotation.rotate_back(sums[COUNTS], rotation.seed(digest)).tolist())
            return real(spec, sums, survivors, digest)

        monkeypatch.setattr(evaluation, "evaluated", evaluated)
        folder = self.fleet.out / "coordinator"
        run("coordinator", "evaluate", folder, "--releases", self.folder, "--channel", "stable")
        record = self.fleet.federate(self.fleet.grid())[-1]
        return seen[-1], record.metrics["deviation"]

    def counts(self, device: str) -> list[int]:
        """The right answers and the held-out examples of one device."""
        labels, session = self.fleet.population.labels, ClassificationSession.open(self.bundle(device))
        held_out = in_split(read_examples(self.fleet.state_dir(device).examples, len(labels)), Split.VALIDATION)
        right = [session.classify([each.text], "global")[0].label == labels[each.label] for each in held_out]
        return [sum(right), len(held_out)]


@pytest.fixture
def hostile(app_fleet_of: FleetOf, exported: ExportedBase) -> HostileFleet:
    multiplier = {"evaluation__noise_multiplier": BARE, "aggregation__ring_bits": 32}
    made = HostileFleet.of(app_fleet_of(DEVICES, rounds=1, **multiplier), exported)
    made.rolled_out()
    return made


def test_without_noise_the_counts_of_a_device_that_is_alone_with_its_release_are_the_sum(
    hostile: HostileFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one that updates, and the last one on the old release after shares of 50, 95 and 50 %."""
    hostile.demand(minimum_evaluation_noise=BARE / 2)
    last, first, *_ = hostile.devices  # of whose keys the second one is in at 50 %, and the first one is not
    update(hostile.bundle(first), entropy=SystemEntropy())
    sums, _ = hostile.summed(monkeypatch)
    assert sums[:2] == pytest.approx(hostile.counts(first), abs=0.2)
    hostile.share(95, without=last)
    hostile.share(50)
    assert hostile.having(1) == (last,)
    sums, _ = hostile.summed(monkeypatch)
    assert sums[2:] == pytest.approx(hostile.counts(last), abs=0.2)


def test_the_noise_that_devices_demand_is_as_large_as_all_that_one_device_can_count(
    hostile: HostileFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile.demand()
    update(hostile.bundle(hostile.devices[1]), entropy=SystemEntropy())
    hostile.fleet.configure({"evaluation.noise_multiplier": HONEST})
    _, deviation = hostile.summed(monkeypatch)
    assert deviation > 2**0.5 * MOST
    assert audit_failures(hostile.fleet.out / "coordinator") == set()


@pytest.mark.parametrize("counted", [COUNTS, OBSERVED, CELLS])
@pytest.mark.parametrize("multiplier", [0.0, BARE, 0.99])
def test_a_session_with_less_noise_is_refused_before_it_begins(
    multiplier: float, counted: str, spec_of: Callable[..., Any]
) -> None:
    norm, honest = 2**0.5 * MOST, spec_of(DEVICES).minimum_survivors - 1
    policy = Policy(known_bases=frozenset({BASE}))

    def session(noise: float) -> Any:
        bounds: dict[str, Any] = {"ring_bits": 32, "max_clients": DEVICES}
        if not noise:
            return spec_of(DEVICES, vector=VectorSpec((Segment(counted, 4, float(MOST)),), **bounds))
        vector = noisy_spec(counted, 4, Bounds(norm, 1, 32, DEVICES, noise * norm / honest**0.5))
        own = {"clip_norm": norm, "weight_cap": 1, "privacy": Privacy(Mechanism.SKELLAM, honest, 1e-6)}
        return spec_of(DEVICES, vector=vector, **own)

    policy.check(session(HONEST), DEVICES)
    with refused(ProtocolError, "offer.noise_multiplier" if multiplier else "offer.privacy"):
        policy.check(session(multiplier), DEVICES)


def test_a_task_does_not_say_how_many_examples_a_device_must_have() -> None:
    """With ``least``, only the device with the most held-out examples counted."""
    task = EvaluationTask(PeftConfig("LORA", 2, 4, ("query",)), ("on", "off"), "a" * 64, "b" * 64, MOST)
    raw = jsontext.encode(asdict(task) | {"least": MOST})
    with refused(ProtocolError, "task.least"):
        EvaluationTask.decode(raw)
