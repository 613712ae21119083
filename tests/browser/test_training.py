"""A tab trains for a plan what a native device trains: equal batches give equal updates, up to rounding."""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation import rotation
from aggregation.errors import ProtocolError
from aggregation.privacy.accounting import Mechanism
from aggregation.spec import Privacy, SessionSpec
from aggregation.vector import Segment, VectorSpec
from client.inference.trust import Trust
from client.training.evaluate import own_counts
from client.training.examples import Example, Split
from client.training.personal import own_moments
from client.training.trainer import ClassifierTrainer, LanguageTrainer, batches
from edgeadapt.formats import files, jsontext
from edgeadapt.formats.layout import Tensors
from edgeadapt.methods.lorasb import unfolded
from edgeadapt.methods.parts import Part, part_of
from edgeadapt.rounds import ridge
from edgeadapt.rounds.analytic import AnalyticTask, ClassifierHead, moment_spec
from edgeadapt.rounds.evaluation import EvaluationTask
from edgeadapt.rounds.sums import Bounds, clip
from edgeadapt.rounds.task import MAX_LOSS, OptimizerName, RateSchedule, Task, shared_layout
from tests.browser.conftest import CONFIG
from tests.browser.test_aggregation import offer_of, session_of
from tests.browser.test_learning import by_input, native, same
from tests.support.models import LABELS, PHRASES
from tests.support.nodetab import OPEN, NodeTab

pytestmark = pytest.mark.slow

EVERY = (Part.A, Part.B, Part.HEAD)
PLAIN = Task(CONFIG, LABELS, 2, 3, 0.01, 0.01, 0.0, EVERY, EVERY)
TASKS = (
    replace(PLAIN, proximal=0.5, gradient_norm=0.2, schedule=RateSchedule.COSINE),
    replace(PLAIN, optimizer=OptimizerName.SGD, momentum=0.9, schedule=RateSchedule.LINEAR, gradient_norm=0.1),
    replace(PLAIN, trained=(Part.B, Part.HEAD)),
    replace(PLAIN, trained=(Part.R, Part.HEAD), shared=(Part.R, Part.HEAD), proximal=0.5),
)
EXAMPLES = [Example(text, number % len(LABELS)) for number, text in enumerate(PHRASES)]
MOMENT = 1e-4  # of an entry of the moments: embeddings of the two runtimes differ by float32 rounding
WAY = 0.002  # as between the two native engines (tests/client/training/test_graphengine.py)

TRAINED = f"""(async ({{ task, examples: given, order }}) => {{ {OPEN}
  const [{{ trainOn }}, {{ unfolded }}] = await Promise.all([load("learning/round"), load("learning/fedsb")]);
  const trainer = await GraphTrainer.open(engine, adapter);
  const start = await trainer.valuesOf(adapter.inputs);
  const begun = task.shared.includes("R") ? unfolded(start, trainer.shapes) : start;
  const found = await trainOn(trainer, begun, examples(given), task, order);
  await trainer.close();
  return all(found);
}})"""
ROUND = f"""(async ({{ offer, blob, plan, examples: given, unchecked, limits = {{}}, kept = null, rounds = 1 }}) => {{
  {OPEN}
  if (unchecked) engine.trust.adapterManifest = async () => ({{ parent: null, labels: unchecked }});
  const load_ = (name) => load(`aggregation/${{name}}`);
  const {{ trainerOf }} = await load("learning/round");
  const [{{ Offer }}, {{ pack }}] = await Promise.all([load_("messages"), load_("contribution")]);
  const {{ spec }} = Offer.decode(Uint8Array.from(offer));
  const bytes = (base64) => Uint8Array.from(atob(base64), (sign) => sign.charCodeAt(0));
  const paused = [];
  const {{ LIMITS }} = await load("learning/task");
  const train = trainerOf(engine, given, async (progress) => paused.push(progress), {{ ...LIMITS, ...limits }});
  const asked = {{ round: 1, adapter_digest: plan.adapter, training: bytes(plan.task) }};
  if (kept) kept.values = new Map(Object.entries(kept.values).map(([name, each]) => [name, Float32Array.from(each)]));
  let vector;
  for (let round = 0; round < rounds; round++) {{
    const made = await train(asked, spec, bytes(blob), kept);
    [vector, kept] = [made.vector, made.parts ?? kept];
  }}
  const own = kept && all(kept.values);
  return {{ packed: [...pack(vector, spec.vector.ring_bits)], steps: paused.at(-1)?.steps, own }};
}})"""


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def moved(found: Tensors, start: Tensors) -> float:
    return max(float(np.abs(found[name] - start[name]).max()) for name in start)


def given(
    task: Task, trainer: ClassifierTrainer | LanguageTrainer, start: Tensors, examples: Sequence[Example]
) -> dict[str, Any]:
    """A plan with this task, as the tab receives it."""
    blob, layout = files.encode(start), shared_layout(trainer.layout, task)
    spec = replace(session_of(layout, 32), layout_digest=trainer.layout.digest)
    return {
        "offer": list(bytes.fromhex(offer_of(spec))),
        "blob": b64(blob),
        "plan": {"adapter": files.sha256(blob), "task": b64(task.encode())},
        "examples": [{"text": one.text, "label": one.label, "split": one.split.value} for one in examples],
    }


def test_a_tab_trains_what_a_native_device_trains(tab: NodeTab, phone: Path) -> None:
    """With the optimizers, schedules, limits and parts of a task, in several batches of a given order."""
    trainer, start = native(phone)
    tab.open(phone)
    lengths = [len(ids) for ids in trainer.tokens(list(PHRASES))]
    for task in TASKS:
        order = list(batches(lengths, task.batch_size, task.epochs, np.random.default_rng(1)))
        expected = trainer.train(start, EXAMPLES, task, epochs=task.epochs, rng=np.random.default_rng(1))
        begun = unfolded(start) if Part.R in task.trained else start
        asked = {
            "task": json.loads(task.encode()),
            "examples": [(one.text, one.label) for one in EXAMPLES],
            "order": order,
        }
        found = tab.evaluate(f"{TRAINED}({json.dumps(asked)})")
        way = moved(expected, begun)
        same(found, by_input(trainer, expected), WAY * way)
        assert way > 0


def test_a_tab_contributes_what_a_native_device_contributes_or_nothing(tab: NodeTab, phone: Path) -> None:
    """All examples are in one batch, so that their order makes no difference; a layer shares only B, or R of Fed-SB."""
    tab.open(phone)
    for part in (Part.R, Part.B):
        shared = (part, Part.HEAD)
        contributes_as_natively(tab, phone, replace(PLAIN, batch_size=16, trained=shared, shared=shared))


def contributes_as_natively(
    tab: NodeTab, phone: Path, task: Task, examples: Sequence[Example] = EXAMPLES, texts: Sequence[str] = PHRASES
) -> None:
    trainer, start = native(phone)
    layout = shared_layout(trainer.layout, task)
    held = [Example(text, 1) for text in texts[:3]]
    expected = trainer.train(start, examples, task, epochs=task.epochs, rng=np.random.default_rng(1))
    asked = given(task, trainer, start, examples)
    asked["examples"] += [{"text": one.text, "label": task.labels[one.label], "split": "validation"} for one in held]
    spec = replace(session_of(layout, 32), layout_digest=trainer.layout.digest)

    def decoded(found: dict[str, Any]) -> dict[str, Any]:
        return spec.vector.decode(np.frombuffer(bytes(found["packed"]), np.uint32), 1)

    def delta_of(trained: Tensors, weight: int) -> Any:
        vectors = [layout.flatten(layout.select(one)).astype(np.float64) for one in (trained, unfolded(start))]
        delta = clip(vectors[0] - vectors[1], spec.clip_norm) * weight
        return rotation.rotate(delta, rotation.seed(bytes.fromhex(asked["plan"]["adapter"])))

    sums, score = decoded(tab.evaluate(f"{ROUND}({json.dumps(asked)})")), trainer.score(start, held)
    step = spec.vector.step(spec.vector.segment("delta"))
    weight = min(7, len(examples))
    length = float(np.linalg.norm(delta_of(expected, weight)))
    assert (
        float(np.linalg.norm(sums["delta"] - delta_of(expected, weight))) < WAY * length + 1.5 * step * layout.size**0.5
    )
    assert (sums["weight"][0], sums["correct"][0], sums["held_out"][0]) == (weight, score.correct, 3)
    assert sums["loss"][0] == pytest.approx(score.loss, abs=1e-3)
    # What fails once the examples matter looks like a device without any.
    odd = {"text": "", "label": 0, "split": "train"}, {"text": "lock", "label": 9, "split": "train"}
    for wrong in ([], *([one] for one in odd)):
        sums = decoded(tab.evaluate(f"{ROUND}({json.dumps(asked | {'examples': wrong})})"))
        assert np.abs(sums["delta"]).max() <= 1.5 * step
        assert not any(sums[name][0] for name in ("weight", "correct", "loss", "held_out"))


def test_a_tab_goes_on_from_the_parts_that_it_keeps_to_itself_as_a_native_device(tab: NodeTab, phone: Path) -> None:
    """The head stays on the device, as with FedPer: the second round is trained with the head of the first one."""
    shared, head = (Part.A, Part.B), {"classifier.bias", "classifier.weight"}
    task = replace(PLAIN, batch_size=16, shared=shared)
    trainer, start = native(phone)
    layout = shared_layout(trainer.layout, task)

    def trained(begun: Tensors) -> Tensors:
        return trainer.train(begun, EXAMPLES, task, epochs=task.epochs, rng=np.random.default_rng(1))

    first = trained(start)
    private = {name: value for name, value in first.items() if part_of(name) is Part.HEAD}
    second = trained(start | private)
    asked = given(task, trainer, start, EXAMPLES)
    spec = replace(session_of(layout, 32), layout_digest=trainer.layout.digest)
    tab.open(phone)

    def found(**changes: Any) -> tuple[Any, Tensors]:
        """The update and the head that the tab keeps."""
        answer = tab.evaluate(f"{ROUND}({json.dumps(asked | changes)})")
        sums = spec.vector.decode(np.frombuffer(bytes(answer["packed"]), np.uint32), 1)
        assert set(answer["own"]) == head
        return sums["delta"], answer["own"]

    foreign = {"subject": "another base", "values": {name: [9.0] for name in head}, "ever": []}
    step = spec.vector.step(spec.vector.segment("delta"))
    for expected, changes in ((first, {}), (first, {"kept": foreign}), (second, {"rounds": 2})):
        delta, own = found(**changes)
        same(own, {name: by_input(trainer, expected)[name] for name in head}, WAY * moved(expected, start))
        vectors = [layout.flatten(layout.select(one)).astype(np.float64) for one in (expected, start)]
        moves = clip(vectors[0] - vectors[1], spec.clip_norm) * 7
        moves = rotation.rotate(moves, rotation.seed(bytes.fromhex(asked["plan"]["adapter"])))
        assert float(np.linalg.norm(delta - moves)) < WAY * np.linalg.norm(moves) + 1.5 * step * layout.size**0.5
    _, own = found(examples=[])  # nothing was trained, and the head of the adapter on offer is the first one to keep
    same(own, {name: by_input(trainer, start)[name] for name in head}, 1e-6)


def test_a_tab_contributes_the_moments_of_a_native_device_to_an_analytic_head_or_nothing(
    tab: NodeTab, phone: Path
) -> None:
    tab.open(phone)
    contributes_moments_as_natively(tab, phone)


def contributes_moments_as_natively(tab: NodeTab, phone: Path) -> None:
    trainer, start = native(phone)
    head, task = ClassifierHead.of(trainer.layout), AnalyticTask(trainer.engine.config, LABELS, "gcv", 16.0)
    vector = moment_spec(head, Bounds(clip_norm=1.0, weight_cap=7, ring_bits=32, max_clients=8))
    spec = replace(session_of(trainer.layout, 32), vector=vector)
    blob = files.encode(start)
    asked = {
        "offer": list(bytes.fromhex(offer_of(spec))),
        "blob": b64(blob),
        "plan": {"adapter": files.sha256(blob), "task": b64(task.encode())},
        "examples": [{"text": one.text, "label": one.label, "split": "train"} for one in EXAMPLES]
        + [{"text": text, "label": LABELS[1], "split": "validation"} for text in PHRASES[:3]],
    }

    def sums(**changes: Any) -> Any:
        packed = tab.evaluate(f"{ROUND}({json.dumps(asked | changes)})")["packed"]
        return spec.vector.decode(np.frombuffer(bytes(packed), np.uint32), 1)

    share = 7 / len(EXAMPLES) if len(EXAMPLES) > 7 else 1.0
    found, own = sums(), own_moments(trainer, start, EXAMPLES)
    score = trainer.score(start, [Example(text, 1) for text in PHRASES[:3]])
    for name, expected in (("xx", ridge.pack(own.xx)), ("xy", own.xy.ravel())):
        assert np.abs(found[name] - expected * share).max() < MOMENT, name
    assert (found["weight"][0], found["correct"][0], found["held_out"][0]) == (7, score.correct, 3)
    for examples in (
        [],
        [{"text": "", "label": 0, "split": "train"}],
        [{"text": "lock", "label": 9, "split": "train"}],
    ):
        assert not any(value.any() for value in sums(examples=examples).values())
    for plan, about in (
        ({"ridge": 0}, "task.ridge"),
        ({"ridge": "most"}, "task.ridge"),
        ({"scale": 1001}, "task.scale"),
        ({"labels": []}, "task.labels"),
        ({"labels": [*LABELS, "Other"]}, "task.labels"),
        ({"more": 1}, "task.more"),
    ):
        changed = asked["plan"] | {"task": b64(jsontext.encode(json.loads(task.encode()) | plan))}
        failed = tab.error(f"{ROUND}({json.dumps(asked | {'plan': changed, 'examples': None})})")
        assert (failed["name"], failed["about"]) == ("ProtocolError", about)
    for changes, about in (
        ({"limits": {"moments": False}}, "task.moments"),
        ({"offer": update_offer(trainer)}, "offer.spec.vector"),
    ):
        assert tab.error(f"{ROUND}({json.dumps(asked | changes | {'examples': None})})")["about"] == about


def test_a_tab_whose_score_is_not_finite_counts_its_examples_as_wrong(tab: NodeTab, phone: Path) -> None:
    """What overflows on the held-out text alone: a device that failed would tell the coordinator something of it."""
    trainer, start = native(phone)
    weight, bias = (next(name for name in start if name.endswith(f"classifier.{part}")) for part in ("weight", "bias"))
    rows = dict(zip(PHRASES, trainer.embed(list(PHRASES), start), strict=True))
    held, own, at = max(
        ((held, own, at) for held in rows for own in rows for at in range(len(rows[own]))),
        key=lambda each: rows[each[0]][each[2]] if rows[each[1]][each[2]] < 0 else 0.0,
    )
    assert rows[held][at] > 0.1
    steep = {key: np.zeros_like(value) if "classifier" in key else value for key, value in start.items()}
    steep[weight][0, at] = steep[bias][0] = 3.3e38
    examples = [Example(own, 1), Example(held, 1, Split.VALIDATION)]
    updates = given(replace(PLAIN, batch_size=16), trainer, steep, examples)
    vectors = {"updates": session_of(trainer.layout, 32).vector}
    vectors["moments"] = moment_spec(
        ClassifierHead.of(trainer.layout), Bounds(clip_norm=1.0, weight_cap=7, ring_bits=32, max_clients=8)
    )
    spec = replace(session_of(trainer.layout, 32), vector=vectors["moments"])
    task = b64(AnalyticTask(CONFIG, LABELS, 0.01, 16.0).encode())
    changes = {"offer": list(bytes.fromhex(offer_of(spec))), "plan": updates["plan"] | {"task": task}}
    tab.open(phone)
    for kind, asked in (("updates", updates), ("moments", updates | changes)):
        for split, held_out in ((Split.TRAIN, 0), (Split.VALIDATION, 1)):  # without the held-out text all is finite
            texts = [one for one in asked["examples"] if split is Split.VALIDATION or one["split"] == split.value]
            limits = {"maximum_magnitude": 3.4e38}  # an owner's
            answer = tab.evaluate(f"{ROUND}({json.dumps(asked | {'examples': texts, 'limits': limits})})")
            found = vectors[kind].decode(np.frombuffer(bytes(answer["packed"]), np.uint32), 1)
            assert [found[each][0] for each in ("weight", "correct", "held_out")] == [1, 0, held_out], kind
            assert found["loss"][0] == pytest.approx(MAX_LOSS * held_out, abs=1e-3), kind


def test_a_tab_counts_the_right_answers_that_a_native_device_counts_or_none(tab: NodeTab, phone: Path) -> None:
    """With so little noise that counts can be read, which the policy of a device refuses."""
    trainer, start = native(phone)
    content = adapter_content(phone)
    held = [Example(text, number % len(LABELS), Split.VALIDATION) for number, text in enumerate([*PHRASES, "zzz"])]
    blob = files.encode(start)
    newest = EvaluationTask(CONFIG, LABELS, content, "0" * 64, 64)
    norm, bare = 128.0, session_of(trainer.layout, 32)  # a norm above that of all examples
    vector = newest.vector(trainer.layout, Bounds(norm, 1, 32, 8, 2**-10))
    privacy = Privacy(Mechanism.SKELLAM, bare.minimum_survivors, 1e-6)
    noisy = replace(bare, vector=vector, clip_norm=norm, weight_cap=1, privacy=privacy)

    def both(
        task: EvaluationTask, given: list[Example], spec: SessionSpec = noisy
    ) -> tuple[list[float], dict[str, Any]]:
        """What the bundle's own answers give, and the question to a tab."""
        asked = {
            "offer": list(bytes.fromhex(offer_of(spec))),
            "blob": b64(blob),
            "plan": {"adapter": files.sha256(blob), "task": b64(task.encode())},
        }
        return own_counts(trainer.base, task, given[: task.most], trainer, start).tolist(), asked_of(asked, given)

    def counted(asked: dict[str, Any]) -> Any:
        packed = tab.evaluate(f"{ROUND}({json.dumps(asked)})")["packed"]
        sums = vector.decode(np.frombuffer(bytes(packed), np.uint32), 1)["counts"]
        return np.rint(rotation.rotate_back(sums, rotation.seed(bytes.fromhex(files.sha256(blob))))).tolist()

    tab.open(phone)
    expected, asked = both(newest, held)
    assert expected[1] == len(held)
    assert 0 < expected[0] < expected[1]
    assert counted(asked) == expected
    expected, asked = both(newest, 12 * held)
    assert expected[1] == newest.most  # the first ones
    assert counted(asked) == expected
    before = replace(newest, newest="0" * 64, previous=content)
    expected, asked = both(before, held)
    assert expected[:2] == [0, 0] != expected[2:]
    assert counted(asked) == expected
    assert counted(both(replace(newest, newest="1" * 64), held)[1]) == [0] * 4  # neither release
    _, sound = both(newest, held)
    for odd in ([replace(one, split=Split.TRAIN) for one in held], [replace(one, text="") for one in held]):
        assert counted(asked_of(sound, odd)) == [0] * 4
    _, exact = both(newest, held, replace(bare, vector=VectorSpec((Segment("counts", 4, 64.0),), 16, 8)))
    failed = tab.error(f"{ROUND}({json.dumps(exact | {'examples': None})})")
    assert (failed["name"], failed["about"]) == ("ProtocolError", "offer.spec.vector")
    for change, about in (
        ({"labels": []}, "task.labels"),
        ({"labels": [*LABELS, "Other"]}, "task.labels"),
        ({"least": 4}, "task.least"),
        ({"previous": content}, "task.newest"),
        ({"newest": "x"}, "task.newest"),
        ({"most": 2**16 + 1}, "task.most"),
        ({"more": 1}, "task.more"),
        ({"histograms": ["doubt"]}, "task.observations"),  # which a tab does not count
        ({"cells": ""}, "task.observations"),
    ):
        table = {
            key: value
            for key, value in json.loads(newest.encode()).items()
            if not {"histograms", "cells"} & set(change) or key != "newest"
        }
        task = b64(jsontext.encode(table | change))
        changed = sound | {
            "plan": sound["plan"] | {"task": task},
            "examples": None,
        }  # reading them would be another error
        failed = tab.error(f"{ROUND}({json.dumps(changed)})")
        assert (failed["name"], failed["about"]) == ("ProtocolError", about)


NAMED = [{"text": text, "label": LABELS[number % 3], "split": "train"} for number, text in enumerate(PHRASES)]
"""Examples as a person teaches them: with the names of labels."""


@pytest.mark.parametrize("real", LABELS[:3])
def test_without_the_check_a_task_whose_labels_are_one_real_one_and_others_counts_the_examples_of_that_one(
    tab: NodeTab, phone: Path, real: str
) -> None:
    trainer, start = native(phone)
    labels = (real, "x1", "x2", "x3")
    task = replace(PLAIN, labels=labels, batch_size=16)
    asked = given(task, trainer, start, []) | {"examples": NAMED, "unchecked": labels}
    tab.open(phone)
    packed = tab.evaluate(f"{ROUND}({json.dumps(asked)})")["packed"]
    spec = session_of(shared_layout(trainer.layout, task), 32)
    weight = spec.vector.decode(np.frombuffer(bytes(packed), np.uint32), 1)["weight"][0]
    assert weight == sum(one["label"] == real for one in NAMED)


@pytest.mark.parametrize(
    ("labels", "number"),
    [
        ((LABELS[1], "x1", "x2", "x3"), 0),
        ((LABELS[0], "x1", "x2", "x3"), 1),
        ((LABELS[1], LABELS[0], *LABELS[2:]), 0),
        (LABELS[:2], 2),
        ((*LABELS, "more"), 4),
    ],
)
def test_a_tab_trains_no_task_with_other_labels_than_those_of_its_bundle(
    tab: NodeTab, phone: Path, labels: tuple[str, ...], number: int
) -> None:
    trainer, start = native(phone)
    task = replace(PLAIN, labels=labels)
    asked = given(task, trainer, start, []) | {"examples": None}  # reading them would be another error
    tab.open(phone)
    failed = tab.error(f"{ROUND}({json.dumps(asked)})")
    assert (failed["name"], failed["about"]) == ("ProtocolError", "task.labels")
    found, own = (repr(all[number]) if number < len(all) else "missing" for all in (labels, LABELS))
    expected = f"label {number} of the task is {found}, and that of this device's signed bundle is {own}"
    assert expected in failed["message"]


def adapter_content(bundle: Path) -> str:
    """What the adapter of a bundle is."""
    return Trust.open(bundle).bundle.adapter_manifest("global").content


def asked_of(asked: dict[str, Any], examples: list[Example]) -> dict[str, Any]:
    """The same question to a tab with other examples."""
    return asked | {"examples": [{"text": e.text, "label": e.label, "split": e.split.value} for e in examples]}


def update_offer(trainer: ClassifierTrainer) -> list[int]:
    """An offer of a round of training."""
    return list(bytes.fromhex(offer_of(session_of(trainer.layout, 32))))


def odd_tasks() -> list[tuple[dict[str, Any], str, bool]]:
    """Changes of a task, what the refusal is about, and whether a native device refuses them as well."""
    return [
        *(({name: 0}, f"task.{name}", True) for name in ("epochs", "batch_size", "learning_rate")),
        ({"learning_rate": 1.5}, "task.learning_rate", True),
        ({"momentum": 1}, "task.momentum", True),
        ({"proximal": 1000, "learning_rate": 0.1}, "task.proximal", True),
        ({"gradient_norm": -1}, "task.gradient_norm", True),
        *(({"variants": count}, "task.variants", True) for count in (17, -1, 0.5, None)),
        ({"optimizer": "lion"}, "task.optimizer", True),
        ({"schedule": None}, "task.schedule", True),
        ({"labels": "Light"}, "task.labels", True),
        ({"more": 1}, "task.more", True),
        ({"shared": ["C"]}, "task.shared", True),
        ({"trained": ["A"], "shared": ["B"]}, "task.shared", True),
        ({"trained": ["R", "B"], "shared": ["R", "B"]}, "task.parts", True),
        ({"trained": ["R", "head"], "shared": ["head"]}, "task.parts", True),
        ({"trained": ["R", "head"], "shared": ["R", "A"]}, "task.parts", True),
        ({"labels": []}, "task.labels", False),
        ({"ridge": 1}, "task.scale", True),
    ]


def test_what_a_tab_cannot_or_must_not_train_is_refused_before_an_example_is_read(tab: NodeTab, phone: Path) -> None:
    trainer, start = native(phone)
    tab.open(phone)
    sound = given(PLAIN, trainer, start, EXAMPLES)
    plain = json.loads(PLAIN.encode())

    def refused(about: str, **plan: Any) -> None:
        asked = sound | {"plan": sound["plan"] | plan, "examples": None}  # reading them would be another error
        failed = tab.error(f"{ROUND}({json.dumps(asked)})")
        assert (failed["name"], failed["about"], "\n" in failed["message"]) == ("ProtocolError", about, False), failed

    for change, about, natively in odd_tasks():
        raw = jsontext.encode(plain | change)
        if natively:
            with pytest.raises(ProtocolError):
                Task.decode(raw)
        refused(about, task=b64(raw))
    for raw in (b"", b"[]", b"\xff", b'{"epochs":1,"epochs":2}'):
        refused("task", task=b64(raw))
    config = asdict(CONFIG)
    for change, about in (
        ({"epochs": 11}, "task.epochs"),
        ({"epochs": 2, "variants": 5}, "task.epochs"),
        ({"learning_rate": 0.5}, "task.learning_rate"),
        ({"batch_size": 1}, "task.batch_size"),
        ({"weight_decay": 0.2}, "task.weight_decay"),
        ({"optimizer": "sgd", "momentum": 0.999}, "task.momentum"),
        ({"proximal": 11}, "task.proximal"),
        ({"labels": ["one"]}, "task.labels"),
        ({"peft_config": config | {"lora_alpha": 4096}}, "task.scaling"),
        ({"peft_config": config | {"rank_pattern": [["(a+)+", 1]]}}, "rank_pattern"),
        ({"labels": [*LABELS, "Other"]}, "task.labels"),
    ):
        refused(about, task=b64(jsontext.encode(plain | change)))
    refused("plan.adapter_digest", adapter="0" * 64)
    kept = {"subject": "of another task", "values": {}, "ever": ["head"]}
    assert tab.error(f"{ROUND}({json.dumps(sound | {'kept': kept, 'examples': None})})")["about"] == "task.shared"
    for blob in (b"", files.encode(start)[:-4]):
        asked = sound | {"blob": b64(blob), "plan": sound["plan"] | {"adapter": files.sha256(blob)}, "examples": None}
        assert tab.error(f"{ROUND}({json.dumps(asked)})")["about"] == "adapter"
    huge = {name: value * np.float32(1e6) for name, value in start.items()}
    assert tab.error(f"{ROUND}({json.dumps(given(PLAIN, trainer, huge, []))})")["about"] == "adapter.magnitude"
    other = session_of(trainer.layout, 32)
    asked = sound | {"offer": list(bytes.fromhex(offer_of(replace(other, layout_digest="0" * 64)))), "examples": None}
    assert tab.error(f"{ROUND}({json.dumps(asked)})")["about"] == "plan.layout"
    narrow = replace(shared_layout(trainer.layout, PLAIN), tensors=trainer.layout.tensors[:-1])
    spec = replace(session_of(narrow, 32), layout_digest=trainer.layout.digest)
    asked = sound | {"offer": list(bytes.fromhex(offer_of(spec))), "examples": None}
    assert tab.error(f"{ROUND}({json.dumps(asked)})")["about"] == "offer.spec.vector"
