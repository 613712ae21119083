"""A centered base: the mean over the tokens of the given texts is zero on average, and nothing else changes."""

from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaModel

from aggregation.errors import ConfigError
from edgeadapt.bases.base import Base, find_base
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods import classifier
from export.center import centered
from tests.support import refused

TEXTS = ["turn on the light", "play some music", "how warm is it here", "stop"]
SPEC = PeftConfig.lora(2, 4, ("query", "value"))


def means(base: Base) -> torch.Tensor:
    """The mean over each text's tokens, before it gets unit length."""
    model = classifier.build(base, 2, SPEC)
    ids = [torch.tensor(encoding.ids) for encoding in classifier.tokenizer(base, model).encode_batch(TEXTS)]
    tokens, mask = classifier.padded(ids)
    with torch.inference_mode():
        return classifier.pooled(model.get_base_model().encoder(input_ids=tokens, attention_mask=mask)[0], mask)


def test_every_embedding_loses_the_mean_of_the_texts(tiny_base: Any, tmp_path: Path) -> None:
    before, after = means(tiny_base), means(centered(tiny_base, TEXTS, tmp_path / "out"))
    assert before.mean(0).norm() > 0.1
    torch.testing.assert_close(after, before - before.mean(0), atol=1e-5, rtol=0)


def test_only_the_bias_of_the_last_layer_norm_changes(tiny_base: Any, tmp_path: Path) -> None:
    made = centered(tiny_base, TEXTS, tmp_path / "out")
    assert made.digest != tiny_base.digest
    old, new = (load_file(base.folder / "model.safetensors") for base in (tiny_base, made))
    changed = [name for name in old if not (old[name] == new[name]).all()]
    assert [name.partition("layer.")[2] for name in changed] == ["1.output.LayerNorm.bias"]


def test_a_base_that_ends_in_something_else_is_refused(tiny_base: Any, tmp_path: Path) -> None:
    folder = tmp_path / "llama"  # its last norm has no bias
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaModel(LlamaConfig(vocab_size=500, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((tiny_base.folder / "tokenizer.json").read_bytes())
    with refused(ConfigError, "base"):
        centered(find_base(str(folder)), TEXTS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_texts_there_is_nothing_to_center_on(tiny_base: Any, tmp_path: Path) -> None:
    with refused(ConfigError, "texts"):
        centered(tiny_base, [], tmp_path / "out")
