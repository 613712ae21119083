"""The error of the mean of LoRA's factors, against its definition; and which methods have one."""

import math
from pathlib import Path

import numpy as np
import pytest

from edgeadapt.formats.layout import Tensors
from simulations.engine.arms import aggregation_error
from simulations.plan import Kind, Trial
from simulations.scenario import Scenario
from simulations.suite.execute import compute, compute_rounds
from simulations.suite.store import Store

WEIGHTS = (3.0, 1.0, 4.0)


def device(seed: int, *, a: int | None = None, b: int | None = None) -> Tensors:
    """Two layers and a head; ``a`` and ``b`` seed the factors, if they are not the device's own."""
    found: Tensors = {"classifier.weight": np.full((2, 3), seed, np.float32)}
    for layer in range(2):
        for factor, own, shape in (("A", a, (2, 5)), ("B", b, (4, 2))):
            rng = np.random.default_rng([seed if own is None else own, layer, ord(factor)])
            found[f"layer.{layer}.lora_{factor}.weight"] = rng.normal(size=shape).astype(np.float32)
    return found


def test_the_error_is_that_of_the_definition() -> None:
    devices, shares = [device(seed) for seed in range(3)], np.array(WEIGHTS) / sum(WEIGHTS)

    def mean(name: str) -> np.ndarray:
        return np.tensordot(shares, np.stack([one[name].astype(np.float64) for one in devices]), 1)

    exact, product = [], []
    for layer in range(2):
        a, b = f"layer.{layer}.lora_A.weight", f"layer.{layer}.lora_B.weight"
        exact.append(sum(w * (one[b].astype(np.float64) @ one[a]) for w, one in zip(shares, devices, strict=True)))
        product.append(mean(b) @ mean(a))
    expected = np.linalg.norm(np.subtract(exact, product)) / np.linalg.norm(exact)
    assert aggregation_error(zip(devices, WEIGHTS, strict=True)) == pytest.approx(expected)
    assert expected > 0.3


@pytest.mark.parametrize("same", ["a", "b"])
def test_with_one_factor_in_common_the_error_is_zero(same: str) -> None:
    devices = [device(seed, **{same: 9}) for seed in range(3)]
    assert aggregation_error(zip(devices, WEIGHTS, strict=True)) < 1e-6


def test_without_an_update_there_is_no_share_of_it() -> None:
    zero = {name: np.zeros_like(value) if "lora_B" in name else value for name, value in device(0).items()}
    assert math.isnan(aggregation_error([(zero, 1.0)]))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_global_arm_has_the_error_of_its_method(scenario: Scenario, tmp_path: Path) -> None:
    found = {}
    for method in ("fedit", "ffa", "rolora", "fedsb", "fedsa", "head"):
        table = scenario.model_dump(mode="json")
        table["federation"] |= {"method": method}
        store, trial = Store(tmp_path), Trial(Kind.GLOBAL, Scenario.parse(table, "test"))
        compute_rounds(trial, store, lambda _: None)
        found[method] = compute(trial, store, lambda _: None).aggregation_error
    assert found.pop("head") is found.pop("fedsa") is None  # no update of LoRA; B stays on the devices
    assert found.pop("fedit") > 1e-3
    assert max(found.values()) < 1e-6
