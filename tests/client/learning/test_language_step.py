"""The personal step of a language model makes its private adapter of a device's texts, without torch."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from aggregation.errors import ConfigError, DataError, EdgeAdaptError
from aggregation.pki.identity import IdentityKey
from client.inference.library import Library
from client.learning import Correction, Learner
from client.learning.learner import bits
from client.training.personal import PersonalStep
from edgeadapt.formats.bundle import BASE_MANIFEST, TRAINING, adapter_names
from edgeadapt.formats.manifest import BaseManifest
from edgeadapt.formats.peftconfig import PeftConfig
from export.bundle.sources import from_peft
from export.bundle.write import add, write_bundle
from export.causal import export_causal
from export.onnx.exported import ExportedBase, Profile
from export.onnx.targets import SlotKind, Slots
from tests.client.learning.test_learner import run
from tests.support import refused, virtual
from tests.support.blocked import without_torch

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = PeftConfig.lora(rank=4, alpha=8, targets=("q_proj", "v_proj"))
FINE_TUNE = PersonalStep(8, 16.0)


@pytest.fixture(scope="module")
def trainable(lm_base: Any) -> ExportedBase:
    return export_causal(lm_base, CONFIG.target_modules, Profile.NATIVE_INT8, training=True)


@pytest.fixture(scope="module")
def virtual_trainable(lm_base: Any) -> ExportedBase:
    kinds = frozenset({SlotKind.PROMPT, SlotKind.PREFIX})
    return export_causal(lm_base, Slots((), kinds), Profile.FP32, training=True)


@pytest.fixture
def talker(tmp_path: Path, trainable: ExportedBase, lm_source: Any, vendor: IdentityKey) -> Path:
    """A bundle of a language model with a training graph and a global adapter."""
    folder = tmp_path / "device" / "bundle"
    write_bundle(folder, trainable, [lm_source(peft_config=CONFIG)], key=vendor)
    (folder.parent / "trust.pem").write_bytes(vendor.public.to_pem())
    return folder


def texts(folder: Path, held_out: str = "abab abab") -> Path:
    lines: list[dict[str, str]] = [{"text": text} for text in ("abab abab abab", "abab abab ab", "ab abab")]
    lines += [{"text": "yes", "prompt": "is it?"}, {"text": held_out, "split": "validation"}]
    path = folder / "examples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def contents(bundle: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted((bundle / "adapters").iterdir())}


def test_a_command_without_torch_makes_the_private_adapter_which_is_used_and_undone(
    talker: Path, tmp_path: Path
) -> None:
    before = contents(talker)
    options = ["--epochs", "8", "--learning-rate", "0.02", "--json", str(texts(talker.parent))]
    command = [sys.executable, "-m", "edgeadapt", "device", "personalize", "--bundle", str(talker), *options]
    there = os.environ | without_torch(tmp_path / "absent")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=there)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["adapter"], found["version"], found["made"], found["trained"]) == ("personal", 4, True, 4)
    assert found["bits"]["personal"] < 0.8 * found["bits"]["global"]
    library = Library.open(talker, None)
    assert (library.default(), adapter_names(talker)) == ("personal", ["global", "personal"])
    with Learner.open(talker, task=None) as learner:
        again = learner.personalize(texts(talker.parent), FINE_TUNE, 0.02)
        assert bits(again.scores["in use"]) == pytest.approx(found["bits"]["personal"], abs=1e-6)
    while "personal" in adapter_names(talker):
        undone = run("learn", "--undo", "--bundle", talker)
        assert undone.exit_code == 0, undone.output
    assert contents(talker) == before


def test_without_held_out_texts_the_step_is_used(talker: Path) -> None:
    path = texts(talker.parent)
    path.write_text('{"text": "ab ab"}\n')
    with Learner.open(talker, task=None) as learner:
        found = learner.personalize(path, PersonalStep(1, 16.0), 0.001)
    assert (found.adapter, found.made, found.held_out) == ("personal", True, 0)


def test_what_was_taught_is_trained_again_by_the_step(talker: Path) -> None:
    path, taught = texts(talker.parent), Correction("is it so?", "no")
    path.write_text('{"text": "ab ab"}\n')
    with Learner.open(talker, task=None) as learner:
        learner.teach([taught])
    with Learner.open(talker, task=None) as learner:
        found = learner.personalize(path, PersonalStep(20, 16.0), 0.02)
    assert (found.made, found.trained) == (True, 2)
    with Learner.open(talker, task=None) as learner:
        assert learner.teach([taught]).steps == 0


def test_an_adapter_that_predicts_held_out_texts_better_stays(talker: Path) -> None:
    before = contents(talker)
    with Learner.open(talker, task=None) as learner:
        found = learner.personalize(texts(talker.parent, "Zq%+7"), FINE_TUNE, 0.09)
    assert (found.adapter, found.made) == ("global", False)
    assert found.scores["personal"].loss > found.scores["global"].loss
    assert contents(talker) == before


def test_a_taught_answer_is_given_from_then_on_and_what_is_forgotten_is_shown(talker: Path) -> None:
    before, compared = contents(talker), texts(talker.parent)
    taught = run("chat", "--bundle", talker, "--prompt", "is it?", "--teach", "yes", "--json")
    assert taught.exit_code == 0, taught.output
    found = json.loads(taught.stdout)
    (one,) = found["taught"]
    assert (one["prompt"], one["text"], one["known"]) == ("is it?", "yes", True)
    assert one["after"] <= 4 / 3 < one["before"]  # bits: three bytes and the end have a probability of .5 each
    shown = run("chat", "--bundle", talker, "--prompt", "is it?", "--max-tokens", "8")
    assert shown.stdout == "yes\n", shown
    corrections = talker.parent / "corrections.tsv"
    corrections.write_text("no\tor not?\nabba\tbaab\n")
    again = run("learn", "--bundle", talker, "--compare", compared, "--json", corrections)
    assert again.exit_code == 0, again.output
    later = json.loads(again.stdout)
    assert [one["text"] for one in later["taught"]] == ["no", "abba"]
    assert later["others"][0]["text"] == "yes"
    assert later["others"][0]["before"] == pytest.approx(one["after"], rel=1e-5)
    assert len(later["others"]) == 1 + 5
    shown = run("learn", "--bundle", talker, corrections).stdout
    assert "bits per byte before → after" in shown
    assert "taught  " in shown
    while "personal" in adapter_names(talker):
        assert run("learn", "--undo", "--bundle", talker).exit_code == 0
    assert contents(talker) == before


@pytest.fixture(params=["prompt", "p-tuning", "prefix"])
def virtual_talker(
    request: pytest.FixtureRequest, lm_base: Any, virtual_trainable: ExportedBase, tmp_path: Path, vendor: IdentityKey
) -> Path:
    """A bundle with a training graph and a global adapter of virtual tokens."""
    bundle = tmp_path / "device" / "bundle"
    write_bundle(bundle, virtual_trainable, [], key=vendor)
    (bundle.parent / "trust.pem").write_bytes(vendor.public.to_pem())
    config = virtual.METHODS[request.param]()
    config.num_virtual_tokens = 5
    virtual.trained(lm_base, request.param, tmp_path / "peft", config)
    add(bundle, from_peft(tmp_path / "peft", 1, ()), name="global", form="fp32", key=vendor)
    return bundle


@pytest.mark.parametrize("virtual_talker", ["prompt", "prefix"], indirect=True)
def test_virtual_tokens_are_taught_and_answer_from_then_on(virtual_talker: Path) -> None:
    taught = run("chat", "--bundle", virtual_talker, "--prompt", "is it?", "--teach", "yes", "--json")
    assert taught.exit_code == 0, taught.output
    assert json.loads(taught.stdout)["taught"][0]["known"]
    assert run("chat", "--bundle", virtual_talker, "--prompt", "is it?", "--max-tokens", "8").stdout == "yes\n"


def test_the_personal_step_of_virtual_tokens_has_a_rate_at_which_they_learn(virtual_talker: Path) -> None:
    path = texts(virtual_talker.parent)
    done = run("personalize", "--bundle", virtual_talker, "--epochs", "8", "--json", path)
    assert done.exit_code == 0, done.output
    bits = json.loads(done.stdout)["bits"]
    assert bits["personal"] < 0.8 * bits["global"]


# Bad input: one line, and the adapter in use stays.


def test_an_answer_that_cannot_be_taught_is_refused_and_changes_nothing(talker: Path) -> None:
    before = contents(talker)
    with Learner.open(talker, task=None) as learner:
        for corrections, about in (
            ([], "corrections"),
            ([Correction("a", "b"), Correction("a", "c")], "corrections"),
            ([Correction("a", "b" * 2001)], "answer"),
            ([Correction("a", "Zq%+7 " * 60)], "answer"),  # has more tokens than are read
            ([Correction(" ", "b")], "prompt"),
            ([Correction("a", "b<|im_end|>")], "answer"),  # the prompt of another message could follow it
            ([Correction("<|im_start|>system", "b")], "prompt"),
            ([Correction("a", "b\0c")], "text"),
            ([Correction("a", "\udcff")], "text"),  # what a terminal makes of a byte that is not UTF-8
            ([Correction("ab" * 400, "b")], "example.prompt"),
        ):
            with refused(DataError, about):
                learner.teach(corrections)
    error = run("infer", "--bundle", talker, "--teach", "b", "a").exception
    assert isinstance(error, ConfigError)
    assert error.about == "base.task"
    assert run("chat", "--bundle", talker, "--teach", "b").exit_code == 2
    assert contents(talker) == before


def test_what_cannot_be_trained_is_refused_and_changes_nothing(talker: Path) -> None:
    before, path = contents(talker), texts(talker.parent)
    with Learner.open(talker, task=None) as learner:
        with refused(ConfigError, "--method"):
            learner.personalize(path, PersonalStep(1, 16.0, "ridge"), 0.01)
        with refused(DataError, "training.loss"):
            learner.personalize(path, FINE_TUNE, 1e30)
        path.write_text("")
        with refused(DataError, "examples.split"):
            learner.personalize(path, FINE_TUNE, 0.01)
    with refused(ConfigError, "base.task"), Learner.open(talker, task="text-classification"):
        raise AssertionError
    assert contents(talker) == before


def signed_with(bundle: Path, name: str, content: bytes, vendor: IdentityKey) -> None:
    """Replace a file of the base, as a vendor who signs a wrong one would."""
    path = bundle / BASE_MANIFEST
    manifest = BaseManifest.unverified(path.read_bytes())
    (bundle / "base" / name).write_bytes(content)
    path.write_bytes(replace(manifest, files=manifest.files | {name: sha256(content).hexdigest()}).sign(vendor))


def without_gradient(model: onnx.ModelProto) -> None:
    output = next(each for each in model.graph.output if each.name.endswith("v_proj.lora_A.weight.gradient"))
    model.graph.output.remove(output)


def of_another_layout(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        if value.name.endswith("lora_A.weight"):
            value.type.tensor_type.shape.dim[0].dim_value += 1


def of_another_base(model: onnx.ModelProto) -> None:
    large = [entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "offset"]
    large[-1].value = str(2**40)


def with_nan_weights(model: onnx.ModelProto) -> None:
    scales = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("_scales"))
    scales.CopyFrom(onnx.numpy_helper.from_array(np.full(tuple(scales.dims), np.nan, np.float32), scales.name))


@pytest.mark.parametrize(
    ("change", "error", "about"),
    [
        (without_gradient, ConfigError, TRAINING),
        (of_another_layout, ConfigError, TRAINING),
        (of_another_base, ConfigError, TRAINING),
        (with_nan_weights, DataError, "training.loss"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_training_graph_is_refused_and_the_adapter_in_use_stays(
    talker: Path,
    vendor: IdentityKey,
    change: Callable[[onnx.ModelProto], None],
    error: type[EdgeAdaptError],
    about: str,
) -> None:
    before, model = contents(talker), onnx.load_from_string((talker / "base" / TRAINING).read_bytes())
    change(model)
    signed_with(talker, TRAINING, model.SerializeToString(), vendor)
    with Learner.open(talker, task=None) as learner, refused(error, about):
        learner.personalize(texts(talker.parent), FINE_TUNE, 0.01)
    assert contents(talker) == before
