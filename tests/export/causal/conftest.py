"""Tiny language models of several architectures, with seeded weights and a tokenizer of single letters."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from adapters.base import Base, find_base
from adapters.causal import load, tensors
from adapters.layout import Floats, Tensors
from export.bundle.base import ExportedBase
from export.onnx.headers import DATA

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = (*SPECIAL, chr(288), *(chr(code) for code in range(33, 127)))  # chr(288) is a space to the tokenizer
TOKENIZER = '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}'
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

MakeLm = Callable[..., Base]


@pytest.fixture(scope="session")
def make_lm(tmp_path_factory: pytest.TempPathFactory) -> MakeLm:
    """Makes a base of an architecture in transformers' words; keywords are keys of its configuration."""

    def make(kind: str = "llama", **settings: Any) -> Base:
        folder = tmp_path_factory.mktemp(kind)
        sizes = {
            "vocab_size": len(WORDS),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        }
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | settings)))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, value in model.named_parameters():
                noise = 0.2 * torch.randn(value.shape, generator=generator)
                value.copy_(noise + 1 if "norm" in name or "ln_" in name else noise)
        model.save_pretrained(folder)
        tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(WORDS)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(TOKENIZER)
        return find_base(str(folder))

    return make


@pytest.fixture(scope="session")
def llama(make_lm: MakeLm) -> Base:
    return make_lm()


@pytest.fixture(scope="session")
def drawn() -> Callable[[PeftModel, int], Tensors]:
    """Gives a model's adapter random values, and returns them."""

    def draw(model: PeftModel, seed: int) -> Tensors:
        rng = np.random.default_rng(seed)
        values = {
            name: 0.3 * rng.standard_normal(value.shape, dtype=np.float32) for name, value in tensors(model).items()
        }
        load(model, values)
        return values

    return draw


class Runner:
    """An exported base in ONNX Runtime, asked with and without its KV cache."""

    def __init__(self, exported: ExportedBase) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        data = exported.files[DATA]
        options.add_external_initializers_from_files_in_memory([DATA], [data], [len(data)])
        self.session = ort.InferenceSession(exported.model, options)
        self.pasts = [value for value in self.session.get_inputs() if value.name.startswith("past_key_values.")]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def logits(self, ids: Any, inputs: Tensors, first: int | None = None) -> Floats:
        """The logits of all tokens: the ``first`` at once, then one by one through the cache."""
        rows, length = ids.shape
        cache = {v.name: np.zeros((rows, v.shape[1], 0, v.shape[3]), np.float32) for v in self.pasts}
        found, at = [], 0
        for end in [first or length, *range((first or length) + 1, length + 1)]:
            feeds = {"input_ids": ids[:, at:end], "attention_mask": np.ones((rows, end), np.int64)}
            if any(value.name == "position_ids" for value in self.session.get_inputs()):
                feeds["position_ids"] = np.arange(at, end)[None].repeat(rows, 0)
            answers = dict(zip(self.outputs, self.session.run(None, feeds | cache | inputs), strict=True))
            cache = {name: answers[name.replace("past_key_values", "present")] for name in cache}
            found.append(answers["logits"])
            at = end
        result: Floats = np.concatenate(found, axis=1)
        return result


@pytest.fixture(scope="session")
def runner() -> Callable[[ExportedBase], Runner]:
    return Runner


@pytest.fixture(scope="session")
def torch_logits() -> Callable[..., Floats]:
    def run(model: torch.nn.Module, ids: Any) -> Floats:
        with torch.no_grad():
            answer: Floats = model(input_ids=torch.from_numpy(ids)).logits.numpy()
        return answer

    return run


@pytest.fixture(scope="session")
def every_layer() -> tuple[str, ...]:
    return ALL
