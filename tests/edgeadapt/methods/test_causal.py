"""A causal language model with a fresh adapter: frozen except LoRA, and equal to the base while B is zero."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from aggregation.errors import ConfigError
from edgeadapt.bases.base import Base
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.causal import LORA, build, load, tensors
from tests.support import refused


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return Base(folder, "0" * 64)


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        answer: np.ndarray = model(input_ids=torch.arange(12)[None]).logits.numpy()
    return answer


def test_only_the_adapter_is_trained_and_it_changes_nothing_yet(base: Base) -> None:
    model = build(base, PeftConfig.lora(rank=3, targets=("q_proj", "down_proj")))
    trained = sorted(name for name, value in model.named_parameters() if value.requires_grad)
    assert len(trained) == 2 * 2 * 2
    assert all(".lora_" in name for name in trained)
    with model.disable_adapter():
        bare = logits(model)
    np.testing.assert_array_equal(logits(model), bare)


def test_tensors_have_the_names_of_peft_and_come_back_through_load(base: Base) -> None:
    model, rng = build(base, LORA), np.random.default_rng(0)
    values = {name: rng.standard_normal(v.shape, dtype=np.float32) for name, v in tensors(model).items()}
    assert values["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (8, 32)
    assert values["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"].shape == (16, 8)
    before = logits(model)
    load(model, values)
    for name, value in tensors(model).items():
        np.testing.assert_array_equal(value, values[name])
    assert np.abs(logits(model) - before).max() > 0.01


def test_an_unknown_target_is_refused(base: Base) -> None:
    with refused(ConfigError, "target_modules"):
        build(base, PeftConfig.lora(targets=("query",)))


def test_a_folder_without_a_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with refused(ConfigError, "base"):
        build(Base(tmp_path, "0" * 64))
