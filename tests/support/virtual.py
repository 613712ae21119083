"""Language models with virtual tokens: peft's, the folders that it saves, and a bundle of their base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from aggregation.pki.identity import IdentityKey
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base
from export.bundle.sources import Origin, from_peft
from export.bundle.write import add, write_bundle
from export.causal import export_causal
from export.onnx.exported import ExportedBase, Profile
from export.onnx.targets import SlotKind, Slots

KINDS = frozenset({SlotKind.LOW_RANK, SlotKind.PROMPT, SlotKind.PREFIX})
METHODS: dict[str, Callable[[], PeftConfig]] = {
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "p-tuning": lambda: PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=16, encoder_reparameterization_type="LSTM", task_type="CAUSAL_LM"
    ),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "projected": lambda: PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16, task_type="CAUSAL_LM"
    ),
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


def trained(base: Base, name: str, folder: Path, config: PeftConfig | None = None) -> PeftModel:
    """A model with random values in place of trained ones, saved by peft and opened again."""
    model = get_peft_model(pretrained.load(base, AutoModelForCausalLM), config or METHODS[name]())
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "prompt_encoder" in key or "lora_" in key:
                value.copy_(0.4 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder)
    return opened(base, folder)


def opened(base: Base, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(pretrained.load(base, AutoModelForCausalLM), folder).eval()


def logits(model: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    """Of the text's own tokens, as peft computes them."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        answer = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    found: np.ndarray[Any, Any] = answer[:, -len(ids) :].numpy()
    return found


def greedy(model: Any, prompt: list[int], count: int, end: int = 2) -> list[int]:
    """The most likely tokens by peft, without a KV cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count and end not in ids[len(prompt) :]:
        ids.append(int(logits(model, ids)[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="session")
def virtual_base(llama: Base) -> ExportedBase:
    return export_causal(llama, Slots(("q_proj",), KINDS), Profile.FP32)


@pytest.fixture(scope="session")
def virtual_models(llama: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PeftModel, Origin, Path]]:
    """By method: the model, the adapter, and its folder."""
    found = {}
    for name in METHODS:
        folder = tmp_path_factory.mktemp(name) / "peft"
        model = trained(llama, name, folder)
        found[name] = (model, from_peft(folder, 1, ()), folder)
    return found


@pytest.fixture
def virtual_bundle(tmp_path: Path, virtual_base: ExportedBase, virtual_models: Any, vendor: IdentityKey) -> Path:
    """A language model with an adapter of each method."""
    bundle = tmp_path / "virtual"
    write_bundle(bundle, virtual_base, [], key=vendor)
    for name, (_, origin, _) in virtual_models.items():
        add(bundle, origin, name=name, form="fp32", key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    return bundle


FIXTURES = {name: value for name, value in globals().items() if isinstance(value, type(virtual_bundle))}
