"""Adapters that hardly differ count as one: their sums are over the same devices, or there is no second one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.entropy import SystemEntropy
from aggregation.errors import ProtocolError, TrustError
from aggregation.messages import Plan
from aggregation.pki.identity import IdentityKey
from aggregation.privacy.accounting import Mechanism
from aggregation.spec import Grouping, Privacy, SessionSpec
from client.node import sumhistory
from client.node.statedir import SUMS, DeviceSettings, DeviceStateDir
from client.node.sumhistory import BUCKETS, SumHistory, SumKind, separation, sketch
from edgeadapt.formats import files
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.parts import PARTS, Part
from edgeadapt.rounds.analytic import AnalyticTask
from edgeadapt.rounds.evaluation import EvaluationTask
from edgeadapt.rounds.roundtask import LEAST_STEP, distance
from edgeadapt.rounds.task import OptimizerName, Task
from tests.support import refused
from tests.support.fleet import session_spec

CONFIG = PeftConfig("LORA", 4, 8, ("query",))
TASK = Task(CONFIG, ("a", "b"), 1, 16, 0.01, 0.0, 0.0, PARTS, PARTS)
MOMENTS = AnalyticTask(CONFIG, ("a", "b"), 1e-3, 16.0)
SPEC = session_spec(20)
ALL = {f"device-{number:02d}": 100 + number for number in range(20)}
OTHERS = {name: serial for name, serial in ALL.items() if name != "device-00"}
LAYER = "base_model.model.encoder.query"
SHAPES = {
    f"{LAYER}.lora_A.weight": (4, 32),
    f"{LAYER}.lora_B.weight": (32, 4),
    "base_model.model.classifier.weight": (2, 32),
    "base_model.model.classifier.bias": (2,),
}
LEAST = TASK.least_movement(SPEC.clip_norm, SPEC.vector.segments[0].size, 0.05)


def adapter(seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in SHAPES.items()}


def moved(tensors: Tensors, by: float, part: str = "", seed: int = 1) -> Tensors:
    """The adapter moved so far in a random direction, in the tensors whose names contain ``part``."""
    rng = np.random.default_rng(seed)
    step = {name: rng.normal(size=value.shape) for name, value in tensors.items() if part in name}
    norm = np.sqrt(sum(float((value**2).sum()) for value in step.values()))
    return tensors | {name: (tensors[name] + by / norm * value).astype(np.float32) for name, value in step.items()}


class Federation:
    """A device that is sent adapters under rising numbers, and asked to help to their sums."""

    def __init__(self, known: SumHistory | None = None) -> None:
        self.known, self.version = known or SumHistory.new(SystemEntropy()), 0

    def plan(self, tensors: Tensors, task: Any = TASK, spec: SessionSpec = SPEC) -> Plan:
        self.version += 1
        digest = files.sha256(files.encode(tensors))
        plan = Plan(bytes(32), 1, ("a", "b"), self.version, digest, task.encode())
        self.known = sumhistory.on_plan(self.known, plan, task, spec, tensors, 0.05)
        return plan

    def sum(
        self,
        tensors: Tensors,
        survivors: dict[str, int] = ALL,
        task: Any = TASK,
        spec: SessionSpec = SPEC,
        revoked: tuple[int, ...] = (),
    ) -> None:
        plan = self.plan(tensors, task, spec)
        after = sumhistory.on_survivors(self.known, plan, spec, survivors, revoked)
        assert after is not None or spec.privacy
        self.known = after or self.known


def refuses(about: str) -> Any:
    return refused(ProtocolError, about, peer="coordinator")


def test_a_sum_from_an_adapter_that_moved_may_be_over_other_devices() -> None:
    device, first = Federation(), adapter()
    device.sum(first)
    device.sum(moved(first, 2 * LEAST), OTHERS)


def test_sums_on_two_bases_are_not_compared_and_neither_is_forgotten() -> None:
    """A coordinator that goes to the next base and back is bound as if it had stayed."""
    device, first = Federation(), adapter()
    following = replace(SPEC, base_digest="c" * 64, layout_digest="d" * 64)
    device.sum(first)
    device.sum(adapter(5), OTHERS, spec=following)
    for spec, tensors, survivors in ((SPEC, first, OTHERS), (following, adapter(5), ALL)):
        with refuses("plan.movement" if spec is SPEC else "survivors.movement"):
            device.sum(moved(tensors, 0.5 * LEAST), survivors, spec=spec)


@pytest.mark.parametrize("part", ["", "lora_A", "lora_B", "classifier"])
@pytest.mark.parametrize("by", [0.0, 1e-6, 0.5])
def test_a_sum_from_one_that_did_not_is_over_the_same_devices(by: float, part: str) -> None:
    device, first = Federation(), adapter()
    device.sum(first)
    for survivors in (OTHERS, ALL | {"device-99": 7}):
        with refuses("survivors.movement"):
            device.sum(moved(first, by * LEAST, part), survivors)
    for number in range(9):  # however often, with numbers of which each is another adapter
        device.sum(moved(first, by * LEAST / 9 * number, part))
    device.sum(moved(first, by * LEAST, part), OTHERS, revoked=(100,))


def test_small_steps_do_not_add_up() -> None:
    device, tensors = Federation(), adapter()
    for _ in range(12):
        device.sum(tensors)
        tensors = moved(tensors, LEAST / 3)  # in one direction
        with refuses("survivors.movement"):
            device.sum(tensors, OTHERS)
    device.sum(moved(tensors, 2 * LEAST), OTHERS)


def test_no_adapter_returns_near_one_whose_sum_was_over_other_devices() -> None:
    device, first = Federation(), adapter()
    device.sum(first)
    device.sum(moved(first, 3 * LEAST), OTHERS)
    for by in (0.0, 0.5):
        with refuses("plan.movement"):
            device.plan(moved(first, by * LEAST, seed=9))
    device.sum(moved(first, 3 * LEAST, seed=9))


def test_it_returns_while_all_sums_were_over_the_same_devices() -> None:
    device, first = Federation(), adapter()
    for each in (first, moved(first, 3 * LEAST), first):
        device.sum(each)
    with refuses("survivors.movement"):
        device.sum(moved(first, LEAST / 2), OTHERS)


def test_a_rate_or_clip_norm_that_makes_each_step_tiny_makes_no_step_a_movement() -> None:
    for task, clip in ((replace(TASK, learning_rate=1e-9), 4.0), (TASK, 1e-9)):
        assert task.least_movement(clip, 10**6, 0.05) == 0.05 * LEAST_STEP
    sgd = replace(TASK, optimizer=OptimizerName.SGD, momentum=0.5, learning_rate=0.1)
    for norm, least in ((0.0, 0.01), (50.0, 0.01), (0.75, 0.0075), (1e-9, 0.05 * LEAST_STEP)):
        assert replace(sgd, gradient_norm=norm).least_movement(4.0, 10**6, 0.05) == pytest.approx(least)
    assert TASK.least_movement(4.0, 10**4, 0.05) == pytest.approx(0.05)
    assert TASK.least_movement(0.5, 10**6, 0.05) == pytest.approx(0.025)


def test_a_part_that_others_train_in_turns_counts_and_one_that_stays_on_devices_does_not() -> None:
    turn = replace(TASK, trained=(Part.A, Part.HEAD))
    device, first = Federation(), adapter()
    device.sum(first, task=turn)
    device.sum(moved(first, 2 * LEAST, "lora_B"), OTHERS, task=turn)
    private = replace(TASK, shared=(Part.A, Part.B))
    device = Federation()
    device.sum(first, task=private)
    with refuses("survivors.movement"):  # the device's own head takes the place of this one
        device.sum(moved(first, 1.0, "classifier"), OTHERS, task=private)


def test_embeddings_need_no_head() -> None:
    device, first = Federation(), adapter()
    device.sum(first, task=MOMENTS)
    with refuses("survivors.movement"):
        device.sum(moved(first, 9.0, "classifier"), OTHERS, task=MOMENTS)
    device.sum(moved(first, 9.0, "classifier"), task=MOMENTS)
    device.sum(moved(first, 9.0, "lora_A"), OTHERS, task=MOMENTS)


def test_the_score_of_an_adapter_is_in_sums_of_updates_and_of_moments() -> None:
    for one, other in ((TASK, MOMENTS), (MOMENTS, TASK)):
        device, first = Federation(), adapter()
        device.sum(first, task=one)
        with refuses("survivors.movement"):
            device.sum(moved(first, 1e-6), OTHERS, task=other)
        device.sum(moved(first, 1.0, "classifier"), OTHERS, task=other)


def test_right_answers_are_summed_with_noise_only() -> None:
    with refuses("offer.spec.vector"):
        Federation().plan(adapter(), EvaluationTask(CONFIG, ("a", "b"), "ab" * 32, "cd" * 32, 8))


def test_a_sum_from_a_near_adapter_is_on_the_same_terms_and_without_groups() -> None:
    device, first = Federation(), adapter()
    device.sum(first)
    near = moved(first, LEAST / 9)
    for task, spec in ((replace(TASK, epochs=2), SPEC), (TASK, replace(SPEC, clip_norm=2.0))):
        with refuses("plan.terms"):
            device.plan(near, task, spec)
    for task in (replace(TASK, labels=("b", "a")), replace(TASK, peft_config=replace(CONFIG, lora_alpha=16))):
        with refuses("plan.terms"):  # not comparable, so they count as near
            device.plan(moved(first, 9.0), task)
    grouped = Federation()
    spec = replace(SPEC, grouping=Grouping(2, 8))
    grouped.sum(first, spec=spec)
    grouped.sum(first, spec=spec)
    with refuses("plan.groups"):
        grouped.plan(near, spec=spec)


def test_with_noise_nothing_is_compared() -> None:
    device, first = Federation(), adapter()
    device.sum(first)
    vector = replace(SPEC.vector, segments=(replace(SPEC.vector.segments[0], noise=1.0),))
    noisy = replace(SPEC, vector=vector, weight_cap=1, privacy=Privacy(Mechanism.SKELLAM, 10, 1e-6))
    known = device.known
    device.sum(moved(first, 1e-6), OTHERS, spec=noisy)
    assert device.known == known


def test_a_device_helps_to_no_sum_of_a_plan_that_it_does_not_remember() -> None:
    device, first = Federation(), adapter()
    before = device.plan(first)
    device.plan(moved(first, 1.0))
    for known in (device.known, None):
        with refuses("survivors.adapter"):
            sumhistory.on_survivors(known, before, SPEC, ALL, ())


def test_a_sketch_gives_distances_and_shows_no_order_of_them_without_its_key() -> None:
    rng, far = np.random.default_rng(0), []
    for number in range(300):
        one = adapter(number)
        other = moved(one, float(rng.uniform(1e-3, 10)), seed=number + 1)
        true = distance(one, other, TASK.influencing())
        key = rng.bytes(32)
        far.append(separation(sketch(one, key), sketch(other, key), TASK.influencing()) / true)
    assert 0.97 < np.mean(np.square(far)) < 1.03
    assert np.std(np.square(far)) < 1.3 * np.sqrt(2 / BUCKETS)
    assert 0.4 < min(far) < max(far) < 1.7


def test_the_history_survives_a_restart_and_shows_a_change(tmp_path: Path) -> None:
    state_dir = DeviceStateDir.create(tmp_path, DeviceSettings(base="b"), IdentityKey(bytes(32)), {}, SystemEntropy())
    assert state_dir.load(SumHistory) is None
    device = Federation()
    for number in range(3):
        device.sum(adapter(number), ALL if number % 2 else OTHERS)
        device.sum(adapter(number + 9), task=MOMENTS)
    state_dir.save(device.known)
    assert DeviceStateDir.open(tmp_path).load(SumHistory) == device.known
    assert {sums.kind for sums in device.known.last} == {SumKind.UPDATES, SumKind.MOMENTS}
    assert len(device.known.earlier) == 2
    path = tmp_path / SUMS
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with refused(TrustError, "sealed.ciphertext"):
        state_dir.load(SumHistory)
    state_dir.forget()
    assert not path.exists()
