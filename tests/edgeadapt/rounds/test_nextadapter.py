"""From a sum to the next adapter: in a round of Fed-SB, each server optimizer steps R and never A."""

import numpy as np
import pytest

from aggregation import rotation
from aggregation.groups import GroupSum
from aggregation.spec import SessionSpec
from aggregation.vector import Segment, VectorSpec
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.manifest import PeftConfig
from edgeadapt.methods.lorasb import frozen_factor
from edgeadapt.methods.parts import Part
from edgeadapt.rounds import optimizer
from edgeadapt.rounds.optimizer import FedAdam, FedAvg, FedAvgM
from edgeadapt.rounds.roundtask import ServerStep, SummedRound
from edgeadapt.rounds.sums import Sums
from edgeadapt.rounds.task import Task, shared_layout
from tests.support.fleet import ADAPTER, session_spec

A, B, HEAD = "layer.query.lora_A.weight", "layer.query.lora_B.weight", "classifier.weight"
R = "layer.query.lora_R.weight"
TASK = Task(
    PeftConfig("LORA", 2, 4, ("query",)), ("off", "on"), 1, 4, 1e-6, 0.0, 0.0, (Part.R, Part.HEAD), (Part.R, Part.HEAD)
)
WEIGHT, NAMES = 40.0, ("a", "b", "c", "d")
DEVICES, DIGEST = len(NAMES), bytes.fromhex(ADAPTER)


def adapter() -> Tensors:
    rng = np.random.default_rng(1)
    return {
        name: rng.normal(size=shape).astype(np.float32) for name, shape in {A: (2, 5), B: (6, 2), HEAD: (2, 5)}.items()
    }


def rotated(delta: rotation.Vector) -> rotation.Vector:
    return rotation.rotate(delta, rotation.seed(DIGEST))


def summed(spec: SessionSpec, tensors: Tensors, sums: Sums) -> SummedRound:
    return SummedRound(spec, tensors, DIGEST, [GroupSum(NAMES, sums)])


@pytest.mark.parametrize("rule", [FedAvg(0.5), FedAvgM(1.0, 0.9), FedAdam(0.1)])
def test_the_mean_of_squares_moves_b_by_its_product_with_the_frozen_factor(rule: optimizer.ServerOptimizer) -> None:
    before = adapter()
    layout = shared_layout(Layout.of(before), TASK)
    assert [spec.name for spec in layout.tensors] == [HEAD, R]
    size = TASK.state_size(Layout.of(before))
    vector = VectorSpec((Segment("delta", size, 400.0), Segment("weight", 1, 100.0)), ring_bits=40, max_clients=DEVICES)
    spec = session_spec(DEVICES, vector=vector)
    state, tensors = optimizer.start(rule, size), before
    reference, vector_before = (
        optimizer.start(rule, size),
        layout.flatten({HEAD: before[HEAD], R: np.zeros((2, 2), np.float32)}),
    )
    for mean in np.random.default_rng(2).normal(scale=0.1, size=(2, size)):
        sums = {"delta": rotated(WEIGHT * mean), "weight": np.array([WEIGHT])}
        state, after = TASK.next_adapter(
            SummedRound(spec, tensors, DIGEST, [GroupSum(NAMES, sums)]), ServerStep(rule, state)
        )
        reference, stepped = optimizer.step(rule, reference, vector_before, mean.astype(np.float32))
        moved = layout.unflatten(stepped)
        assert after.keys() == before.keys()
        assert np.array_equal(after[A], before[A])
        expected = tensors[B] + frozen_factor(B, (6, 2)) @ moved[R]
        np.testing.assert_allclose(after[B], expected, atol=1e-4)
        np.testing.assert_allclose(after[HEAD], moved[HEAD], atol=1e-4)
        assert np.abs(after[B] - tensors[B]).max() > 1e-2
        tensors, vector_before = after, layout.flatten({HEAD: moved[HEAD], R: np.zeros((2, 2), np.float32)})


def test_what_would_grow_without_limit_is_clipped() -> None:
    before = adapter() | {B: np.full((6, 2), optimizer.LARGEST, np.float32)}
    size = TASK.state_size(Layout.of(before))
    vector = VectorSpec((Segment("delta", size, 400.0), Segment("weight", 1, 100.0)), ring_bits=40, max_clients=DEVICES)
    sums = {"delta": rotated(np.full(size, WEIGHT * 0.5)), "weight": np.array([WEIGHT])}
    rule, spec = FedAvg(1000.0), session_spec(DEVICES, vector=vector)
    _, after = TASK.next_adapter(
        SummedRound(spec, before, DIGEST, [GroupSum(NAMES, sums)]), ServerStep(rule, optimizer.start(rule, size))
    )
    assert np.abs(after[B]).max() == optimizer.LARGEST
