"""The device's side of a session in JavaScript (``page/aggregation/``), under Node, against the native one."""

import json
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.layout import Layout, TensorSpec
from adapters.task import contribution_spec
from aggregation import client, envelope, ring
from aggregation.envelope import ENVELOPE, Envelope
from aggregation.errors import ProtocolError
from aggregation.messages import Offer
from aggregation.pki.identity import IdentityKey
from aggregation.sealed import reopened
from aggregation.spec import SessionSpec
from aggregation.vector import Segment, VectorSpec
from client.training.contribute import Outcome, contribution
from client.training.examples import Score
from tests.support import programs
from tests.support.fleet import ADAPTER, session_spec
from tests.vectors.test_rounds import CASES, GivenEntropy, Walk, devices_of

raw = bytes.fromhex
STEPS = {"offer": "roster", "roster": "assignment", "assignment": "survivors", "survivors": "unmask", "unmask": ""}
"""Tag of what the coordinator sends → the next one."""
JS = Path(__file__).parent / "js" / "aggregation"


@pytest.fixture(scope="session")
def node() -> str:
    """Node alone: these modules need no library."""
    return programs.node()


def run(node: str, test: str, **environment: Path) -> None:
    """Run a file of tests under Node."""
    variables = os.environ | {name: str(path) for name, path in environment.items()}
    done = subprocess.run([node, "--test", str(JS / test)], capture_output=True, text=True, env=variables, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def refusals(case: dict[str, Any]) -> list[str]:
    """What a native device's refusal of each invalid message in a vector is about."""
    walk = Walk(case)
    walk.establish()
    walk.open(walk.collect())
    return [walk.about[bad["message"]] for bad in case["refused"]]


def test_a_round_is_byte_for_byte_that_of_the_independent_script(tmp_path: Path, node: str) -> None:
    about = tmp_path / "about.json"
    about.write_text(json.dumps({label: refusals(case) for label, case in CASES.items()}))
    run(node, "rounds.test.mjs", EDGEADAPT_ABOUT=about)


# Hostile messages: signed by the coordinator, or not, and damaged everywhere

NUMBERS = (0, 1, 2, 5, 6, 65, 255, 2**31, 2**32 - 1)


def damaged(rng: random.Random, body: bytes, changes: int) -> Iterator[bytes]:
    """``body`` with other numbers, flipped bits, bytes that are missing, repeated or left over."""
    for _ in range(changes):
        at, size = rng.randrange(len(body)), rng.choice((1, 4, 8))
        number = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "big")
        yield body[:at] + number + body[at + size :]
        yield body[:at] + bytes([body[at] ^ 1 << rng.randrange(8)]) + body[at + 1 :]
        yield rng.choice((body[:at], body[:at] + body[at + size :], body[: at + size] + body[at:]))
    yield from (b"", body + b"\x00", body * 2)
    for at in range(32, min(len(body), 160), 4):  # the numbers of an offer or a plan are among these
        yield from (body[:at] + number.to_bytes(4, "big") + body[at + 4 :] for number in NUMBERS[:5])


class Native:
    """A native device of a vector before each step. Every step begins from a state that has not answered."""

    def __init__(self, case: dict[str, Any], name: str) -> None:
        self.case, self.name, self.device = case, name, devices_of(case)[name]
        self.key = IdentityKey(raw(case["identities"]["coordinator"]))
        self.states: dict[str, Any] = {}
        for step in STEPS:
            self.after = self.answer(step, raw(self.good(step)))[0]
            self.states[STEPS[step]] = self.after

    def good(self, step: str) -> str:
        """The sound message of a step."""
        found = self.case["assignments"][self.name] if step == "assignment" else self.case[step]
        return str(found)

    def answer(self, step: str, message: bytes) -> tuple[Any, bytes]:
        """The state after a step, and the answer."""
        case, name, device = self.case, self.name, self.device
        if step == "offer":
            return client.join(device, message, GivenEntropy(40 * case["join"][name]))  # some offer more rounds
        state = reopened(self.states[step])
        if step == "roster":
            return state.on_roster(device, message, GivenEntropy(case["deal"][name]))  # type: ignore[no-any-return,union-attr]
        if step == "assignment":
            vector = np.array(case["plain"][name], ring.dtype(case["spec"]["ring_bits"]))
            return state.on_plan(device, message).contribute(device, vector)  # type: ignore[no-any-return,union-attr]
        return getattr(state, f"on_{step}")(device, message)  # type: ignore[no-any-return]

    def verdict(self, step: str, message: bytes) -> dict[str, Any]:
        """The answer to a message, or what its refusal is about."""
        found: dict[str, Any] = {"step": step, "message": message.hex(), "about": None, "answer": None}
        try:
            return found | {"answer": self.answer(step, message)[1].hex()}
        except ProtocolError as error:
            return found | {"about": error.about}

    def hostile(self, rng: random.Random, changes: int) -> Iterator[dict[str, Any]]:
        """Messages of every step, and what this device makes of them."""
        for step in STEPS:
            message = raw(self.good(step))
            body = envelope.unverified_body(message)
            for other in damaged(rng, body, changes):
                signed = self.key.sign(step, other)
                yield self.verdict(step, ENVELOPE.encode(Envelope(b"EA", 1, step, other, signed)))
            for other in damaged(rng, message, changes // 8):
                yield self.verdict(step, other)


@pytest.mark.slow
def test_damaged_messages_are_answered_or_refused_as_by_a_native_device(tmp_path: Path, node: str) -> None:
    rng, made = random.Random(3), tmp_path / "hostile.json"  # noqa: S311  # not a secret
    found = {label: list(Native(CASES[label], "unit-0").hostile(rng, 40)) for label in ("narrow", "sparse")}
    each = [one for case in found.values() for one in case]
    assert all(len({one["about"] for one in each if one["step"] == step}) > 5 for step in STEPS)
    assert any(one["answer"] for one in each)
    made.write_text(json.dumps(found))
    run(node, "hostile.test.mjs", EDGEADAPT_HOSTILE=made)


# Contributions


class Drawn:
    """Fixed bytes in place of NumPy's generator: 53 bits of each word of 64 as ``random``, then ``bytes``."""

    def __init__(self, drawn: bytes) -> None:
        self.left = drawn

    def bytes(self, n: int) -> bytes:
        out, self.left = self.left[:n], self.left[n:]
        assert len(out) == n
        return out

    def random(self, size: int) -> NDArray[np.float64]:
        words = np.frombuffer(self.bytes(8 * size), "<u8")
        return np.ldexp((words >> 11).astype(np.float64), -53)


def encoded(rng: np.random.Generator, bits: int, clients: int) -> dict[str, Any]:
    """A vector of two segments, its numbers, and what a native device rounds them to."""
    segments = (Segment("delta", 300, float(rng.uniform(0.01, 50))), Segment("weight", 1, 100.0))
    spec = VectorSpec(segments, bits, clients)
    values = {each.name: rng.uniform(-each.bound, each.bound, each.size) for each in segments}
    step = spec.step(segments[0])
    values["delta"][:4] = segments[0].bound, -segments[0].bound, 3 * step, -step * (1 - 2.0**-40)
    key = rng.bytes(32)
    packed = ring.pack(spec.encode(values, Drawn(key)), bits)  # type: ignore[arg-type]
    found = {name: value.tobytes().hex() for name, value in values.items()}
    return {"vector": asdict(spec), "values": found, "key": key.hex(), "packed": packed.hex()}


def session_of(layout: Layout, bits: int, clip_norm: float = 2.0) -> SessionSpec:
    vector = contribution_spec(layout, clip_norm=clip_norm, weight_cap=7, ring_bits=bits, max_clients=8)
    return session_spec(8, vector=vector, clip_norm=clip_norm, weight_cap=7, layout_digest=layout.digest)


def offer_of(spec: SessionSpec) -> str:
    """The body of an offer of this session to nobody."""
    return Offer(bytes(32), spec, ()).encode().hex()


def contributed(rng: np.random.Generator, size: int, bits: int) -> dict[str, Any]:
    """An update within the clip norm, and the vector that a native device contributes with it."""
    layout = Layout((TensorSpec("a", (size,)),))
    spec = session_of(layout, bits)
    delta = rng.normal(size=size).astype(np.float32)
    delta *= np.float32(1.9 / np.linalg.norm(delta))
    outcome = Outcome({"a": np.zeros(size, np.float32)}, {"a": delta}, 5, Score(3, 4, 2.5))
    drawn = rng.bytes(8 * size + 32)
    vector = contribution(outcome, layout, spec, raw(ADAPTER), Drawn(drawn))  # type: ignore[arg-type]
    return {
        "offer": offer_of(spec),
        "delta": delta.astype(np.float64).tobytes().hex(),
        "examples": outcome.examples,
        "score": asdict(outcome.held_out),
        "adapter": ADAPTER,
        "drawn": drawn.hex(),
        "packed": ring.pack(vector, bits).hex(),
    }


def bounds(size: int) -> list[dict[str, Any]]:
    """Offers with the vector of their clip norm and weight cap, and with others."""
    fair = session_of(Layout((TensorSpec("a", (size,)),)), 16)
    delta, *others = fair.vector.segments
    changed = [
        replace(fair, clip_norm=fair.clip_norm / 2),
        replace(fair, weight_cap=fair.weight_cap - 1),
        *(
            replace(fair, vector=replace(fair.vector, segments=segments))
            for segments in (
                (replace(delta, bound=delta.bound * (1 - 2.0**-52)), *others),
                (replace(delta, size=size + 1), *others),
                (delta, *others[:-1]),
                (delta, *others[::-1]),
                (delta, *others, replace(others[0], name="more")),
            )
        ),
    ]
    found = [{"offer": offer_of(spec), "size": size, "fair": False} for spec in changed]
    return [{"offer": offer_of(fair), "size": size, "fair": True}, *found]


def test_a_contribution_is_bit_for_bit_that_of_a_native_device(tmp_path: Path, node: str) -> None:
    rng, made = np.random.default_rng(5), tmp_path / "made.json"
    content = {
        "encoded": [encoded(rng, bits, clients) for bits in (12, 16, 19, 24, 32) for clients in (3, 12)],
        "contributions": [contributed(rng, size, bits) for size in (1, 7, 64, 1000) for bits in (16, 22)],
        "bounds": bounds(1000),
    }
    made.write_text(json.dumps(content))
    run(node, "contribution.test.mjs", EDGEADAPT_CONTRIBUTIONS=made)
