"""What a tab keeps to itself: parts that it does not share, and sums without noise; under Node, as a native device."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aggregation.errors import ProtocolError
from aggregation.messages import Plan
from aggregation.spec import Grouping
from client.node import sumhistory
from client.node.privateparts import PrivateParts, check_unshared, ever_private, private_on
from client.node.sumhistory import SumHistory, sketch
from client.training.private import private_of, subject_of, with_private
from edgeadapt.formats import files
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.methods.parts import PARTS, Part, part_of
from edgeadapt.rounds.task import Task
from tests.browser.conftest import CONFIG
from tests.browser.test_aggregation import node, offer_of, run
from tests.client.node.test_sumhistory import ALL, LEAST, MOMENTS, OTHERS, SPEC, TASK, adapter, moved

__all__ = ["node"]
NAMES = ("classifier.weight", "q.lora_A.weight", "q.lora_B.weight", "q.lora_magnitude_vector")
BASE = "b" * 64
PLAIN = Task(CONFIG, ("off", "on"), 1, 16, 0.01, 0.0, 0.0, PARTS, PARTS)
WALKS, ROUNDS = 40, 12


def tensors(rng: random.Random) -> Tensors:
    return {name: np.full(1, rng.randrange(1000), np.float32) for name in NAMES}


def plain(tensors: Tensors) -> dict[str, float]:
    return {name: float(value[0]) for name, value in tensors.items()}


def drawn(rng: random.Random, lone: Part) -> Task:
    """A task, of other labels at times. Most tasks of a walk keep one part to the devices."""
    labels = rng.choice((("off", "on"), ("off", "on"), ("on", "off")))
    shared = tuple(part for part in PARTS if part is not lone) if rng.random() < 0.7 else rng.sample(PARTS, 2)
    trained = rng.choice((PARTS, PARTS, tuple(rng.sample(PARTS, 2))))
    if not {*trained} & {*shared}:
        trained = PARTS
    if rng.random() < 0.2:
        trained = shared = (Part.R, *rng.choice(((), (Part.HEAD,))))
    return replace(PLAIN, labels=labels, trained=tuple(trained), shared=tuple(shared))


def walk(rng: random.Random) -> list[dict[str, Any]]:
    """What a native device does with the tasks of one round after the other."""
    kept: PrivateParts | None = None
    lone, rows = rng.choice(PARTS), []
    for number in range(ROUNDS):
        task, offered, trained = drawn(rng, lone), tensors(rng), tensors(rng)
        row: dict[str, Any] = {"task": json.loads(task.encode()), "offered": plain(offered), "refused": None}
        rows.append(row)
        try:
            check_unshared(kept, BASE, task)
        except ProtocolError as error:
            row["refused"] = error.value
            continue
        subject, plan = subject_of(BASE, task, Layout.of(offered)), number.to_bytes(32, "big")
        begun = with_private(offered, kept.start(subject, plan) if kept else None, task)
        if own := private_of(begun, task):
            after = files.encode(private_of(trained, task))
            kept = PrivateParts(subject, plan, files.encode(own), after, ever_private(kept, BASE, map(part_of, own)))
        row |= {"begun": plain(begun), "trained": plain(trained), "ever": sorted(private_on(kept, BASE))}
    return rows


def test_a_tab_keeps_and_refuses_what_a_native_device_keeps_and_refuses(tmp_path: Path, node: str) -> None:
    walks = [walk(random.Random(seed)) for seed in range(WALKS)]  # noqa: S311  # not secret
    rows = [row for rows in walks for row in rows]
    assert {row["refused"] for row in rows} == {None, *PARTS}
    loaded = [row for row in rows if row["refused"] is None and row["begun"] != row["offered"]]
    assert len(loaded) > WALKS
    path = tmp_path / "walks.json"
    path.write_text(json.dumps({"base": BASE, "layout": "c" * 64, "walks": walks}))
    run(node, "private.test.mjs", EDGEADAPT_PRIVATE=path)


# Sums without noise


FAR = [adapter(0), adapter(1)]
ADAPTERS = [
    *FAR,
    *(moved(each, LEAST / 5, part) for each in FAR for part in ("", "lora_A")),
    moved(FAR[0], 9.0, "head"),
]
TASKS = [TASK, TASK, TASK, MOMENTS, replace(TASK, epochs=2), replace(TASK, labels=("b", "a"))]
SPECS = [SPEC, SPEC, SPEC, SPEC, replace(SPEC, grouping=Grouping(2, 8)), replace(SPEC, base_digest="c" * 64)]
SURVIVORS = [ALL, ALL, OTHERS, {name: ALL[name] for name in list(ALL)[1:15]}]


def history(rng: random.Random) -> dict[str, Any]:
    """Plans and sums as a hostile coordinator may send them, and what a native device's refusals are about."""
    key, events, plan, spec = rng.randbytes(32), list[dict[str, Any]](), None, SPEC
    known = SumHistory(key)
    for version in range(14):
        event: dict[str, Any] = {
            "blob": None,
            "survivors": None,
            "revoked": rng.choice(([], [], [100])),
            "refused": None,
        }
        try:
            if plan is None or rng.random() < 0.55:
                tensors, task, spec = rng.choice(ADAPTERS), rng.choice(TASKS), rng.choice(SPECS)
                blob = files.encode(tensors)
                plan = Plan(bytes(32), 1, ("a", "b"), version, files.sha256(blob), task.encode())
                event |= {"body": plan.encode().hex(), "offer": offer_of(spec), "blob": blob.hex()}
                known = sumhistory.on_plan(known, plan, task, spec, tensors, 0.05)
            else:
                event |= {"body": plan.encode().hex(), "offer": offer_of(spec), "survivors": rng.choice(SURVIVORS)}
                known = sumhistory.on_survivors(known, plan, spec, event["survivors"], event["revoked"]) or known
        except ProtocolError as error:
            event["refused"] = error.about
        events.append(event)
    return {"key": key.hex(), "share": 0.05, "events": events}


def test_sums_without_noise_are_judged_as_by_a_native_device(tmp_path: Path, node: str) -> None:
    rng, made = random.Random(5), tmp_path / "sums.json"  # noqa: S311  # not a secret
    histories = [history(rng) for _ in range(80)]
    abouts = {event["refused"] for each in histories for event in each["events"]}
    expected = {"plan.movement", "plan.terms", "plan.groups", "survivors.movement", "survivors.adapter"}
    assert abouts == {None, *expected}
    sketches = [
        {"blob": files.encode(each).hex(), "key": (key := rng.randbytes(32)).hex(), "sketch": sketch(each, key).hex()}
        for each in ADAPTERS
    ]
    made.write_text(json.dumps({"sketches": sketches, "histories": histories}))
    run(node, "sumhistory.test.mjs", EDGEADAPT_SUMS=made)
