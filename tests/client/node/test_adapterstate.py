"""Old adapters, second adapters of a version and used-up adapters are refused; every honest order of plans is not."""

from collections.abc import Container, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.entropy import SystemEntropy
from aggregation.errors import ProtocolError, TrustError
from aggregation.messages import Plan
from aggregation.pki.identity import IdentityKey
from aggregation.privacy.accounting import Mechanism
from aggregation.spec import Grouping, Privacy, SessionSpec
from client.node import adapterstate, sumhistory
from client.node.adapterstate import ADAPTER_STATE, EARLIER, AdapterState, earlier, terms
from client.node.statedir import ADAPTERS, SUMS, DeviceSettings, DeviceStateDir
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

A, B = "aa" * 32, "bb" * 32
ALL = tuple(f"device-{number:02d}" for number in range(20))


def plan(version: int, digest: str = A, round_: int = 1) -> Plan:
    return Plan(bytes(32), round_, ("a", "b"), version, digest, b"")


ALL_SERIALS = {name: 100 + number for number, name in enumerate(ALL)}
SPEC = session_spec(20)
TERMS = terms(plan(0), SPEC)


def on_plan(known: AdapterState | None, each: Plan, repeats: int, spec: SessionSpec = SPEC) -> AdapterState:
    return adapterstate.on_plan(known, each, spec, repeats)


def on_survivors(
    known: AdapterState | None, each: Plan, survivors: Iterable[str] = ALL, revoked: Container[int] = ()
) -> AdapterState:
    """``revoked``: serials. A device has the number in its name, plus 100, as its serial."""
    return adapterstate.on_survivors(known, each, SPEC, {name: ALL_SERIALS.get(name, 0) for name in survivors}, revoked)


def after(known: AdapterState | None, *unmasked: Plan, repeats: int = 1) -> AdapterState:
    """The state after rounds that were all unmasked, over all devices."""
    for each in unmasked:
        known = on_survivors(on_plan(known, each, repeats), each)
    assert known is not None
    return known


def test_the_first_plan_may_have_any_version() -> None:
    assert on_plan(None, plan(7), 0) == AdapterState(7, A, TERMS)


def test_an_adapter_that_is_older_than_the_last_one_is_refused() -> None:
    known = after(None, plan(3), plan(4, B))
    with refused(ProtocolError, "plan.adapter_version", peer="coordinator", value=3):
        on_plan(known, plan(3), 9)
    with refused(ProtocolError, "plan.adapter_version", peer="coordinator", value=3):
        on_plan(known, plan(3, B), 9)


def test_a_second_adapter_of_a_version_is_refused() -> None:
    with refused(ProtocolError, "plan.adapter_version", peer="coordinator", value=3):
        on_plan(on_plan(None, plan(3), 9), plan(3, B), 9)


def test_rounds_that_were_not_unmasked_do_not_count() -> None:
    known = on_plan(None, plan(3), 0)
    for _ in range(20):
        known = on_plan(known, plan(3), 0)
    assert on_survivors(known, plan(3)) == AdapterState(3, A, TERMS, 1, ALL_SERIALS)


@pytest.mark.parametrize("repeats", [0, 1, 3])
def test_an_adapter_is_used_up_after_so_many_repeats(repeats: int) -> None:
    known = after(None, *[plan(3)] * (1 + repeats), repeats=repeats)
    with refused(ProtocolError, "plan.repeats", peer="coordinator", value=1 + repeats):
        on_plan(known, plan(3), repeats)
    assert on_plan(known, plan(4, B), repeats) == AdapterState(4, B, TERMS, earlier=(bytes.fromhex(A),))


def test_the_same_bytes_under_a_later_number_are_the_same_adapter() -> None:
    known = after(None, plan(3), plan(5))
    with refused(ProtocolError, "plan.repeats", value=2):
        on_plan(known, plan(9), 1)
    with refused(ProtocolError, "plan.adapter_version"):
        on_plan(known, plan(4), 9)


def test_an_adapter_is_refused_once_another_one_came_after_its_sums() -> None:
    known = after(None, plan(3), plan(4, B))
    for state in (known, on_plan(known, plan(5, "cc" * 32), 9)):
        with refused(ProtocolError, "plan.adapter_digest", peer="coordinator", value=6):
            on_plan(state, plan(6), 9)
    unsummed = on_plan(on_plan(None, plan(3), 9), plan(4, B), 9)
    assert on_plan(unsummed, plan(5), 9).digest == A


def test_so_many_adapters_are_remembered_and_no_more() -> None:
    known = after(None, *[plan(version, f"{version:064x}") for version in range(EARLIER + 2)])
    assert [int.from_bytes(each) for each in earlier(known)] == list(range(2, EARLIER + 2))
    assert ADAPTER_STATE.decode(ADAPTER_STATE.encode(known)) == known
    with refused(ProtocolError, "plan.adapter_digest"):
        on_plan(known, plan(EARLIER + 2, f"{2:064x}"), 9)
    assert on_plan(known, plan(EARLIER + 2, f"{1:064x}"), 9).sums == 0


@pytest.mark.parametrize("known", [None, AdapterState(2, B, TERMS), AdapterState(4, B, TERMS, 1, ALL_SERIALS)], ids=str)
def test_a_device_reveals_no_shares_for_an_adapter_that_it_does_not_remember(known: AdapterState | None) -> None:
    """It was stopped between the two saves of a later plan: it does not know what it revealed for the earlier one."""
    with refused(ProtocolError, "survivors.adapter", peer="coordinator", value=3):
        on_survivors(known, plan(3))


OTHERS = pytest.mark.parametrize(
    "survivors",
    [ALL[1:], (*ALL, "another"), ALL[10:], (*ALL[2:], "another", "and another"), [f"other-{name}" for name in ALL]],
)


@OTHERS
def test_a_second_sum_over_other_devices_is_refused(survivors: Iterable[str]) -> None:
    known = after(None, plan(3))
    for repeated in (known, on_survivors(known, plan(3))):
        with refused(ProtocolError, "survivors.repeat", peer="coordinator"):
            on_survivors(repeated, plan(3), survivors)
    assert {*on_survivors(on_plan(known, plan(4, B), 1), plan(4, B), survivors).survivors} == {*survivors}


def test_a_later_sum_may_lack_devices_that_were_revoked_and_no_others() -> None:
    known, revoked = after(None, plan(3)), {100, 101, 105}
    less = on_survivors(known, plan(3), ALL[2:], revoked)
    assert less == AdapterState(3, A, TERMS, 2, {name: ALL_SERIALS[name] for name in ALL[2:]})
    for survivors in (ALL[3:], (*ALL[2:], "another")):
        with refused(ProtocolError, "survivors.repeat", value=1):
            on_survivors(known, plan(3), survivors, revoked)
    with refused(ProtocolError, "survivors.repeat", value=2):  # those that it lacks do not come back
        on_survivors(less, plan(3), ALL, revoked)


def test_a_device_whose_certificate_was_renewed_is_in_the_set_under_its_name() -> None:
    renewed = {**ALL_SERIALS, ALL[0]: 7}
    known = adapterstate.on_survivors(after(None, plan(3)), plan(3), SPEC, renewed, {100})
    assert known == AdapterState(3, A, TERMS, 2, renewed)
    with refused(ProtocolError, "survivors.repeat", value=1):
        on_survivors(known, plan(3), ALL[1:], {100})
    assert on_survivors(known, plan(3), ALL[1:], {7, 100}).sums == 3


@pytest.mark.parametrize("change", [{"clip_norm": 3.9}, {"weight_cap": 99}, {"training": b"other"}], ids=str)
def test_a_repeat_on_other_terms_is_refused(change: dict[str, Any]) -> None:
    spec, other = (SPEC, replace(plan(3), **change)) if "training" in change else (replace(SPEC, **change), plan(3))
    assert on_plan(on_plan(None, plan(3), 1), other, 1, spec).terms == terms(other, spec)  # no sum was unmasked
    with refused(ProtocolError, "plan.terms", peer="coordinator"):
        on_plan(after(None, plan(3)), other, 1, spec)
    assert on_plan(after(None, plan(3)), replace(other, adapter_version=4, adapter_digest=B), 1, spec).sums == 0


@given(st.lists(st.integers(0, 2), max_size=30))
def test_a_coordinator_that_repeats_failed_rounds_within_the_limit_is_never_refused(failures: list[int]) -> None:
    """Each entry: how often the round failed after the unmask request, before it made the next version."""
    known: AdapterState | None = None
    for version, failed in enumerate(failures):
        digest = f"{version:064x}"
        known = after(known, *[plan(version, digest)] * (failed + 1), repeats=2)
    if known is not None:
        assert ADAPTER_STATE.decode(ADAPTER_STATE.encode(known)) == known


def test_a_state_survives_the_process_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    identity = IdentityKey.generate(SystemEntropy())
    settings = DeviceSettings(base="some_base")
    state_dir = DeviceStateDir.create(tmp_path / "state", settings, identity, {}, SystemEntropy())
    assert state_dir.load(AdapterState) is None
    known = AdapterState(3, A, TERMS, 2, {**ALL_SERIALS, ALL[0]: 2**160 - 1})
    state_dir.save(known)
    assert DeviceStateDir.open(state_dir.folder).load(AdapterState) == known
    state_dir.save(replace(known, sums=0, survivors={}))
    assert state_dir.load(AdapterState) == AdapterState(3, A, TERMS)
    (state_dir.folder / ADAPTERS).write_bytes(b"damaged")
    with refused(TrustError, ADAPTERS) as caught:
        state_dir.load(AdapterState)
    assert "edgeadapt device forget" in str(caught.value)


def test_a_repeat_with_other_groups_is_refused() -> None:
    """Of the sums over two deals of the same devices, the difference would show a few of them."""
    spec = session_spec(20, grouping=Grouping(2, 5))
    first = replace(plan(3), members=ALL)
    known = adapterstate.on_plan(None, first, spec, 3)
    bound = adapterstate.on_survivors(known, first, spec, {name: ALL_SERIALS[name] for name in ALL[1:]}, ())
    less = replace(first, members=ALL[1:])
    for other in (less, replace(less, former=("device-99",)), replace(less, former=(ALL[0], "device-99"))):
        with refused(ProtocolError, "plan.groups"):
            adapterstate.on_plan(bound, other, spec, 3)
    for other_spec in (SPEC, session_spec(20, grouping=Grouping(3, 5))):
        with refused(ProtocolError, "plan.groups"):
            adapterstate.on_plan(bound, first, other_spec, 3)
    again = replace(less, former=ALL[:1])
    assert adapterstate.on_plan(bound, again, spec, 3).sums == 1
    assert adapterstate.on_plan(bound, replace(plan(4, B), members=ALL[1:]), spec, 3).sums == 0  # another adapter


# Adapters that hardly differ count as one: their sums are over the same devices, or there is no second one.
CONFIG = PeftConfig("LORA", 4, 8, ("query",))
TASK = Task(CONFIG, ("a", "b"), 1, 16, 0.01, 0.0, 0.0, PARTS, PARTS)
MOMENTS = AnalyticTask(CONFIG, ("a", "b"), 1e-3, 16.0)
SERIALS = {f"device-{number:02d}": 100 + number for number in range(20)}
WITHOUT_ONE = {name: serial for name, serial in SERIALS.items() if name != "device-00"}
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
        survivors: dict[str, int] = SERIALS,
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
    device.sum(moved(first, 2 * LEAST), WITHOUT_ONE)


def test_sums_on_two_bases_are_not_compared_and_neither_is_forgotten() -> None:
    """A coordinator that goes to the next base and back is bound as if it had stayed."""
    device, first = Federation(), adapter()
    following = replace(SPEC, base_digest="c" * 64, layout_digest="d" * 64)
    device.sum(first)
    device.sum(adapter(5), WITHOUT_ONE, spec=following)
    for spec, tensors, survivors in ((SPEC, first, WITHOUT_ONE), (following, adapter(5), SERIALS)):
        with refuses("plan.movement" if spec is SPEC else "survivors.movement"):
            device.sum(moved(tensors, 0.5 * LEAST), survivors, spec=spec)


@pytest.mark.parametrize("part", ["", "lora_A", "lora_B", "classifier"])
@pytest.mark.parametrize("by", [0.0, 1e-6, 0.5])
def test_a_sum_from_one_that_did_not_is_over_the_same_devices(by: float, part: str) -> None:
    device, first = Federation(), adapter()
    device.sum(first)
    for survivors in (WITHOUT_ONE, SERIALS | {"device-99": 7}):
        with refuses("survivors.movement"):
            device.sum(moved(first, by * LEAST, part), survivors)
    for number in range(9):  # however often, with numbers of which each is another adapter
        device.sum(moved(first, by * LEAST / 9 * number, part))
    device.sum(moved(first, by * LEAST, part), WITHOUT_ONE, revoked=(100,))


def test_small_steps_do_not_add_up() -> None:
    device, tensors = Federation(), adapter()
    for _ in range(12):
        device.sum(tensors)
        tensors = moved(tensors, LEAST / 3)  # in one direction
        with refuses("survivors.movement"):
            device.sum(tensors, WITHOUT_ONE)
    device.sum(moved(tensors, 2 * LEAST), WITHOUT_ONE)


def test_no_adapter_returns_near_one_whose_sum_was_over_other_devices() -> None:
    device, first = Federation(), adapter()
    device.sum(first)
    device.sum(moved(first, 3 * LEAST), WITHOUT_ONE)
    for by in (0.0, 0.5):
        with refuses("plan.movement"):
            device.plan(moved(first, by * LEAST, seed=9))
    device.sum(moved(first, 3 * LEAST, seed=9))


def test_it_returns_while_all_sums_were_over_the_same_devices() -> None:
    device, first = Federation(), adapter()
    for each in (first, moved(first, 3 * LEAST), first):
        device.sum(each)
    with refuses("survivors.movement"):
        device.sum(moved(first, LEAST / 2), WITHOUT_ONE)


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
    device.sum(moved(first, 2 * LEAST, "lora_B"), WITHOUT_ONE, task=turn)
    private = replace(TASK, shared=(Part.A, Part.B))
    device = Federation()
    device.sum(first, task=private)
    with refuses("survivors.movement"):  # the device's own head takes the place of this one
        device.sum(moved(first, 1.0, "classifier"), WITHOUT_ONE, task=private)


def test_embeddings_need_no_head() -> None:
    device, first = Federation(), adapter()
    device.sum(first, task=MOMENTS)
    with refuses("survivors.movement"):
        device.sum(moved(first, 9.0, "classifier"), WITHOUT_ONE, task=MOMENTS)
    device.sum(moved(first, 9.0, "classifier"), task=MOMENTS)
    device.sum(moved(first, 9.0, "lora_A"), WITHOUT_ONE, task=MOMENTS)


def test_the_score_of_an_adapter_is_in_sums_of_updates_and_of_moments() -> None:
    for one, other in ((TASK, MOMENTS), (MOMENTS, TASK)):
        device, first = Federation(), adapter()
        device.sum(first, task=one)
        with refuses("survivors.movement"):
            device.sum(moved(first, 1e-6), WITHOUT_ONE, task=other)
        device.sum(moved(first, 1.0, "classifier"), WITHOUT_ONE, task=other)


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
    device.sum(moved(first, 1e-6), WITHOUT_ONE, spec=noisy)
    assert device.known == known


def test_a_device_helps_to_no_sum_of_a_plan_that_it_does_not_remember() -> None:
    device, first = Federation(), adapter()
    before = device.plan(first)
    device.plan(moved(first, 1.0))
    for known in (device.known, None):
        with refuses("survivors.adapter"):
            sumhistory.on_survivors(known, before, SPEC, SERIALS, ())


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
        device.sum(adapter(number), SERIALS if number % 2 else WITHOUT_ONE)
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
