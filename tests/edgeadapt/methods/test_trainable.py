"""What peft builds of a checked configuration: of which modules, with which first values, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    DistilBertConfig,
    ModernBertConfig,
    MPNetConfig,
    Phi3Config,
    PhiConfig,
)

from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base
from edgeadapt.formats.peftconfig import TRAINABLE, MethodName, PeftConfig
from edgeadapt.methods import causal, classifier
from edgeadapt.methods.trainable import adapted, configuration, initial
from tests.support import refused
from tests.support.models import llama, make_lm

__all__ = ["llama", "make_lm"]  # fixtures
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize(
    ("method", "bert", "decoder"),
    [
        ("lora", ("query", "value"), ("q_proj", "v_proj")),
        ("rslora", ("query", "value"), ("q_proj", "v_proj")),
        ("dora", ("query", "value"), ("q_proj", "v_proj")),
        ("adalora", ("query", "value"), ("q_proj", "v_proj")),
        ("loha", ("query", "value"), ("q_proj", "v_proj")),
        ("vera", ("query", "value"), ("q_proj", "v_proj")),
        ("ia3", ("key", "value", "output.dense"), ("k_proj", "v_proj", "down_proj")),
        ("ln_tuning", ("LayerNorm",), ("input_layernorm", "norm", "post_attention_layernorm")),
        ("beft", ("value",), ("v_proj",)),
    ],
)
def test_without_targets_an_adapter_is_at_the_modules_that_peft_names(
    tiny_base: Base, llama: Base, method: MethodName, bert: tuple[str, ...], decoder: tuple[str, ...]
) -> None:
    assert configuration(tiny_base, method).target_modules == bert
    assert configuration(llama, method).target_modules == decoder


def test_the_feedforward_modules_are_those_of_peft_unless_targets_are_named(llama: Base) -> None:
    assert configuration(llama, "ia3").feedforward_modules == ("down_proj",)
    assert configuration(llama, "ia3", targets=["k_proj"]).feedforward_modules == ()
    named = configuration(llama, "ia3", targets=["k_proj", "up_proj"], feedforward=["up_proj"])
    assert named.feedforward_modules == ("up_proj",)


@pytest.mark.parametrize(
    ("method", "settings", "about"),
    [
        ("ia3", {"targets": ["k_proj"], "feedforward": ["down_proj"]}, "feedforward_modules"),
        ("lora", {"feedforward": ["q_proj"]}, "feedforward_modules"),
        ("prompt_tuning", {"targets": ["q_proj"]}, "target_modules"),
        ("prefix_tuning", {"virtual_tokens": 0}, "num_virtual_tokens"),
        ("lora", {"rank": 0}, "r"),
    ],
)
def test_settings_of_another_method_are_refused(
    llama: Base, method: MethodName, settings: dict[str, Any], about: str
) -> None:
    with refused(ConfigError, about):
        configuration(llama, method, **settings)


def test_a_base_for_which_peft_names_no_modules_needs_targets(llama: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeadapt.methods.trainable.NAMED", {"BEFT": {}})
    with refused(ConfigError, "target_modules"):
        configuration(llama, "beft")
    assert configuration(llama, "beft", targets=["q_proj"]).target_modules == ("q_proj",)


def test_lora_is_at_queries_and_values_where_peft_names_no_modules(
    tiny_base: Base, llama: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeadapt.methods.trainable.NAMED", {"LORA": {}})
    assert configuration(tiny_base).target_modules == ("query", "value")
    assert configuration(llama).target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (AlbertConfig(pad_token_id=0, **SMALL), ("query", "value")),
        (DistilBertConfig(pad_token_id=0, **SMALL), ("q_lin", "v_lin")),
        (MPNetConfig(pad_token_id=0, **SMALL), ("q", "v")),
        (ModernBertConfig(pad_token_id=0, **SMALL), ("Wqkv",)),
        (Phi3Config(pad_token_id=0, **SMALL), ("qkv_proj",)),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_common_bases_need_no_targets(config: Any, names: tuple[str, ...], tmp_path: Path) -> None:
    config.vocab_size = 32
    AutoModel.from_config(config).save_pretrained(tmp_path)
    assert configuration(Base(tmp_path, "")).target_modules == names


@pytest.mark.parametrize(
    "method", ["lora", "dora", "adalora", "loha", "vera", "ia3", "ln_tuning", "beft", "bottleneck"]
)
def test_the_first_adapter_changes_nothing(llama: Base, method: MethodName) -> None:
    model = causal.build(llama, configuration(llama, method))
    causal.load(model, initial(model, torch.Generator().manual_seed(1)))
    with torch.no_grad(), model.disable_adapter():
        plain = model(input_ids=IDS).logits
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_virtual_tokens_begin_as_tokens_of_the_vocabulary(llama: Base, method: MethodName) -> None:
    """So that a text is answered as after these very tokens."""
    model = causal.build(llama, configuration(llama, method, virtual_tokens=3))
    one, same, other = (initial(model, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not all(np.array_equal(one[name], other[name]) for name in one)
    causal.load(model, one)
    base = model.get_base_model()
    drawn = torch.randint(
        base.get_input_embeddings().num_embeddings, (1, 3), generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        found = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]
        expected = base(input_ids=torch.cat([drawn, IDS], 1)).logits[:, 3:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def config_at(kind: Any, targets: tuple[str, ...]) -> PeftConfig:
    """A configuration with these targets, and else one that can be trained."""
    rank, alpha = (2 if name in TRAINABLE[kind] else 0 for name in ("r", "lora_alpha"))
    return PeftConfig(kind, rank, alpha, targets)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        *(("LORA", "embed_tokens"), ("IA3", "embed_tokens"), ("BEFT", "embed_tokens"), ("LN_TUNING", "embed_tokens")),
        *(("ADALORA", "embed_tokens"), ("LOHA", "embed_tokens"), ("VERA", "embed_tokens"), ("VERA", "norm")),
        *(("LORA", "norm"), ("IA3", "mlp"), ("BEFT", "norm"), ("LN_TUNING", "q_proj"), ("LN_TUNING", "layers")),
        *(("IA3", "nothing"), ("LN_TUNING", ""), ("BOTTLENECK", "embed_tokens"), ("BOTTLENECK_RELU", "mlp")),
    ],
)
def test_a_target_of_another_kind_than_the_method_adapts_is_refused(llama: Base, kind: Any, target: str) -> None:
    with refused(ConfigError, "target_modules"):
        causal.build(llama, config_at(kind, (target,)))


@pytest.mark.parametrize("method", ["adalora", "loha", "vera", "ia3", "beft", "bottleneck"])
def test_no_method_adapts_the_layer_with_a_row_for_each_token(make_lm: Any, method: MethodName) -> None:
    base = make_lm(tie_word_embeddings=False)
    model = causal.build(base, configuration(base, method, targets=["q_proj", "lm_head"]))
    with refused(ConfigError, "target_modules"):
        causal.require_private(model)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_bias_with_a_number_for_each_token_is_not_trained(bias: Any, tmp_path: Path) -> None:
    config = PhiConfig(vocab_size=32, pad_token_id=0, **SMALL)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = causal.build(Base(tmp_path, ""), configuration(Base(tmp_path, ""), targets=["q_proj"], bias=bias))
    trained = {name for name, value in model.named_parameters() if value.requires_grad and "lora_" not in name}
    if bias == "lora_only":
        assert trained == {"base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"}
        causal.require_private(model)
    else:
        with refused(ConfigError, "bias"):
            causal.require_private(model)


def test_a_classifier_has_no_virtual_tokens(tiny_base: Base) -> None:
    with refused(ConfigError, "num_virtual_tokens"):
        classifier.build(tiny_base, 2, configuration(tiny_base, "prompt_tuning"))


def test_what_p_tuning_saved_goes_on_as_prompt_tuning(llama: Base) -> None:
    config = PeftConfig("P_TUNING", 0, 0, (), num_virtual_tokens=2)
    model = adapted(pretrained.load(llama, AutoModelForCausalLM), config, task="CAUSAL_LM")
    trained = [value for value in model.parameters() if value.requires_grad]
    assert [tuple(value.shape) for value in trained] == [
        tuple(get_peft_model_state_dict(model)["prompt_embeddings"].shape)
    ]
