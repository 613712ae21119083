"""What a tab remembers of sums without noise (``page/aggregation/sumhistory.js``): under Node, as a native device."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aggregation.errors import ProtocolError
from aggregation.messages import Plan
from aggregation.spec import Grouping
from client.node import sumhistory
from client.node.sumhistory import SumHistory, sketch
from edgeadapt.formats import files
from tests.browser.test_aggregation import offer_of, run
from tests.client.node.test_sumhistory import ALL, LEAST, MOMENTS, OTHERS, SPEC, TASK, adapter, moved
from tests.support import programs


@pytest.fixture(scope="session")
def node() -> str:
    return programs.node()


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
