"""Adapters of every method of peft that has slots, and a base with slots of every kind: fixtures for conftest files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from peft import (
    AdaLoraConfig,
    BeftConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForSequenceClassification

from edgeadapt.bases.base import Base
from edgeadapt.methods.bottleneck import BottleneckConfig
from tests.support.models import LABELS
from tests.support.recipes import CLI, SIZES, bare

Trained = Callable[[str], tuple[PeftModel, Path]]
TARGETS = ["query", "output.dense"]
METHODS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, target_modules=TARGETS),
    "lora-bias": LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, lora_bias=True),
    "bitfit": LoraConfig(r=2, target_modules=["pooler.dense"], bias="all"),
    "lora-only": LoraConfig(r=2, target_modules=TARGETS, bias="lora_only", use_rslora=True),
    "dora": LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, use_dora=True),
    "dora-bias": LoraConfig(r=2, target_modules=TARGETS, use_dora=True, bias="all"),
    "adalora": AdaLoraConfig(init_r=6, target_r=3, lora_alpha=5, target_modules=TARGETS, total_step=9),
    "loha": LoHaConfig(r=3, alpha=5, target_modules=TARGETS, alpha_pattern={"query": 2}, rank_pattern={"query": 2}),
    "vera": VeraConfig(r=20, target_modules=["query", "attention.output.dense", "intermediate.dense"]),
    "ia3": IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
    "ia3-pooler": IA3Config(
        target_modules=["pooler.dense", "intermediate.dense"], feedforward_modules=["pooler.dense"]
    ),
    "norms": LNTuningConfig(target_modules=["LayerNorm"]),
    "beft": BeftConfig(target_modules=["query", "intermediate.dense"]),
    "bottleneck": BottleneckConfig(peft_type="BOTTLENECK_GELU", r=3, target_modules=["output.dense", "pooler.dense"]),
    "prompt": PromptTuningConfig(num_virtual_tokens=5),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16),
}
BECOME_LORA = ("adalora", "loha", "vera")  # what comes back is an equal LoRA adapter
for method in METHODS.values():
    method.task_type = "SEQ_CLS"


def randomized(model: PeftModel) -> None:
    """Random values for what the adapter of ``model`` trains, some of them 0."""
    rng, which = np.random.default_rng(4), getattr(model.active_peft_config, "bias", "none")
    for key, value in model.named_parameters():
        bias = key.endswith({"all": ".bias", "lora_only": ".base_layer.bias"}.get(which, "-"))
        if "magnitude" in key:
            drawn = value.detach().numpy() * rng.normal(1.0, 0.4, value.shape)
        elif bias or any(
            part in key for part in ("lora_", "modules_to_save", "beft_", "hada_", "vera_", "prompt_", "neck_")
        ):
            drawn = rng.normal(0.0, 0.3, value.shape)
        elif "ia3_l" in key or "ln_tuning_layers" in key:
            drawn = rng.normal(1.0, 0.5, value.shape) * (rng.random(value.shape) > 0.1)
        else:
            continue
        if "ranknum" not in key:
            value.data = value.data.new_tensor(drawn)


@pytest.fixture(scope="session")
def every_method_base(tmp_path_factory: pytest.TempPathFactory, tiny_base: Base) -> Base:
    sizes = SIZES | {"num_hidden_layers": 1}  # a graph with slots of every kind takes 20 s to trace with two
    return bare(tmp_path_factory.mktemp("base"), tiny_base, "bert", sizes)


@pytest.fixture(scope="session")
def every_method(every_method_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Makes an adapter of a method, with random values, and the folder that peft saves of it."""

    def make(name: str) -> tuple[PeftModel, Path]:
        inner = AutoModelForSequenceClassification.from_pretrained(every_method_base.folder, num_labels=len(LABELS))
        model = get_peft_model(inner, METHODS[name]).eval()
        randomized(model)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        return model, folder

    return make


@pytest.fixture(scope="session")
def every_slot(every_method_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a base with slots of every kind at every layer, without an adapter."""
    folder = tmp_path_factory.mktemp("whole")
    words = [
        *("bundle", "key", str(folder / "key.pem")),
        *(
            "bundle",
            "make",
            "--base",
            str(every_method_base.folder),
            "--head",
            "own",
            "--profile",
            "fp32",
            "--targets",
            "all-linear",
        ),
        *(
            "--slots",
            "low-rank,scale,input-scale,offset,norms,biases,prompt,bottleneck-gelu",
            "--bundle",
            str(folder / "bundle"),
        ),
        *("--key", str(folder / "key.pem")),
    ]
    for command in (words[:3], words[3:]):
        done = CliRunner().invoke(CLI, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    (folder / "trust.pem").write_bytes((folder / "key.pub.pem").read_bytes())
    (folder / "labels").write_text("\n".join(LABELS))
    return folder


FIXTURES = {name: value for name, value in globals().items() if isinstance(value, type(every_slot))}
