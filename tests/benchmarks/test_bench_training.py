"""``benchmarks training``: both engines train the same adapter of a tiny base, and the table has what they took."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner
from peft import PeftModel

from aggregation.errors import ConfigError, DataError
from aggregation.pki.identity import IdentityKey
from benchmarks import target, training
from benchmarks.__main__ import bench
from edgeadapt.bases.base import Base
from edgeadapt.formats.bundle import TRUST
from export.bundle.write import write_bundle
from export.causal import export_causal
from export.onnx.classifier import export_classifier
from export.onnx.exported import Profile
from tests.support import models, refused
from tests.support.models import slotted_of

globals().update(models.FIXTURES)


@pytest.fixture(scope="module")
def trains(lm_base: Base, vendor: IdentityKey, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """A bundle of the tiny language model, with a training graph or without one."""

    def make(graph: bool) -> Path:
        folder = tmp_path_factory.mktemp("trains")
        exported = export_causal(lm_base, ("q_proj", "v_proj"), Profile.NATIVE_INT8, training=graph)
        write_bundle(folder / "bundle", exported, [], key=vendor)
        (folder / TRUST).write_bytes(vendor.public.to_pem())
        return folder / "bundle"

    return make


def side(value: float) -> dict[str, dict[str, float]]:
    return {name: {"median": value, "min": value / 2, "max": value * 2} for name in training.FIGURES}


def test_the_process_that_trains_with_a_graph_imports_no_torch() -> None:
    code = "import sys, benchmarks.training; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_both_engines_train_the_adapter_and_its_loss_is_the_same(trains: Callable[[bool], Path], lm_base: Base) -> None:
    given = ["training", "--bundle", str(trains(True)), "--base", str(lm_base.folder), "--quick", "--json"]
    result = CliRunner().invoke(bench, given)
    assert result.exception is None, result.output
    found = json.loads(result.stdout)
    assert found["task"] == "text-generation"
    for engine in training.ENGINES:
        assert all(found[engine][name]["median"] > 0 for name in training.FIGURES)
    assert found["ratios"]["loss"] == pytest.approx(1, abs=0.01)
    assert "peak memory" in training.table(found)


@pytest.mark.slow
def test_a_classifier_is_trained_by_both_engines_too(
    model: PeftModel, tiny_base: Base, vendor: IdentityKey, tmp_path: Path
) -> None:
    exported = export_classifier(slotted_of(model), tiny_base, Profile.FP32, training=True)
    write_bundle(tmp_path / "bundle", exported, [], key=vendor)
    (tmp_path / TRUST).write_bytes(vendor.public.to_pem())
    given = {"bundle": str(tmp_path / "bundle"), "trust": None, "base": str(tiny_base.folder), "begun": 0.0}
    ours, theirs = (training._measured(engine, **given, **asdict(training.QUICK)) for engine in training.ENGINES)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)


@pytest.mark.slow
def test_what_cannot_be_compared_is_refused_in_one_line(
    trains: Callable[[bool], Path], lm_base: Base, tiny_base: Base
) -> None:
    bundle = trains(False)
    with refused(ConfigError, "--base"):
        training.compare(bundle, None, str(tiny_base.folder), training.QUICK, lambda step: None)
    with pytest.raises(DataError, match=r"onnx: .* has no training graph"):
        training.compare(bundle, None, str(lm_base.folder), training.QUICK, lambda step: None)


# benchmarks target


def test_both_sides_reach_the_target_and_fewer_layers_are_sent() -> None:
    done = CliRunner().invoke(bench, ["target", "--quick", "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    for side in target.SIDES:
        assert found[side]["accuracy"]["median"] >= target.QUICK.target
        assert found[side]["cpu"]["median"] > 0
    assert found["ours"]["bytes"]["median"] != found["peft"]["bytes"]["median"]
    assert "ours / peft" in target.table(found)
