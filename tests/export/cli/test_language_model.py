"""A language model from the command line: base, an adapter from peft, the gate, and back to peft."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from edgeadapt.bases.base import Base
from edgeadapt.methods.peft.folder import CONFIG, WEIGHTS
from tests.support import methods, virtual

PEFT = ("convert", "--format", "peft")

TEXTS = ("turn on the kitchen lights", "lock the door", "play some music in here", "x")


@pytest.fixture
def shop(export: Callable[..., Any], key: Path, tmp_path: Path, llama: Base) -> Path:
    """A key, pinned, and a bundle with the base; a folder of peft, and texts."""
    made = ("make", "--base", llama.folder, "--profile", "fp32", "--max-rank", "6")  # its configuration states the task
    done = export(*made, "--targets", "q_proj,v_proj", "--bundle", tmp_path / "bundle", "--key", key)
    assert done.code == 0, done.err
    patterns = {"rank_pattern": {r"layers\.0.*v_proj": 2}, "alpha_pattern": {r"layers\.1.*": 24}}
    _save(llama, tmp_path / "lora", r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"], **patterns)
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    return tmp_path


def _save(base: Base, folder: Path, **settings: Any) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.folder), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder)


def _add(shop: Path, folder: str, *more: str | Path) -> tuple[str | Path, ...]:
    return ("add", "--peft", shop / folder, "--bundle", shop / "bundle", "--key", shop / "key.pem", *more)


def test_a_language_model_has_no_probabilities_to_calibrate(export: Callable[..., Any], shop: Path) -> None:
    (shop / "held-out").write_text(f"{TEXTS[0]}\tturn it on\n" * 60)
    export(*_add(shop, "lora", "--calibrate", shop / "held-out")).refused(2, "--calibrate")


def test_parity_prints_the_losses_of_a_base_and_an_adapter(export: Callable[..., Any], shop: Path, llama: Base) -> None:
    assert export(*_add(shop, "lora", "--format", "fp32")).code == 0
    gate = ("check", "--bundle", shop / "bundle", "--base", llama.folder, "--texts", shop / "texts", "--json")
    done = export(*gate, "--peft", shop / "lora")
    assert done.code == 0, done.err
    found = done.json()
    assert found["agreement"] == 1.0
    assert found["count"] == sum(len(text) - 1 for text in TEXTS)  # one token a letter, and each predicts the next
    assert found["loss"] == pytest.approx(found["torch_loss"], abs=1e-4)
    assert found["perplexity_ratio"] == pytest.approx(1, abs=1e-4)
    assert export(*_add(shop, "lora", "--format", "int4")).code == 0
    few = export(*gate, "--peft", shop / "lora")
    assert (few.code, few.json()["passed"], "too few to judge" in few.err) == (0, None, True)
    (shop / "texts").write_text("\n".join(TEXTS * (100 // found["count"] + 1)))
    assert export(*gate, "--peft", shop / "lora").code == 6


def test_an_adapter_of_a_bundle_opens_in_peft_again(export: Callable[..., Any], shop: Path, llama: Base) -> None:
    assert export(*_add(shop, "lora", "--format", "int8")).code == 0
    assert export(*PEFT, "--bundle", shop / "bundle", "--out", shop / "back").code == 0
    before, after = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama.folder), shop / name).eval()
        for name in ("lora", "back")
    )
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected, found = before(input_ids=ids).logits.numpy(), after(input_ids=ids).logits.numpy()
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < 0.3


def test_an_adapter_of_fewer_layers_is_accepted_and_one_of_other_layers_refused(
    export: Callable[..., Any], shop: Path, llama: Base
) -> None:
    _save(llama, shop / "few", r=2, target_modules=["q_proj"], layers_to_transform=[1])
    done = export(*_add(shop, "few"), "--json")
    assert done.code == 0, done.err
    _save(llama, shop / "other", r=2, target_modules=["k_proj"])
    before = (shop / "bundle" / "adapters" / "global.json").read_bytes()
    export(*_add(shop, "other")).refused(5, "model.layers.0.self_attn.k_proj.lora_A.weight")
    _save(llama, shop / "high", r=7, target_modules=["q_proj"])
    export(*_add(shop, "high", "--adapter", "high")).refused(5, "rank")
    assert (shop / "bundle" / "adapters" / "global.json").read_bytes() == before
    assert not (shop / "bundle" / "adapters" / "high.json").exists()


# One command from a PEFT folder of virtual tokens to a bundle that gives peft's answers, and back.
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
