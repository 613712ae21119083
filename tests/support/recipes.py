"""From a folder that peft saved to a device's answer, and torch's answer to compare: for tests of the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel

from edgeadapt import program
from edgeadapt.bases.base import Base, find_base
from export.onnx.peftmodel import logits_of
from tests.support.models import LABELS

CLI = program.cli  # a fixture may replace it
TEXTS = ("turn on the kitchen lights", "lock the door", "unlock")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}


def bare(folder: Path, tiny_base: Base, kind: str, settings: dict[str, Any]) -> Base:
    """A base as an encoder without a head."""
    model = AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=75, **settings))
    randomize(model, lambda name: True)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((tiny_base.folder / "tokenizer.json").read_bytes())
    return find_base(str(folder))


def trained(inner: Any, folder: Path, **settings: Any) -> PeftModel:
    """A folder that peft saved, of a model with random values in place of trained ones."""
    model = get_peft_model(inner, LoraConfig(**({"r": 4, "lora_alpha": 8} | settings)))
    randomize(model, lambda name: "lora_" in name or "modules_to_save" in name)
    model.save_pretrained(folder)
    return model.eval()


def randomize(model: torch.nn.Module, chosen: Callable[[str], bool]) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if chosen(name) and value.ndim > 1:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))


def infer(bundle: Path, *texts: str) -> list[dict[str, float]]:
    """What the command of a device answers: the probability of each label, for each text."""
    words = ["device", "infer", "--bundle", str(bundle), "--json", "--top", str(len(LABELS)), *texts]
    done = CliRunner().invoke(CLI, words, catch_exceptions=False)
    answers = json.loads(done.stdout)["adapters"][0]["answers"]
    return [{found["intent"]: found["probability"] for found in answer["intents"]} for answer in answers]


def by_torch(model: PeftModel, base: Base, texts: tuple[str, ...]) -> list[dict[str, float]]:
    tokenizer = Tokenizer.from_file(str(base.folder / "tokenizer.json"))
    tokenizer.no_padding()
    answers = []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text).ids])
        with torch.no_grad():
            logits = logits_of(model(input_ids=ids, attention_mask=torch.ones_like(ids)))[0]
        answers.append(dict(zip(LABELS, logits.softmax(-1).tolist(), strict=True)))
    return answers
