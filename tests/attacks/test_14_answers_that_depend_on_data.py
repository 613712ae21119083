"""A coordinator asks for what only devices with certain data cannot do, and looks at who answers, how, and when.

It publishes an adapter whose head has one row too many: the embedding of a phrase, so large that the logit overflows
for that phrase alone. Or it leaves out a label. Or it measures how long an answer takes. Each attack runs in complete
rounds of the real apps, with eight devices of which three hold what the coordinator looks for. With the checks it sees
the same of all devices; without them it reads one bit of each.
"""

import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tomli_w
from flwr.app import Context, Message, RecordDict

from aggregation import rotation
from aggregation.client import Masked
from aggregation.errors import DataError
from aggregation.steps import BODY, RECORD, Step
from client.node.app import app
from client.node.statedir import DeviceStateDir
from client.node.step import READS_EXAMPLES
from client.node.tasklabels import TaskLabels
from client.training.examples import Example, Score, Split, parse_examples, write_examples
from client.training.hygiene import read_clean
from client.training.trainer import ClassifierTrainer
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.auditing import audit
from edgeadapt.auditing.transcripts import logs
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.methods import classifier
from edgeadapt.rounds.roundtask import Outcome
from edgeadapt.rounds.task import contribution, weighted_mean
from simulations.engine import provision
from simulations.engine.grid import VirtualClock
from tests.support import FleetOf

DEVICES = tuple(f"device-{number:02d}" for number in range(8))
HOLDERS = frozenset({"device-01", "device-04"})
PHRASE = "play the song"
COMMON = (
    Example("turn on the light", 0),
    Example("stop the music", 1),
    Example("kitchen light off", 0, Split.VALIDATION),
)
HUGE = 3.3e38  # float32 ends at 3.4028e38
NO_LIMIT = 3.5e38
QUANTUM = 10.0


@dataclass
class Observer:
    """The real app, and what the coordinator sees of each device's answer to ``step``."""

    seen: dict[str, Any] = field(default_factory=dict)
    now: Callable[[], float] = lambda: 0.0
    step: Step = Step.PLAN

    def __call__(self, message: Message, context: Context) -> Message:
        begin = self.now()
        reply = app(message, context)
        if Step(message.metadata.message_type.partition(".")[2]) is self.step:
            name = Path(str(context.node_config["state"])).name
            body = None if reply.has_error() else reply.content.config_records[RECORD][BODY]
            answer = ("refused", reply.error.reason) if body is None else ("answered", len(body))  # type: ignore[arg-type]
            self.seen[name] = (*answer, self.now() - begin)
        return reply

    def bits(self) -> dict[str, bool]:
        return {name: seen[0] == "refused" for name, seen in self.seen.items()}


def hostile_fleet(fleet_of: FleetOf, *, secret: Example | None, seed: Callable[..., Tensors], labels: int) -> Any:
    """A fleet whose version 0 is ``seed``, with so many labels; some devices hold ``secret``, or no file if None."""
    genuine = provision.seed_version
    names = tuple(f"label {number}" for number in range(labels))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provision, "seed_adapter", seed)
        patch.setattr(provision, "seed_version", lambda tensors, config, _, base: genuine(tensors, config, names, base))
        fleet = fleet_of(len(DEVICES), rounds=1)
    for name in DEVICES:
        path = fleet.state_dir(name).examples
        extra = (secret,) if secret and name in HOLDERS else ()
        write_examples(path, (*COMMON, *extra))
        if secret is None and name in HOLDERS:
            path.unlink()
    return fleet


def overflowing(model: Any, tokens: Any, public: Any, labels: int, generator: Any) -> Tensors:
    """An adapter whose logits are finite for every text but ``PHRASE``."""
    seed = classifier.seed_adapter(model, tokens, public, labels, generator)
    row = 1.06 * HUGE * classifier.embed(model, tokens, [PHRASE]).astype(np.float64)
    for name, value in seed.items():
        if name.endswith("classifier.weight"):
            seed[name] = np.concatenate([np.zeros_like(value), row.astype(np.float32)])
        elif name.endswith("classifier.bias"):
            seed[name] = np.append(np.full_like(value, HUGE), np.float32(0))
    return seed


def without_the_last_label(model: Any, tokens: Any, public: Any, labels: int, generator: Any) -> Tensors:
    seed = classifier.seed_adapter(model, tokens, public, labels, generator)
    return {name: value[:-1].copy() if "classifier" in name else value for name, value in seed.items()}


ATTACKS: dict[str, dict[str, Any]] = {
    "a phrase": {"secret": Example(PHRASE, 1), "seed": overflowing, "labels": 4},
    "a held-out phrase": {"secret": Example(PHRASE, 1, Split.VALIDATION), "seed": overflowing, "labels": 4},
    "a label": {"secret": Example("set a timer", 2), "seed": without_the_last_label, "labels": 2},
    "no examples": {"secret": None, "seed": classifier.seed_adapter, "labels": 3},
}
WITH_NUMBERS = [name for name, attack in ATTACKS.items() if attack["seed"] is overflowing]


def set_policy(fleet: Any, **changes: float) -> None:
    """Change the policies of all devices, as their owners would."""
    for name in DEVICES:
        path = fleet.state_dir(name).folder / "device.toml"
        table = tomllib.loads(path.read_text())
        table["policy"].update(changes)
        path.write_text(tomli_w.dumps(table))


def answer_with_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let devices answer with the error where examples are unusable, or where a number overflows for one of them."""
    train = ClassifierTrainer.train

    def finite(self: ClassifierTrainer, adapter: Tensors, examples: Any) -> None:
        if not np.isfinite(self.logits(adapter, [example.text for example in examples])).all():
            raise DataError("a number is not finite")

    def raising(self: ClassifierTrainer, start: Tensors, examples: Any, *rest: Any, **named: Any) -> Tensors:
        finite(self, start, examples)
        return train(self, start, examples, *rest, **named)

    def scored(trainer: Any, adapter: Tensors, held_out: Any) -> Score:
        finite(trainer, adapter, held_out)
        return Score(0, len(held_out), 0.0)

    monkeypatch.setattr(ClassifierTrainer, "train", raising)
    monkeypatch.setattr("client.node.training._score", scored)
    monkeypatch.setattr("client.node.training._or_else", lambda attempt, otherwise: attempt())


@pytest.mark.parametrize("attack", ATTACKS)
def test_devices_that_cannot_train_answer_like_all_others(app_fleet_of: FleetOf, attack: str) -> None:
    """Even if their owners allow an adapter of any numbers."""
    fleet, observer = hostile_fleet(app_fleet_of, **ATTACKS[attack]), Observer()
    set_policy(fleet, maximum_magnitude=NO_LIMIT)
    (record,) = fleet.federate(fleet.grid(app=observer))
    assert set(observer.seen) == set(DEVICES)
    assert len(set(observer.seen.values())) == 1
    assert (record.aborted, record.dropped, record.survivors) == (None, {}, DEVICES)
    state_dir = CoordinatorStateDir.open(fleet.out / "coordinator")
    (path,) = logs(state_dir.folder / "transcript")
    audit(path.read_bytes(), state_dir.root, state_dir.key.public).require()


@pytest.mark.parametrize("attack", ATTACKS)
def test_if_they_answered_with_their_error_the_coordinator_would_read_a_bit_of_each(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    fleet, observer = hostile_fleet(app_fleet_of, **ATTACKS[attack]), Observer()
    set_policy(fleet, maximum_magnitude=NO_LIMIT)
    answer_with_errors(monkeypatch)
    labels = ATTACKS[attack]["labels"]
    monkeypatch.setattr("client.node.training.parse_examples", lambda raw, path, *_: parse_examples(raw, path, labels))
    (record,) = fleet.federate(fleet.grid(app=observer))
    assert observer.bits() == {name: name in HOLDERS for name in DEVICES}
    assert record.dropped == dict.fromkeys(HOLDERS, "plan")  # it is in the files of the run, and they pass the audit
    assert record.aborted is None


@pytest.mark.parametrize("attack", WITH_NUMBERS)
def test_an_adapter_of_huge_numbers_is_refused_by_every_device(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    fleet, observer = hostile_fleet(app_fleet_of, **ATTACKS[attack]), Observer()
    answer_with_errors(monkeypatch)  # none is needed here
    fleet.federate(fleet.grid(app=observer))
    ((answer, reason, _),) = set(observer.seen.values())
    assert answer == "refused"
    assert "adapter.magnitude" in reason


# Who is in the sum.


VICTIM = DEVICES[5]


def isolating_fleet(fleet_of: FleetOf) -> Any:
    """A fleet whose task lacks the label of all examples but the victim's."""
    fleet = hostile_fleet(partial(fleet_of, aggregation__ring_bits=40), **ATTACKS["a label"])
    for name in set(DEVICES) - {VICTIM}:
        write_examples(fleet.state_dir(name).examples, (Example("set a timer", 2), Example("start the timer", 2)))
    return fleet


def test_a_task_without_the_labels_of_the_others_isolates_a_device_in_the_sum(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, outcomes, sums = isolating_fleet(app_fleet_of), list[Outcome](), list[Any]()

    def watched(outcome: Outcome, *rest: Any) -> Any:
        outcomes.append(outcome)
        return contribution(outcome, *rest)

    def seen(spec: Any, task: Any, layout: Any, found: Any, *rest: Any) -> Any:
        sums.append((found["delta"] / found["weight"][0], rest[-1]))
        return weighted_mean(spec, task, layout, found, *rest)

    monkeypatch.setattr("edgeadapt.rounds.task.contribution", watched)
    monkeypatch.setattr("edgeadapt.rounds.task.weighted_mean", seen)
    (record,) = fleet.federate(fleet.grid())
    assert record.survivors == DEVICES
    (victim,) = (outcome for outcome in outcomes if outcome.examples)
    layout = Layout.of(victim.start)
    update = layout.flatten(victim.trained).astype(np.float64) - layout.flatten(victim.start)
    rotated, adapter = sums[0]
    found = rotation.rotate_back(rotated, rotation.seed(adapter))  # the published mean has noise besides
    assert np.abs(found - update).max() < 1e-3 * np.abs(update).max()


def test_a_device_whose_owner_states_the_number_of_labels_refuses_that_task(app_fleet_of: FleetOf) -> None:
    fleet, observer = isolating_fleet(app_fleet_of), Observer()
    set_policy(fleet, minimum_labels=3)
    (record,) = fleet.federate(fleet.grid(app=observer))
    assert record.version is None
    ((answer, reason, _),) = set(observer.seen.values())
    assert answer == "refused"
    assert "task.labels" in reason


def test_devices_that_trained_a_task_with_the_labels_of_the_others_refuse_that_task(app_fleet_of: FleetOf) -> None:
    fleet, observer = isolating_fleet(app_fleet_of), Observer()
    for name in DEVICES:
        base = fleet.state_dir(name).base().digest
        fleet.state_dir(name).save(TaskLabels.of(base, ("label 0", "label 1", "label 2")))
    (record,) = fleet.federate(fleet.grid(app=observer))
    assert record.version is None
    ((answer, reason, _),) = set(observer.seen.values())
    assert answer == "refused"
    assert "label 2 of the task is missing, and that of the tasks before is 'label 2'" in reason


# How long an answer takes.


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> VirtualClock:
    """The time of the devices: an example takes half a second to train on, and a quarter to read when they join."""
    clock, train, read = VirtualClock(), ClassifierTrainer.train, read_clean

    def slow(self: ClassifierTrainer, start: Tensors, examples: Any, *rest: Any, **named: Any) -> Tensors:
        clock.sleep(0.5 * len(examples))
        return train(self, start, examples, *rest, **named)

    def slowly_read(path: Path, settings: Any, taught: bytes) -> bytes:
        content = read(path, settings, taught)
        clock.sleep(0.25 * content.count(b"\n"))
        return content

    virtual = SimpleNamespace(monotonic=clock.now, perf_counter=clock.now, sleep=clock.sleep)
    monkeypatch.setattr("client.node.step.time", virtual)
    monkeypatch.setattr(ClassifierTrainer, "train", slow)
    monkeypatch.setattr("client.node.eligibility.read_clean", slowly_read)
    return clock


def busy_fleet(fleet_of: FleetOf) -> Any:
    """A fleet in which some devices have twice the examples of the others."""
    fleet = fleet_of(len(DEVICES), rounds=1)
    for name in DEVICES:
        write_examples(fleet.state_dir(name).examples, COMMON * (2 if name in HOLDERS else 1))
    return fleet


def times(fleet: Any, clock: VirtualClock) -> dict[Step, dict[str, float]]:
    """How long each device took to answer each step of a session of one round."""
    observers = {step: Observer(now=clock.now, step=step) for step in Step}

    def observed(message: Message, context: Context) -> Message:
        return observers[Step(message.metadata.message_type.partition(".")[2])](message, context)

    fleet.federate(fleet.grid(app=observed))
    return {step: {name: seen[2] for name, seen in each.seen.items()} for step, each in observers.items()}


def test_an_answer_leaves_at_a_time_that_does_not_show_how_many_examples_a_device_has(
    app_fleet_of: FleetOf, clock: VirtualClock
) -> None:
    fleet = busy_fleet(app_fleet_of)
    set_policy(fleet, answer_quantum_seconds=QUANTUM)
    expected = {step: QUANTUM if step in READS_EXAMPLES else 0.0 for step in Step}
    assert times(fleet, clock) == {step: dict.fromkeys(DEVICES, seconds) for step, seconds in expected.items()}


def test_training_of_more_than_a_quantum_shows_the_number_of_quanta_and_no_more(
    app_fleet_of: FleetOf, clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = busy_fleet(app_fleet_of)
    set_policy(fleet, answer_quantum_seconds=1.5)
    assert times(fleet, clock)[Step.PLAN] == {name: 3.0 if name in HOLDERS else 1.5 for name in DEVICES}
    assert caplog.text.count("a larger answer_quantum_seconds would hide") == len(HOLDERS)


def test_an_answer_that_leaves_at_once_shows_how_many_examples_a_device_has(
    app_fleet_of: FleetOf, clock: VirtualClock
) -> None:
    found = times(busy_fleet(app_fleet_of), clock)
    for step, many, few in ((Step.OFFER, 1.5, 0.75), (Step.PLAN, 2.0, 1.0)):
        assert found[step] == {name: many if name in HOLDERS else few for name in DEVICES}


@pytest.mark.parametrize("delayed", [True, False])
def test_a_device_that_fails_after_training_says_so_at_the_same_time(
    app_fleet_of: FleetOf, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch, delayed: bool
) -> None:
    if not delayed:
        monkeypatch.setattr("client.node.step._delayed", lambda *given: nullcontext())
    fleet, save = busy_fleet(app_fleet_of), DeviceStateDir.save_state
    set_policy(fleet, answer_quantum_seconds=QUANTUM)

    def full(state_dir: DeviceStateDir, state: Any) -> None:
        if isinstance(state, Masked):
            raise OSError(28, "No space left on device")
        save(state_dir, state)

    monkeypatch.setattr(DeviceStateDir, "save_state", full)
    observer = Observer(now=clock.now)
    fleet.federate(fleet.grid(app=observer))
    at = {name: QUANTUM if delayed else 2.0 if name in HOLDERS else 1.0 for name in DEVICES}
    assert observer.seen == {
        name: ("refused", "failed on the device; its log has the reason", at[name]) for name in DEVICES
    }


@pytest.mark.parametrize("held", [True, False])
def test_a_message_during_training_is_answered_when_the_plan_is(
    app_fleet_of: FleetOf, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    """Answered when the training ends, it would show that time as well. ``held``: the lock, while the plan waits."""
    fleet, train, answered, threads = (
        busy_fleet(app_fleet_of),
        ClassifierTrainer.train,
        list[float](),
        list[threading.Thread](),
    )
    asked = {DEVICES[0], *HOLDERS}
    set_policy(fleet, answer_quantum_seconds=QUANTUM)

    def ask(context: Context) -> None:
        message = Message(RecordDict(), context.node_id, Step.CHECK_IN.message_type, group_id="1")
        message.metadata.__dict__["_message_id"] = "1"
        app(message, context)  # refused: it is empty
        answered.append(clock.now())

    def sleep(seconds: float) -> None:
        time.sleep(0.2)  # whoever waits for the lock would get it now, if it were free
        clock.sleep(seconds)

    def observed(message: Message, context: Context) -> Message:
        if Path(str(context.node_config["state"])).name not in asked:
            return app(message, context)

        def interrupted(self: ClassifierTrainer, *given: Any, **named: Any) -> Tensors:
            threads.append(threading.Thread(target=ask, args=(context,)))
            threads[-1].start()
            time.sleep(0.1)  # it waits for the device's lock now
            return train(self, *given, **named)

        with monkeypatch.context() as patch:
            patch.setattr(ClassifierTrainer, "train", interrupted)
            patch.setattr("client.node.step.time.sleep", sleep)
            reply = app(message, context)
        for thread in threads:
            thread.join()
        return reply

    lock = DeviceStateDir.locked

    @contextmanager
    def waiting_without_it(state_dir: DeviceStateDir) -> Iterator[None]:
        with lock(state_dir):
            yield
        if threads and threading.current_thread() is threading.main_thread():
            sleep(QUANTUM - clock.now() % QUANTUM)

    if not held:
        monkeypatch.setattr("client.node.step._delayed", lambda *given: nullcontext())
        monkeypatch.setattr(DeviceStateDir, "locked", waiting_without_it)
    fleet.federate(fleet.grid(app=observed))
    assert len(answered) == len(asked)
    assert all(at % QUANTUM == 0 for at in answered) == held
