"""docs/reference/architectures.md states what happens to each architecture: this file exports each, and compares.

Every base is tiny and random, every linear layer has a slot, and windows are shorter than the texts. "exact" means that
torch and ONNX Runtime give equal logits up to ``CLOSE``, without an adapter and with one, with and without the cache.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from adapters import pretrained
from adapters.base import Base, find_base
from adapters.causal import build, load, tensors
from adapters.classifier import LoraSpec
from adapters.graphinputs import to_inputs
from aggregation.errors import ConfigError
from export.causal import export_causal, traced
from export.onnx.classifier import export_classifier
from export.onnx.exported import Profile
from export.onnx.peftmodel import find_adapter_inputs
from export.onnx.slotted import with_own_head
from export.onnx.targets import ALL

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "architectures.md"
CLOSE = 2e-5  # of the largest logit
# In place of CLOSE: with the random adapter, float32 is off by 4e-5 from double precision here, and by 1.4e-5 in torch.
LOOSE = {"gpt_oss": 1e-4}
LENGTH, FIRST = 20, 7  # tokens of a text, and how many of them are read at once
ONE, TWO = {"num_hidden_layers": 1}, {"num_hidden_layers": 2}
WINDOW = TWO | {"sliding_window": 4}
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = ONE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4}
GENERATION: dict[str, dict[str, Any]] = {  # keys of the configuration that differ from ``make_lm``'s
    "apertus": ONE,
    "arcee": ONE,
    "biogpt": ONE,
    "bitnet": ONE,
    "bloom": ONE,
    "codegen": ONE | {"rotary_dim": 8},
    "cohere": ONE,
    "cohere2": MIXED,
    "ctrl": ONE | {"dff": 96},
    "ernie4_5": ONE,
    "exaone": ONE,
    "exaone4": MIXED,
    "falcon": ONE | {"head_dim": ...},
    "gemma": ONE,
    "gemma2": WINDOW,
    "gemma3_text": MIXED,
    "glm": ONE,
    "glm4": ONE,
    "gpt2": ONE,
    "gpt_bigcode": ONE,
    "gpt_neo": ONE | {"attention_types": [[["local"], 1]], "window_size": 4},
    "gpt_neox": ONE | {"num_key_value_heads": 4},
    "gpt_oss": WINDOW | LOCAL_EXPERTS,
    "gptj": ONE | {"rotary_dim": 8},
    "granite": ONE,
    "granitemoe": ONE,
    "helium": ONE,
    "hunyuan_v1_dense": ONE,
    "jamba": ONE,
    "lfm2": TWO | {"layer_types": ["conv", "full_attention"]},
    "llama": ONE,
    "mamba": ONE,
    "mistral": WINDOW,
    "mixtral": WINDOW,
    "mpt": {"d_model": 64, "n_layers": 1, "n_heads": 4, "max_seq_len": 64},
    "nemotron": ONE,
    "olmo": ONE,
    "olmo2": ONE,
    "olmo3": MIXED,
    "olmoe": EXPERTS,
    "opt": ONE | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "persimmon": ONE,
    "phi": ONE,
    "phi3": ONE,
    "phimoe": ONE | LOCAL_EXPERTS,
    "qwen2": ONE,
    "qwen2_moe": EXPERTS,
    "qwen3": ONE,
    "qwen3_moe": EXPERTS,
    "qwen3_next": ONE,
    "smollm3": ONE,
    "stablelm": ONE,
    "starcoder2": WINDOW,
    "xglm": ONE | {"ffn_dim": 96},
}


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
CLASSIFICATION: dict[str, dict[str, Any]] = {  # the same, of classifiers, instead of ``SMALL`` where it is not added
    "albert": SMALL | {"embedding_size": 16},
    "bert": SMALL,
    "big_bird": SMALL | {"attention_type": "original_full"},
    "camembert": SMALL,
    "convbert": SMALL | {"embedding_size": 32, "num_groups": 1, "head_ratio": 2},
    "data2vec-text": SMALL,
    "deberta": SMALL,
    "deberta-v2": SMALL,
    "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40},
    "electra": SMALL | {"embedding_size": 16},
    "ernie": SMALL,
    "fnet": SMALL,
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40, "pad_token_id": 0},
    "ibert": SMALL,
    "llama": SMALL,
    "longformer": SMALL | {"attention_window": [8]},
    "megatron-bert": SMALL,
    "mobilebert": SMALL | {"embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16},
    "modernbert": SMALL | {"num_hidden_layers": 2, "local_attention": 8},
    "mpnet": SMALL | {"pad_token_id": 1},
    "qwen2": SMALL | {"num_key_value_heads": 2},
    "qwen3": SMALL | {"num_key_value_heads": 2, "head_dim": 8},
    "rembert": SMALL | {"input_embedding_size": 16, "output_embedding_size": 16},
    "roberta": SMALL,
    "roberta-prelayernorm": SMALL,
    "roformer": SMALL | {"embedding_size": 32},
    "squeezebert": SMALL | {"embedding_size": 32},
    "xlm-roberta": SMALL,
    "xlm-roberta-xl": SMALL,
}


def rows(heading: str) -> dict[str, list[str]]:
    """The table under ``heading``: architecture → the other cells."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in re.findall(r"^\| `.*$", section, re.M)
    ]
    return {name: rest for name, *rest in cells}


def generated(base: Base, runner: Any, torch_logits: Any) -> list[str]:
    """The path that the base took, and how its logits compare with torch's."""
    took = []
    with pytest.MonkeyPatch.context() as patch:
        build_traced = traced.build
        patch.setattr(traced, "build", lambda *given: took.append("traced") or build_traced(*given))
        try:
            exported = export_causal(base, [ALL], Profile.FP32)
        except ConfigError as error:
            return ["refused", error.about]
    paths = tuple(name.removesuffix(".lora_A.weight") for name in exported.slots if name.endswith(".lora_A.weight"))
    model, side = build(base, LoraSpec(rank=3, alpha=5, targets=paths)), runner(exported)
    rng = np.random.default_rng(0)
    load(model, {n: 0.3 * rng.standard_normal(v.shape, dtype=np.float32) for n, v in tensors(model).items()})
    tokens = rng.integers(3, 90, (2, LENGTH))
    inputs = to_inputs(tensors(model), find_adapter_inputs(model).scaling)
    expected = torch_logits(model, tokens)
    with model.disable_adapter():
        bare = torch_logits(model, tokens)
    assert set(inputs) == set(exported.slots)
    worst = max(
        np.abs(side.logits(tokens, given, first) - logits).max() / np.abs(logits).max()
        for given, logits in (({}, bare), (inputs, expected))
        for first in (None, FIRST)
    )
    assert np.abs(expected - bare).max() > CLOSE * np.abs(bare).max()
    close = LOOSE.get(pretrained.configuration(base).model_type, CLOSE)
    return ["".join(took) or "builder", "exact" if worst <= close else f"off by {worst:.0e}"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", GENERATION)
def test_a_language_model_is_exported_as_the_page_says(
    make_lm: Callable[..., Base], runner: Any, torch_logits: Any, kind: str
) -> None:
    assert generated(make_lm(kind, **GENERATION[kind]), runner, torch_logits) == rows("Language models")[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSIFICATION)
def test_a_classifier_is_exported_as_the_page_says(tmp_path: Path, tiny_base: Base, runner: Any, kind: str) -> None:
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(kind, vocab_size=75, num_labels=3, **CLASSIFICATION[kind])
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tiny_base.folder / "tokenizer.json").read_bytes())
    assert classified(find_base(str(tmp_path)), runner) == rows("Classifiers")[kind]


def classified(base: Base, runner: Any) -> list[str]:
    """How the logits of the base's own head compare with torch's, with an adapter on every linear layer."""
    try:
        slotted = with_own_head(base, [ALL])
        exported = export_classifier(slotted, base, Profile.FP32)
    except ConfigError as error:
        return [f"refused: {error.about}"]
    layers, heads = [slot.path for slot in slotted.inputs.loras], [slot.path for slot in slotted.inputs.saved]
    model = get_peft_model(
        copy.deepcopy(slotted.model), LoraConfig(target_modules=layers, modules_to_save=heads)
    ).eval()
    rng = np.random.default_rng(0)
    load(model, {n: 0.3 * rng.standard_normal(v.shape, dtype=np.float32) for n, v in tensors(model).items()})
    inputs = to_inputs(tensors(model), exported.adapter_inputs.scaling)
    tokens = rng.integers(4, 75, (1, LENGTH))
    with torch.no_grad():  # in double precision: float32 of random weights is sometimes less exact than the graph's
        ids = torch.from_numpy(tokens)
        expected = model.double()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()
    found = runner(exported).session.run(
        ["logits"], {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **inputs}
    )[0]
    worst = np.abs(found - expected).max() / np.abs(expected).max()
    return ["exact"] if worst <= CLOSE else [f"off by {worst:.0e}"]


def test_the_page_lists_what_is_compared() -> None:
    assert list(rows("Language models")) == list(GENERATION)
    assert list(rows("Classifiers")) == list(CLASSIFICATION)
