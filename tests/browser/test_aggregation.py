"""The device's side of a session in JavaScript (``page/aggregation/``), under Node, against the native one."""

import json
import os
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.layout import Layout, TensorSpec
from adapters.task import contribution_spec
from aggregation import ring
from aggregation.messages import Offer
from aggregation.spec import SessionSpec
from aggregation.vector import Segment, VectorSpec
from client.training.contribute import Outcome, contribution
from client.training.examples import Score
from tests.support import programs
from tests.support.fleet import ADAPTER, session_spec
from tests.vectors.test_rounds import CASES, Walk

raw = bytes.fromhex
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
