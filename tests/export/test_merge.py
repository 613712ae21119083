"""A merged base answers as peft does with the adapter; what peft cannot merge is refused, and nothing is written."""

import hashlib
import json
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from aggregation.errors import ConfigError, DataError
from aggregation.pki.identity import IdentityKey
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base, find_base
from edgeadapt.methods.peft.config import MERGED
from edgeadapt.methods.peft.folder import CONFIG, WEIGHTS
from export.bundle.base import export_named, model_of, wanted
from export.bundle.sources import from_peft
from export.bundle.write import create
from export.causal import export_causal
from export.merge import merge
from export.onnx.exported import Profile
from tests.support import refused
from tests.support.models import LABELS, MakeLm
from tests.support.recipes import CLI, TEXTS, by_torch, infer, randomize

LAYERS = {"target_modules": ["q_proj", "v_proj"]}
SETTINGS: dict[str, dict[str, Any]] = {  # of the methods whose defaults do not fit a tiny model
    "ADALORA": {"total_step": 9},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "OFT": {"oft_block_size": 8},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [4, 5, 6]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "topk": 2},
    "WAVEFT": {"n_frequency": 200},
}


def configured(kind: str, **settings: Any) -> PeftConfig:
    made = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind]]
    given: dict[str, Any] = {"task_type": "CAUSAL_LM"} | LAYERS | SETTINGS.get(kind, {}) | settings
    return made(**given)


def adapted(base: Base, config: PeftConfig, folder: Path, seed: int = 3) -> PeftModel:
    """A model with random values in place of trained ones, saved by peft."""
    model = get_peft_model(pretrained.load(base, AutoModelForCausalLM), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad and value.is_floating_point():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model(input_ids=torch.arange(3, 20)[None]).logits
    return answer


@pytest.mark.filterwarnings("ignore")  # of peft, about its own methods
@pytest.mark.parametrize("kind", sorted(MERGED))
def test_every_method_that_the_page_says_merges_does(llama: Base, tmp_path: Path, kind: str) -> None:
    model = adapted(llama, configured(kind), tmp_path / "peft")
    done = merge(llama, tmp_path / "peft", tmp_path / "out")
    bare, expected = logits(pretrained.load(llama, AutoModelForCausalLM)), logits(model)
    found = logits(pretrained.load(done.base, AutoModelForCausalLM))
    assert (expected - bare).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    assert done.base.digest not in (llama.digest, "")


def test_what_was_merged_is_in_the_configuration_and_the_digest(llama: Base, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        adapted(llama, configured("LOKR"), tmp_path / name, seed)
    one, same, other = (merge(llama, tmp_path / of, tmp_path / f"out-{n}") for n, of in enumerate("aab"))
    assert one.base.digest == same.base.digest != other.base.digest
    twice = merge(one.base, tmp_path / "b", tmp_path / "twice")
    noted = json.loads((twice.base.folder / "config.json").read_text())["merged_adapters"]
    assert twice.base.merged == {one.adapter: "LOKR", other.adapter: "LOKR"}
    assert [note["base_digest"] for note in noted] == [llama.digest, one.base.digest]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {"layer_replication": [[0, 2], [1, 2]]},
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
        {"trainable_token_indices": [4, 5]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=lambda settings: next(reversed(settings)),
)
def test_lora_that_cannot_be_exported_is_referred_to_merging_and_merges(
    make_lm: MakeLm, tmp_path: Path, settings: dict[str, Any]
) -> None:
    base = make_lm(num_hidden_layers=2)
    model = adapted(base, configured("LORA", **settings), tmp_path / "peft")
    with pytest.raises(ConfigError, match=r"train without it.*, or merge the adapter into its base with 'edgeadapt"):
        from_peft(tmp_path / "peft", 1, ())
    done = merge(base, tmp_path / "peft", tmp_path / "out")
    expected, found = logits(model), logits(pretrained.load(done.base, AutoModelForCausalLM))
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("tied", "whole"),
    [(True, ["lm_head"]), (True, ["embed_tokens"]), (False, ["lm_head", "embed_tokens", "norm"])],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_modules_that_an_adapter_brings_whole_are_merged(
    make_lm: MakeLm, tmp_path: Path, tied: bool, whole: list[str]
) -> None:
    base = make_lm(tie_word_embeddings=tied)
    model = adapted(base, configured("LORA", modules_to_save=whole), tmp_path / "peft")
    done = merge(base, tmp_path / "peft", tmp_path / "out")
    expected = logits(model)
    found = logits(pretrained.load(done.base, AutoModelForCausalLM))
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_new_tokens_come_with_the_tokenizer_of_the_adapter(make_lm: MakeLm, tmp_path: Path) -> None:
    base, folder = make_lm(tie_word_embeddings=False), tmp_path / "peft"
    inner = pretrained.load(base, AutoModelForCausalLM)
    inner.resize_token_embeddings(inner.config.vocab_size + 2)
    model = get_peft_model(inner, configured("LORA", modules_to_save=["lm_head", "embed_tokens"])).eval()
    model.save_pretrained(folder)
    with refused(ConfigError, "tokenizer.json"):
        merge(base, folder, tmp_path / "out")
    tokenizer = pretrained.tokenizer(base)
    assert tokenizer.add_special_tokens(["<call>", "<result>"]) == 2
    tokenizer.save(str(folder / "tokenizer.json"))
    done = merge(base, folder, tmp_path / "out")
    assert pretrained.tokenizer(done.base).token_to_id("<call>") == inner.config.vocab_size - 2
    torch.testing.assert_close(logits(pretrained.load(done.base, AutoModelForCausalLM)), logits(model))
    brought = load_file(folder / WEIGHTS)
    save_file({name: value for name, value in brought.items() if "lm_head.w" not in name}, folder / WEIGHTS)
    with refused(ConfigError, "--peft"):
        merge(base, folder, tmp_path / "second")


def test_other_types_are_refused_by_name(llama: Base, tmp_path: Path) -> None:
    adapted(llama, configured("LORA"), tmp_path / "peft")
    for kind in sorted({each.value for each in peft.PeftType} - MERGED):
        (tmp_path / "peft" / CONFIG).write_text(json.dumps({"peft_type": kind}))
        with refused(ConfigError, "peft_type", value=kind):
            merge(llama, tmp_path / "peft", tmp_path / "out")


def test_a_type_that_the_installed_peft_lacks_is_refused_with_its_version(
    llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(llama, configured("LORA"), tmp_path / "peft")
    (tmp_path / "peft" / CONFIG).write_text(json.dumps({"peft_type": "FROD"}))
    older = Enum("PeftType", {name: name for name in peft.PeftType.__members__ if name != "FROD"})
    monkeypatch.setattr("export.merge.PeftType", older)
    with refused(ConfigError, "peft", value=peft.__version__):
        merge(llama, tmp_path / "peft", tmp_path / "out")


@pytest.mark.parametrize(("name", "value"), [("lora_alpha", "8"), ("r", 10**30)])
def test_numbers_that_peft_cannot_use_are_refused_by_name(
    llama: Base, tmp_path: Path, name: str, value: object
) -> None:
    adapted(llama, configured("LORA"), tmp_path / "peft")
    settings = json.loads((tmp_path / "peft" / CONFIG).read_text())
    (tmp_path / "peft" / CONFIG).write_text(json.dumps(settings | {name: value}))
    with refused(DataError, name, value=value):
        merge(llama, tmp_path / "peft", tmp_path / "out")


DAMAGE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "NaN": lambda tensors: tensors | {next(iter(tensors)): np.full_like(next(iter(tensors.values())), np.nan)},
    "one missing": lambda tensors: dict(list(tensors.items())[1:]),
    "one too many": lambda tensors: tensors | {"base_model.model.model.wings.lokr_w1": np.ones((2, 2), np.float32)},
    "another size": lambda tensors: {name: value[:-1] for name, value in tensors.items()},
    "none": lambda tensors: {},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_refused_and_nothing_is_written(llama: Base, tmp_path: Path, damage: str) -> None:
    adapted(llama, configured("LOKR"), tmp_path / "peft")
    save_file(DAMAGE[damage](load_file(tmp_path / "peft" / WEIGHTS)), tmp_path / "peft" / WEIGHTS)
    with pytest.raises((ConfigError, DataError)) as caught:
        merge(llama, tmp_path / "peft", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


SETTINGS_THAT_DO_NOT_FIT: list[dict[str, Any]] = [
    {"task_type": "SEQ_CLS"},
    {"target_modules": {"a": 1}},
    {"megatron_config": {"x": 1}, "megatron_core": "this"},
    {"modules_to_save": 3},
    {"peft_type": ["LOKR"]},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes", SETTINGS_THAT_DO_NOT_FIT, ids=str)
def test_settings_that_do_not_fit_end_in_one_line(llama: Base, tmp_path: Path, changes: dict[str, Any]) -> None:
    adapted(llama, configured("LOKR"), tmp_path / "peft")
    config = tmp_path / "peft" / CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises((ConfigError, DataError)) as caught:
        merge(llama, tmp_path / "peft", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused(make_lm: MakeLm, llama: Base, tmp_path: Path) -> None:
    adapted(make_lm(hidden_size=32, head_dim=8), configured("LOKR"), tmp_path / "peft")
    with refused(ConfigError, "--peft"):
        merge(llama, tmp_path / "peft", tmp_path / "out")
    (tmp_path / "peft" / WEIGHTS).write_bytes((tmp_path / "peft" / WEIGHTS).read_bytes()[:-9])
    with refused(DataError, WEIGHTS):
        merge(llama, tmp_path / "peft", tmp_path / "out")


def test_a_merged_language_model_is_exported_as_any_base(llama: Base, tmp_path: Path, runner: Any) -> None:
    model = adapted(llama, configured("OFT", target_modules=["down_proj", "o_proj"]), tmp_path / "peft")
    done = merge(llama, tmp_path / "peft", tmp_path / "out")
    exported = export_causal(done.base, ("q_proj",), Profile.FP32)
    assert exported.manifest.merged == {done.adapter: "OFT"}
    side = runner(exported)
    tokens = np.arange(3, 20)[None]
    expected = logits(model).numpy()
    np.testing.assert_allclose(side.logits(tokens, {}, 5), expected, atol=1e-4 * np.abs(expected).max())


def test_a_merged_classifier_comes_with_an_adapter_that_brings_the_head(
    tiny_base: Base, tmp_path: Path, vendor: IdentityKey
) -> None:
    folder, bundle = tmp_path / "peft", tmp_path / "bundle"
    inner = model_of(tiny_base, "text-classification", mean=False, saved=["classifier"], labels=len(LABELS))
    config = peft.LoKrConfig(r=3, target_modules=["query", "output.dense"], modules_to_save=["classifier"])
    model = get_peft_model(inner, config).eval()
    randomize(model, lambda name: "lokr_" in name or "modules_to_save" in name)
    model.save_pretrained(folder)
    done = merge(tiny_base, folder, tmp_path / "out")
    assert done.head == tmp_path / "out" / "head"
    origin = from_peft(done.head, 1, LABELS)
    exported = export_named(str(done.base.folder), "fp32", wanted(done.base, origin))
    assert exported.manifest.merged == {done.adapter: "LOKR"}
    create(bundle, exported, origin, name="global", form="fp32", key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    for found, expected in zip(infer(bundle, *TEXTS), by_torch(model, tiny_base, TEXTS), strict=True):
        assert found == pytest.approx(expected, abs=2e-5)
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    words = ["--bundle", bundle, "--base", done.base.folder, "--peft", done.head, "--texts", tmp_path / "texts"]
    assert CliRunner().invoke(CLI, ["bundle", "check", *map(str, words)], catch_exceptions=False).exit_code == 0


def test_a_classifier_without_a_head_is_refused(tiny_base: Base, tmp_path: Path) -> None:
    inner = model_of(tiny_base, "text-classification", mean=True, saved=(), labels=2)
    get_peft_model(inner, peft.LoKrConfig(target_modules=["query"])).save_pretrained(tmp_path / "peft")
    with refused(ConfigError, "modules_to_save"):
        merge(tiny_base, tmp_path / "peft", tmp_path / "out")


def test_the_command_merges_and_says_what(llama: Base, tmp_path: Path) -> None:
    adapted(llama, configured("LOKR"), tmp_path / "peft")
    words = ["base", "merge", llama.folder, "--peft", tmp_path / "peft", "--out", tmp_path / "out", "--json"]
    row = json.loads(CliRunner().invoke(CLI, list(map(str, words)), catch_exceptions=False).stdout)
    assert row["digest"] == find_base(str(tmp_path / "out")).digest
    assert (row["peft_type"], row["head"]) == ("LOKR", None)
    assert row["adapter"] == hashlib.sha256((tmp_path / "peft" / WEIGHTS).read_bytes()).hexdigest()
    with refused(ConfigError, "peft_type", value="LOKR") as caught:
        from_peft(tmp_path / "peft", 1, ())
    assert "'edgeadapt base merge'" in str(caught.value)
