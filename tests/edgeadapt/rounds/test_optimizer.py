"""Server optimizers against the papers' formulas, against torch, and across storage."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from aggregation import rotation
from aggregation.errors import ConfigError, DataError
from aggregation.groups import GroupSum
from aggregation.spec import SessionSpec
from aggregation.vector import Segment, VectorSpec
from edgeadapt.formats import files
from edgeadapt.formats.layout import Floats, Layout, Tensors, TensorSpec
from edgeadapt.formats.manifest import PeftConfig, ServerRule
from edgeadapt.methods.lorasb import frozen_factor
from edgeadapt.methods.parts import Part
from edgeadapt.rounds import optimizer
from edgeadapt.rounds.optimizer import (
    LARGEST,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    ServerOptimizer,
    State,
    advance,
    of_rule,
    restore,
    start,
    step,
    to_rule,
)
from edgeadapt.rounds.roundtask import ServerStep, SummedRound
from edgeadapt.rounds.sums import Sums
from edgeadapt.rounds.task import Task, shared_layout
from tests.support import refused
from tests.support.fleet import ADAPTER, session_spec

SIZE = 50
EVERY = (FedAvg(0.7), FedAvgM(0.7), FedAdam(), FedYogi())


def deltas(rounds: int) -> Floats:
    """Means that grow, shrink, change sign and vanish, shape ``(rounds, SIZE)``."""
    scale = np.logspace(-5, 0, SIZE)
    return (np.random.default_rng(7).normal(size=(rounds, SIZE)) * scale).astype(np.float32)


def run(
    settings: ServerOptimizer, state: State, adapter: Floats, means: Sequence[Floats] | Floats
) -> tuple[State, Floats]:
    for mean in means:
        state, adapter = step(settings, state, adapter, mean)
    return state, adapter


def test_fedavg_scales_the_mean_by_its_rate() -> None:
    settings = FedAvg(learning_rate=0.5)
    _, updated = step(settings, start(settings, 2), np.array([1, 2], np.float32), np.array([4, -4], np.float32))
    assert updated.tolist() == [3, 0]


@pytest.mark.parametrize("settings", [FedAvg(1000.0), FedAdam(1000.0)], ids=["fedavg", "fedadam"])
def test_no_coordinate_of_an_adapter_exceeds_the_largest(settings: ServerOptimizer) -> None:
    adapter, mean = np.array([500, -500, 3], np.float32), np.array([4, -4, 0], np.float32)
    _, updated = step(settings, start(settings, 3), adapter, mean)
    assert updated.tolist() == [LARGEST, -LARGEST, 3]


def test_one_step_of_fedadam_by_hand() -> None:
    # m = .1 * 2; v = .75 * 1 + .25 * 4 = 1.75; x = 10 + .5 * .2 / (sqrt(1.75) + 1)
    settings = FedAdam(learning_rate=0.5, beta1=0.9, beta2=0.75, tau=1.0)
    state, updated = step(settings, start(settings, 1), np.array([10], np.float32), np.array([2], np.float32))
    assert state["first"][0] == pytest.approx(0.2)
    assert state["second"][0] == pytest.approx(1.75)
    assert updated[0] == pytest.approx(10.043050)


def test_fedadam_is_torch_adam_without_its_bias_corrections() -> None:
    settings = FedAdam(learning_rate=0.02, beta1=0.9, beta2=0.99, tau=1e-3)
    means = deltas(10)
    weight = torch.zeros(SIZE, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weight], lr=1.0, betas=(settings.beta1, settings.beta2))
    adam.state[weight] = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros(SIZE, dtype=torch.float64),
        "exp_avg_sq": torch.full((SIZE,), settings.tau**2, dtype=torch.float64),
    }
    state, adapter = start(settings, SIZE), np.zeros(SIZE, np.float32)
    for t, mean in enumerate(means, start=1):
        # torch: lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps); these two undo both corrections.
        second = (1 - settings.beta2**t) ** 0.5
        adam.param_groups[0]["lr"] = settings.learning_rate * (1 - settings.beta1**t) / second
        adam.param_groups[0]["eps"] = settings.tau / second
        weight.grad = -torch.from_numpy(mean).double()
        adam.step()
        state, adapter = step(settings, state, adapter, mean)
    np.testing.assert_allclose(adapter, weight.detach().numpy(), rtol=1e-5, atol=1e-8)


def test_fedyogi_follows_the_papers_update_round_by_round() -> None:
    settings = FedYogi(learning_rate=0.03, beta1=0.8, beta2=0.95, tau=1e-2)
    means, x = deltas(12), [0.25] * SIZE
    m, v = [0.0] * SIZE, [settings.tau**2] * SIZE
    state, adapter = start(settings, SIZE), np.full(SIZE, 0.25, np.float32)
    for mean in means:
        state, adapter = step(settings, state, adapter, mean)
        for i in range(SIZE):
            square = float(mean[i]) ** 2
            m[i] = settings.beta1 * m[i] + (1 - settings.beta1) * float(mean[i])
            v[i] -= (1 - settings.beta2) * square * float(np.sign(v[i] - square))
            x[i] += settings.learning_rate * m[i] / (v[i] ** 0.5 + settings.tau)
        np.testing.assert_allclose(adapter, x, rtol=1e-5, atol=1e-7)


def test_fedavgm_is_torch_sgd_with_momentum() -> None:
    settings, means = FedAvgM(learning_rate=0.3, momentum=0.8), deltas(10)
    weight = torch.zeros(SIZE, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([weight], lr=0.3, momentum=0.8)
    state, adapter = start(settings, SIZE), np.zeros(SIZE, np.float32)
    for mean in means:
        weight.grad = -torch.from_numpy(mean).double()
        sgd.step()
        state, adapter = step(settings, state, adapter, mean)
    np.testing.assert_allclose(adapter, weight.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_advance_moves_the_shared_tensors_and_leaves_the_others() -> None:
    tensors = {"a": np.ones((1, 2), np.float32), "b": np.ones(3, np.float32)}
    shared = Layout((TensorSpec("b", (3,)),))
    _, after = advance(FedAvg(), start(FedAvg(), 3), tensors, shared, np.array([1, 2, 3], np.float32))
    assert after["b"].tolist() == [2, 3, 4]
    assert after["a"] is tensors["a"]


@pytest.mark.parametrize("settings", EVERY, ids=lambda settings: type(settings).__name__)
def test_a_run_resumed_from_stored_state_is_the_same_bit_for_bit(settings: ServerOptimizer) -> None:
    means, origin = deltas(9), np.linspace(-1, 1, SIZE, dtype=np.float32)
    _, straight = run(settings, start(settings, SIZE), origin, means)

    state, halfway = run(settings, start(settings, SIZE), origin, means[:4])
    stored = files.decode(files.encode(dict(state))) if state else {}
    _, resumed = run(settings, restore(settings, stored, SIZE), halfway, means[4:])

    assert resumed.tobytes() == straight.tobytes()


def test_fedadam_that_loses_its_state_makes_other_adapters() -> None:
    settings, means, origin = FedAdam(), deltas(9), np.zeros(SIZE, np.float32)
    _, straight = run(settings, start(settings, SIZE), origin, means)
    _, halfway = run(settings, start(settings, SIZE), origin, means[:4])
    _, forgetful = run(settings, start(settings, SIZE), halfway, means[4:])
    assert not np.allclose(forgetful, straight, rtol=1e-3)


@pytest.mark.parametrize("settings", EVERY, ids=lambda settings: type(settings).__name__)
def test_a_step_changes_nothing_in_place(settings: ServerOptimizer) -> None:
    state, adapter, mean = start(settings, SIZE), np.ones(SIZE, np.float32), deltas(1)[0]
    for vector in (adapter, mean, *state.values()):
        vector.flags.writeable = False
    first, second = step(settings, state, adapter, mean), step(settings, state, adapter, mean)
    assert first[1].dtype == np.float32
    assert first[1].tobytes() == second[1].tobytes()


@pytest.mark.parametrize("settings", EVERY, ids=lambda settings: type(settings).__name__)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_mean_that_is_not_finite_is_refused(settings: ServerOptimizer, value: float) -> None:
    mean = np.array([0, value], np.float32)
    with refused(DataError, "update"):
        step(settings, start(settings, 2), np.zeros(2, np.float32), mean)


@pytest.mark.parametrize("mean", [np.zeros(3, np.float32), np.zeros(2), np.zeros((1, 2), np.float32)], ids=str)
def test_a_mean_that_does_not_fit_the_adapter_is_refused(mean: Floats) -> None:
    with refused(DataError, "shape"):
        step(FedAvg(), start(FedAvg(), 2), np.zeros(2, np.float32), mean)


def test_state_of_another_optimizer_or_size_is_refused() -> None:
    moments = start(FedAdam(), 4)
    vector = np.zeros(4, np.float32)
    with refused(ConfigError, "state"):
        step(FedAdam(), start(FedAvg(), 4), vector, vector)
    with refused(DataError, "shape"):
        step(FedAdam(), start(FedAdam(), 1), vector, vector)
    cases: list[tuple[ServerOptimizer, int, State]] = [
        (FedAvg(), 4, moments),
        (FedAdam(), 5, moments),
        (FedAdam(), 4, {"first": moments["first"]}),
    ]
    for settings, size, stored in cases:
        with refused(ConfigError, "optimizer"):
            restore(settings, stored, size)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_or_tau_that_is_not_positive_is_refused(bad: float) -> None:
    with refused(ConfigError, "learning_rate"):
        FedAvg(bad)
    with refused(ConfigError, "learning_rate"):
        FedAdam(learning_rate=bad)
    with refused(ConfigError, "tau"):
        FedAdam(tau=bad)


@pytest.mark.parametrize("bad", [1.0, -0.1, float("nan")])
def test_a_beta_outside_its_range_is_refused(bad: float) -> None:
    with refused(ConfigError, "beta1"):
        FedAdam(beta1=bad)
    with refused(ConfigError, "beta2"):
        FedAdam(beta2=bad)


def test_a_tau_whose_square_vanishes_in_float32_is_refused() -> None:
    with refused(ConfigError, "tau", value=1e-30):
        FedAdam(tau=1e-30)


@pytest.mark.parametrize("settings", [FedAvg(0.5), FedAdam(0.02, beta1=0.5)])
def test_a_rule_names_the_optimizer_with_its_numbers(settings: ServerOptimizer) -> None:
    assert of_rule(to_rule(settings)) == settings


@pytest.mark.parametrize(
    ("rule", "about"),
    [
        (ServerRule("Sgd", {"learning_rate": 1.0}), "rule"),
        (ServerRule("FedAvg", {"learning_rate": 1.0, "tau": 1.0}), "rule"),
        (ServerRule("FedAvg", {}), "rule"),
        (ServerRule("FedAvg", {"learning_rate": -1.0}), "learning_rate"),
    ],
)
def test_a_rule_of_no_optimizer_is_refused(rule: ServerRule, about: str) -> None:
    with refused(ConfigError, about):
        of_rule(rule)


# From a sum to the next adapter: in a round of Fed-SB, each server optimizer steps R and never A.
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
