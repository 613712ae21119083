"""A base rounded as a profile rounds it: exporting it in that profile changes no weight."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgeadapt.bases.base import Base
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.classifier import build
from export.onnx.classifier import export_classifier
from export.onnx.exported import Profile
from export.parity.compare import OnnxRunner, log_softmax
from tests.support.models import slotted_of
from tests.support.training import dequantized

TEXTS = ["turn on the kitchen lights", "lock the door", "set a timer for ten minutes"]
BOTH = [Profile.NATIVE_INT8, Profile.NATIVE_INT4]


@pytest.mark.parametrize("profile", BOTH)
def test_rounding_a_rounded_base_changes_nothing(tmp_path: Path, tiny_base: Base, profile: Profile) -> None:
    rounded = dequantized(tiny_base, profile, tmp_path / "rounded")
    again = dequantized(rounded, profile, tmp_path / "again")
    before, once, twice = (load_file(base.folder / "model.safetensors") for base in (tiny_base, rounded, again))
    change = max(float(np.abs(once[name] - before[name]).max()) for name in once)
    assert change > 1e-3
    for name, value in once.items():
        np.testing.assert_allclose(twice[name], value, atol=1e-6 * np.abs(value).max())


def test_the_rounded_base_in_float_gives_the_probabilities_of_the_exported_profile(
    tmp_path: Path, tiny_base: Base
) -> None:
    """Except for the rounding of activations, which training cannot anticipate."""
    profile = Profile.NATIVE_INT4
    rounded = dequantized(tiny_base, profile, tmp_path / "rounded")
    spec = PeftConfig.lora(rank=4, alpha=8)
    in_float, in_profile, before = (
        _probabilities(base, spec, form)
        for base, form in ((rounded, Profile.FP32), (tiny_base, profile), (tiny_base, Profile.FP32))
    )
    assert np.abs(in_float - in_profile).max() < 0.3 * np.abs(before - in_profile).max() + 0.01


def _probabilities(base: Base, spec: PeftConfig, profile: Profile) -> np.ndarray:
    model = build(base, 4, spec)
    rng = np.random.default_rng(2)
    head = {"classifier.weight": rng.standard_normal((4, 32)) * 3, "classifier.bias": np.zeros(4)}
    inputs = {name: value.astype(np.float32) for name, value in head.items()}
    exported = export_classifier(slotted_of(model), base, profile)
    empty = {
        name: np.zeros([int(d) if d.isdigit() else 0 for d in dimensions], np.float32)
        for name, dimensions in exported.manifest.slots.items()
        if "lora" in name
    }
    return np.exp(log_softmax(OnnxRunner.open(exported.folder, exported.manifest).classify(TEXTS, inputs | empty)))
