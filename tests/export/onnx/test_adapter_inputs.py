"""The inputs of a PEFT model's adapter: every adapted layer with its scaling, or a refusal that names the cause."""

from typing import Any

import pytest
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel

from aggregation.errors import ConfigError
from edgeadapt.bases.base import Base
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.classifier import PhraseClassifier, build
from export.onnx.peftmodel import find_adapter_inputs
from tests.support import refused

QUERY = "encoder.encoder.layer.{}.attention.self.query"


def classifier(base: Base) -> PhraseClassifier:
    return PhraseClassifier(AutoModel.from_pretrained(base.folder), 4)


def with_lora(base: Base, **settings: Any) -> PeftModel:
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["query"], "modules_to_save": ["classifier"]}
    return get_peft_model(classifier(base), LoraConfig(**(defaults | settings)))


def test_every_adapted_layer_and_the_head_have_inputs(tiny_base: Base) -> None:
    inputs = find_adapter_inputs(build(tiny_base, 4, PeftConfig.lora(rank=4, alpha=8)))
    assert [slot.path.rpartition(".")[2] for slot in inputs.loras] == ["query", "value"] * 2
    assert [slot.path for slot in inputs.saved] == ["classifier"]
    assert inputs.names[0] == QUERY.format(0) + ".lora_A.weight"
    assert inputs.names[-2:] == ("classifier.weight", "classifier.bias")


def test_each_layer_has_its_own_scaling_under_rank_and_alpha_patterns(tiny_base: Base) -> None:
    model = with_lora(
        tiny_base, rank_pattern={r"layer\.0.*query": 2}, alpha_pattern={r"layer\.1.*query": 32}, use_rslora=False
    )
    assert find_adapter_inputs(model).scaling == {QUERY.format(0): 8 / 2, QUERY.format(1): 32 / 4}


def test_rank_stabilized_scaling_is_honored(tiny_base: Base) -> None:
    assert find_adapter_inputs(with_lora(tiny_base, use_rslora=True)).scaling[QUERY.format(0)] == 8 / 4**0.5


@pytest.mark.parametrize(
    ("settings", "about"),
    [
        ({"use_dora": True}, "Dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_modules": ["word_embeddings"]}, "Embedding"),
        ({"trainable_token_indices": {"word_embeddings": [1, 2]}}, "TrainableTokensWrapper"),
        ({"bias": "all"}, "classifier.modules_to_save.bias"),
    ],
)
def test_a_setting_that_a_graph_cannot_express_is_refused_by_name(
    tiny_base: Base, settings: dict[str, Any], about: str
) -> None:
    with refused(ConfigError, about) as caught:
        find_adapter_inputs(with_lora(tiny_base, **settings))
    assert about in str(caught.value)


def test_a_method_other_than_lora_is_refused_by_name(tiny_base: Base) -> None:
    config = IA3Config(target_modules=["query"], feedforward_modules=[])
    with refused(ConfigError, "ia3.layer"):
        find_adapter_inputs(get_peft_model(classifier(tiny_base), config))


def test_a_merged_adapter_is_refused(tiny_base: Base) -> None:
    model = with_lora(tiny_base)
    model.merge_adapter()
    with refused(ConfigError, "merged", value=QUERY.format(0)):
        find_adapter_inputs(model)


def test_two_active_adapters_are_refused(tiny_base: Base) -> None:
    model = with_lora(tiny_base, modules_to_save=None)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["query"]))
    model.base_model.set_adapter(["default", "second"])
    with refused(ConfigError, "active_adapters", value=2):
        find_adapter_inputs(model)
