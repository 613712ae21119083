"""The parts that a tab trains and does not share, under Node, against a native device's."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aggregation.errors import ProtocolError
from client.node.privateparts import PrivateParts, check_unshared, ever_private, private_on
from client.training.private import private_of, subject_of, with_private
from edgeadapt.formats import files
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.methods.parts import PARTS, Part, part_of
from edgeadapt.rounds.task import Task
from tests.browser.conftest import CONFIG
from tests.browser.test_aggregation import node, run

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
