"""One command from a PEFT folder of virtual tokens to a bundle that gives peft's answers, and back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgeadapt.bases.base import Base
from edgeadapt.methods.peft.folder import CONFIG, WEIGHTS
from tests.support import methods, virtual

PEFT = ("convert", "--format", "peft")

Run = Callable[..., Any]
globals().update(virtual.FIXTURES | methods.FIXTURES)


@pytest.mark.parametrize("name", ["projected"])
def test_a_language_model_passes_parity_and_gives_its_tensors_back(
    export: Run, key: Path, tmp_path: Path, llama: Base, virtual_models: Any, name: str
) -> None:
    model, _, folder = virtual_models[name]
    bundle, out, texts = tmp_path / "bundle", tmp_path / "out", tmp_path / "texts"
    made = ("add", "--peft", folder, "--base", llama.folder, "--profile", "fp32", "--bundle", bundle, "--key", key)
    assert export(*made).code == 0
    manifest = json.loads(export("add", *made[1:3], "--bundle", bundle, "--key", key, "--json").out)
    assert manifest["peft_config"]["peft_type"] == model.active_peft_config.peft_type
    texts.write_text("turn on\nthe door is open\n")
    done = export("check", "--bundle", bundle, "--base", llama.folder, "--peft", folder, "--texts", texts, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["max_abs_diff"] < 1e-4
    assert export(*PEFT, "--bundle", bundle, "--out", out).code == 0
    before, after = load_file(folder / WEIGHTS), load_file(out / WEIGHTS)
    assert before.keys() == after.keys() == {"prompt_embeddings"}
    assert np.array_equal(before["prompt_embeddings"], after["prompt_embeddings"])
    again = virtual.opened(llama, out)
    assert np.array_equal(virtual.logits(again, [30, 31, 40]), virtual.logits(model, [30, 31, 40]))


@pytest.mark.parametrize(
    ("settings", "tensor", "about"),
    [
        ({}, np.full((5, 64), np.nan), "prompt_embeddings"),
        ({}, np.ones((4, 64)), "num_virtual_tokens"),
        ({}, np.ones((5, 32)), "prompt_embeddings"),
        ({"num_transformer_submodules": 2}, np.ones((5, 64)), "num_transformer_submodules"),
        ({"num_virtual_tokens": 64}, np.ones((64, 64)), "num_virtual_tokens"),
    ],
    ids=["NaN", "fewer than stated", "another width", "two stacks", "the whole context"],
)
def test_virtual_tokens_that_cannot_be_are_refused(
    export: Run,
    key: Path,
    tmp_path: Path,
    virtual_bundle: Path,
    virtual_models: Any,
    settings: Any,
    tensor: Any,
    about: str,
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    stated = json.loads((virtual_models["prompt"][2] / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(stated | settings))
    save_file({"prompt_embeddings": tensor.astype(np.float32)}, folder / WEIGHTS)
    done = export("add", "--peft", folder, "--adapter", "odd", "--bundle", virtual_bundle, "--key", key)
    assert done.error is not None
    assert about in done.error.about
    assert done.code == (2 if about == "num_transformer_submodules" else 5), done.err
    assert len(done.err.splitlines()) == 1


def test_a_prefix_for_a_classifier_and_a_prompt_without_its_own_head_are_refused(
    export: Run, key: Path, tmp_path: Path, every_method_base: Base
) -> None:
    made = ("make", "--base", every_method_base.folder, "--bundle", tmp_path / "bundle", "--key", key)
    export(*made, "--head", "own", "--slots", "prefix").refused(2, "PREFIX_TUNING")
    export(*made, "--head", "mean", "--slots", "prompt").refused(2, "--head")
