"""From a folder of peft to a device's answer with one command, for the recipes that people use: torch's answer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from client.learning.learner import Learner
from client.training.corrections import Correction
from edgeadapt.bases.base import Base
from edgeadapt.formats.bundle import BASE_MANIFEST
from edgeadapt.formats.graphinputs import LORA_A
from edgeadapt.formats.manifest import BaseManifest
from export.onnx.targets import linear_layers
from tests.support.exhaustive import few
from tests.support.models import LABELS, MakeLm
from tests.support.recipes import SIZES, TEXTS, bare, by_torch, infer, trained

Run = Callable[..., Any]
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 24}
LLAMA = SIZES | {"num_key_value_heads": 2}
RECIPES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # architecture, its configuration, and a LoraConfig's
    ("bert", SIZES, {"target_modules": ["query", "value"]}),
    ("bert", SIZES, {"target_modules": "all-linear", "alpha_pattern": {r"layer\.1.*dense": 20}}),
    ("distilbert", DISTILBERT, {"target_modules": ["q_lin", "v_lin"]}),
    ("roberta", SIZES, {"target_modules": r".*layer\.1.*(query|value)", "use_rslora": True}),
    ("electra", SIZES | {"embedding_size": 16}, {"target_modules": ["query", "dense"]}),
    ("deberta-v2", SIZES, {"target_modules": ["query_proj"], "modules_to_save": ["classifier", "pooler"]}),
    ("modernbert", SIZES, {"target_modules": ["Wqkv"], "modules_to_save": ["classifier", "head"]}),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "pad_token_id": 0}, {}),
    ("llama", LLAMA, {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 3}}),
]


@pytest.mark.parametrize("recipe", few(RECIPES, RECIPES[0]), ids=lambda recipe: recipe[0])
def test_an_adapter_on_a_bare_encoder_brings_its_head(
    export: Run, key: Path, tmp_path: Path, tiny_base: Base, recipe: tuple[str, dict[str, Any], dict[str, Any]]
) -> None:
    kind, sizes, settings = recipe
    base = bare(tmp_path / "base", tiny_base, kind, sizes)
    inner = AutoModelForSequenceClassification.from_pretrained(base.folder, num_labels=len(LABELS))
    model = trained(inner, tmp_path / "lora", task_type="SEQ_CLS", **settings)
    (tmp_path / "labels").write_text("\n".join(LABELS))
    made = ("add", "--peft", tmp_path / "lora", "--base", base.folder, "--labels", tmp_path / "labels")
    bundle = tmp_path / "bundle"
    done = export(*made, "--profile", "fp32", "--format", "fp32", "--bundle", bundle, "--key", key)
    assert done.code == 0, done.err
    for found, expected in zip(infer(bundle, *TEXTS), by_torch(model, base, TEXTS), strict=True):
        assert found == pytest.approx(expected, abs=2e-5)
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    gate = ("check", "--bundle", bundle, "--base", base.folder, "--peft", tmp_path / "lora")
    assert export(*gate, "--texts", tmp_path / "texts").code == 0
    with Learner.open(bundle) as learner:
        taught = learner.teach([Correction(TEXTS[0], LABELS[-1])]).taught
    assert [answer.after.label for answer in taught] == [LABELS[-1]]


def test_a_bare_encoder_that_lacks_more_than_the_adapter_brings_is_refused(
    export: Run, key: Path, tmp_path: Path, tiny_base: Base
) -> None:
    folder = tmp_path / "base"
    model = AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=75, **SIZES), add_pooling_layer=False)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((tiny_base.folder / "tokenizer.json").read_bytes())
    inner = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS))
    trained(inner, tmp_path / "lora", task_type="SEQ_CLS", target_modules=["query"])
    made = ("make", "--peft", tmp_path / "lora", "--base", folder, "--bundle", tmp_path / "bundle", "--key", key)
    done = export(*made)
    done.refused(2, "model.safetensors")
    assert "bert.pooler.dense.bias" in done.err
    trained(inner, tmp_path / "both", task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["pooler"])
    done = export("make", "--peft", tmp_path / "both", *made[3:])
    assert done.code == 0, done.err


LANGUAGE: list[dict[str, Any]] = [
    {"target_modules": "all-linear", "rank_pattern": {r"layers\.0.*v_proj": 70}, "alpha_pattern": {"up_proj": 3}},
    {"target_modules": r".*\.(k|o)_proj", "layers_to_transform": None},
    {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
]


@pytest.mark.parametrize("settings", few(LANGUAGE, LANGUAGE[0]))
def test_a_base_gets_the_layers_and_the_rank_of_a_peft_folder(
    export: Run, key: Path, tmp_path: Path, llama: Base, settings: dict[str, Any]
) -> None:
    inner = AutoModelForCausalLM.from_pretrained(llama.folder)
    model = trained(inner, tmp_path / "lora", task_type="CAUSAL_LM", **settings)
    bundle = tmp_path / "bundle"
    made = ("add", "--peft", tmp_path / "lora", "--base", llama.folder, "--bundle", bundle, "--key", key)
    done = export(*made, "--profile", "fp32", "--format", "fp32")
    assert done.code == 0, done.err
    adapted = {
        name.partition(".lora_A")[0] for name, _ in model.base_model.model.named_parameters() if "lora_A" in name
    }
    manifest = BaseManifest.unverified((bundle / BASE_MANIFEST).read_bytes())
    assert {name.removesuffix(LORA_A) for name in manifest.slots if name.endswith(LORA_A)} == adapted
    assert manifest.max_rank == (70 if "rank_pattern" in settings else 64)
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    gate = ("check", "--bundle", bundle, "--base", llama.folder, "--peft", tmp_path / "lora", "--json")
    found = export(*gate, "--texts", tmp_path / "texts").json()
    assert found["agreement"] == 1.0
    assert found["loss"] == pytest.approx(found["torch_loss"], abs=1e-5)


@pytest.mark.parametrize("tied", few([True, False], True))
def test_an_adapter_on_the_output_layer_leaves_the_embedding_as_it_is(
    export: Run, key: Path, tmp_path: Path, make_lm: MakeLm, tied: bool
) -> None:
    base, lora, bundle = make_lm("llama", tie_word_embeddings=tied), tmp_path / "lora", tmp_path / "bundle"
    inner = AutoModelForCausalLM.from_pretrained(base.folder)
    model = trained(inner, lora, task_type="CAUSAL_LM", target_modules=["lm_head", "q_proj"])
    model.save_pretrained(lora, save_embedding_layers=False)
    made = ("add", "--peft", lora, "--base", base.folder, "--bundle", bundle, "--key", key)
    done = export(*made, "--profile", "fp32", "--format", "fp32")
    assert done.code == 0, done.err
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    gate = ("check", "--bundle", bundle, "--base", base.folder, "--peft", lora, "--texts", tmp_path / "texts")
    found = export(*gate, "--json").json()
    assert found["agreement"] == 1.0
    assert found["loss"] == pytest.approx(found["torch_loss"], abs=1e-5)


def test_a_refusal_names_every_layer_that_has_no_slot(export: Run, key: Path, tmp_path: Path, llama: Base) -> None:
    bundle = tmp_path / "bundle"
    done = export("make", "--base", llama.folder, "--targets", "q_proj", "--bundle", bundle, "--key", key)
    assert done.code == 0, done.err
    inner = AutoModelForCausalLM.from_pretrained(llama.folder)
    trained(inner, tmp_path / "lora", task_type="CAUSAL_LM", target_modules="all-linear")
    done = export("add", "--peft", tmp_path / "lora", "--bundle", bundle, "--key", key)
    done.refused(5, "model.layers.0.mlp.down_proj.lora_A.weight")
    assert "down_proj, gate_proj, k_proj, o_proj, up_proj, v_proj (12 layers" in done.err
    done = export("make", "--base", llama.folder, "--targets", "q_proj,wq,wv", "--bundle", tmp_path / "b", "--key", key)
    done.refused(2, "--targets")
    assert "wq, wv" in done.err


@pytest.mark.parametrize(
    ("targets", "layers"),
    [("all-linear", 14), (r".*layers\.1\..*(q|v)_proj", 2), ("model.layers.0.mlp.up_proj", 1), ("lm_head", 1)],
)
def test_targets_are_names_paths_patterns_or_all_linear(llama: Base, targets: str, layers: int) -> None:
    assert len(linear_layers(AutoModelForCausalLM.from_pretrained(llama.folder), [targets])) == layers


def test_options_that_contradict_the_adapter_or_the_bundle_are_refused(
    export: Run, key: Path, tmp_path: Path, llama: Base, tiny_base: Base
) -> None:
    inner = AutoModelForCausalLM.from_pretrained(llama.folder)
    trained(inner, tmp_path / "lora", task_type="CAUSAL_LM", target_modules=["q_proj"])
    new, lora = tmp_path / "new", ("--peft", tmp_path / "lora")
    base = ("make", "--base", llama.folder, *lora, "--bundle", new, "--key", key)
    export(*base, "--task", "text-classification").refused(2, "--task")
    export(*base, "--max-rank", "3").refused(2, "--max-rank")
    adapter = ("add", *lora, "--bundle", new, "--key", key)
    export(*adapter, "--profile", "fp32").refused(2, "--profile")
    assert not new.exists()
    assert export(*adapter, "--base", llama.folder).code == 0
    export(*adapter, "--base", llama.folder, "--profile", "fp32").refused(2, "--base")
    export(*adapter, "--base", tiny_base.folder).refused(2, "--base")
    assert export(*adapter, "--base", llama.folder, "--version", "2").code == 0
