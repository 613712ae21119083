"""A language model with slots of every kind gives torch's logits with adapters of other methods than LoRA."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from peft import (
    AdaLoraConfig,
    BeftConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from aggregation.errors import ConfigError
from aggregation.pki.identity import IdentityKey
from client.inference.engine import GenerationEngine
from client.inference.generate import Generator
from client.inference.library import Library
from client.inference.text import SamplingParams
from edgeadapt.bases.base import Base
from edgeadapt.formats.graphinputs import to_inputs
from edgeadapt.formats.layout import Tensors
from edgeadapt.methods.bottleneck import BottleneckConfig
from edgeadapt.methods.peft.inputs import AdapterInputs
from export.bundle.base import resolved
from export.bundle.sources import fitted, from_peft
from export.bundle.write import add, write_bundle
from export.causal import export_causal
from export.onnx.exported import ExportedBase, Profile
from export.onnx.targets import ALL, SlotKind, Slots
from tests.export.causal.test_traced import continued
from tests.support import refused
from tests.support.exhaustive import few
from tests.support.methods import randomized

EVERY = Slots((ALL,), frozenset(SlotKind))
GPT2 = {"n_positions": 64, "num_key_value_heads": ..., "head_dim": ..., "intermediate_size": ...}
BASES: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {}, "gpt2": GPT2}  # the last is traced
FORWARD = {"llama": "down_proj", "qwen2": "down_proj", "gpt2": "mlp.c_proj"}
SCALED = {"llama": ["k_proj", "v_proj"], "qwen2": ["k_proj", "v_proj"], "gpt2": ["attn.c_attn"]}
NORMS = {"llama": ["input_layernorm", "model.norm"], "qwen2": ["post_attention_layernorm"], "gpt2": ["ln_1", "ln_f"]}


def methods(kind: str) -> dict[str, PeftConfig]:
    conv = {"fan_in_fan_out": kind == "gpt2"}
    ia3 = IA3Config(target_modules=[*SCALED[kind], FORWARD[kind]], feedforward_modules=[FORWARD[kind]], **conv)
    every: dict[str, Any] = {"target_modules": [*SCALED[kind], FORWARD[kind]]}
    found: dict[str, PeftConfig] = {
        "ia3": ia3,
        "norms": LNTuningConfig(target_modules=NORMS[kind]),
        "dora": LoraConfig(r=3, lora_alpha=5, use_dora=True, **every, **conv),
        "vera": VeraConfig(r=16, **every, **conv),
        "bottleneck": BottleneckConfig(peft_type="BOTTLENECK_GELU", r=3, **every),
        "bottleneck_relu": BottleneckConfig(peft_type="BOTTLENECK_RELU", r=2, **every),
        "bottleneck_swish": BottleneckConfig(peft_type="BOTTLENECK", r=4, **every),
        "adalora": AdaLoraConfig(init_r=6, target_r=3, lora_alpha=5, total_step=9, **every, **conv),
    }
    if kind == "gpt2":
        found["bitfit"] = LoraConfig(r=2, target_modules=["c_attn"], bias="all", lora_bias=True, **conv)
    else:
        found["loha"] = LoHaConfig(r=3, alpha=5, **every)
        found["beft"] = BeftConfig(target_modules=["up_proj", "q_proj"])
        found["lora"] = LoraConfig(r=3, target_modules=["v_proj", "up_proj"], lora_bias=True, bias="lora_only")
    return found


@pytest.fixture(scope="module", params=few(BASES, "llama"))
def family(request: pytest.FixtureRequest, make_lm: Any) -> tuple[str, Base, ExportedBase]:
    base = make_lm(request.param, **BASES[request.param])
    return request.param, base, export_causal(base, EVERY, Profile.FP32)


def trained(base: Base, config: PeftConfig, folder: Path) -> PeftModel:
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.folder), config).eval()
    randomized(model)
    model.save_pretrained(folder)
    return model


def inputs_of(folder: Path, base: Base, exported: ExportedBase) -> Tensors:
    origin = fitted(resolved(from_peft(folder, 1, ()), base), base.digest, exported.manifest.slots)
    return to_inputs(origin.tensors, AdapterInputs.of_tensors(origin.peft_config, origin.tensors).scaling)


def test_logits_are_torchs_with_every_method_and_without(
    family: tuple[str, Base, ExportedBase], tmp_path: Path, runner: Any, torch_logits: Any
) -> None:
    kind, base, exported = family
    tokens, side = np.random.default_rng(0).integers(3, 90, (2, 9)), runner(exported)
    for name, config in methods(kind).items():
        model = trained(base, config, tmp_path / name)
        expected, given = torch_logits(model, tokens), inputs_of(tmp_path / name, base, exported)
        for first in (None, 1):
            found = side.logits(tokens, given, first)
            np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max(), err_msg=name)
        bare = torch_logits(AutoModelForCausalLM.from_pretrained(base.folder).eval(), tokens)
        np.testing.assert_allclose(side.logits(tokens, {}, 4), bare, atol=1e-4)
        assert np.abs(bare - expected).max() > 0.1


def every_method_written(kind: str, base: Base, vendor: IdentityKey, folder: Path) -> dict[str, PeftModel]:
    """The models by method, of which the bundle ``lm`` in ``folder`` has an adapter each."""
    write_bundle(folder / "lm", export_causal(base, EVERY, Profile.FP32), [], key=vendor)
    (folder / "trust.pem").write_bytes(vendor.public.to_pem())
    models = {name: trained(base, config, folder / name) for name, config in methods(kind).items()}
    for name in models:
        add(folder / "lm", resolved(from_peft(folder / name, 1, ()), base), name=name, form="fp32", key=vendor)
    return models


@pytest.mark.parametrize("kind", few(["llama", "gpt2"], "llama"))
def test_genai_writes_torchs_text_with_every_method(
    make_lm: Any, vendor: IdentityKey, tmp_path: Path, kind: str
) -> None:
    models = every_method_written(kind, make_lm(kind, **BASES[kind]), vendor, tmp_path)
    library = Library.open(tmp_path / "lm", None)
    engine = GenerationEngine(library.base, 1)
    generator = Generator(library, engine, loaded=8, loaded_bytes=2**20)
    prompt, params = "turn on the light", SamplingParams(max_tokens=12)
    for name, model in models.items():
        assert "".join(generator.complete(prompt, params, name)) == continued(model, engine, prompt), name


def test_without_vectors_the_graph_is_as_before(llama: Base) -> None:
    graph = onnx.load_from_string(export_causal(llama, ("q_proj",), Profile.FP32).model)
    assert not {node.op_type for node in graph.graph.node} & {"Pad"}


def test_a_norm_that_is_not_in_the_graph_is_refused_by_name(make_lm: Any) -> None:
    base = make_lm("gemma", hidden_activation="gelu_pytorch_tanh")  # the graph stores the weights plus one
    with refused(ConfigError, "model.layers.0.input_layernorm.weight", value=0):
        export_causal(base, Slots((), frozenset({SlotKind.NORMS})), Profile.FP32)
