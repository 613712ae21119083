"""A centered base: the mean over the tokens of the given texts is zero on average, and nothing else changes. And one
with lexical features, which say of a text which tokens it has."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaModel

from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base, find_base
from edgeadapt.formats.layout import Floats
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods import classifier
from export.features import centered, with_lexical_features
from export.onnx.classifier import export_classifier
from export.onnx.exported import Profile
from export.onnx.slotted import with_mean_head
from export.onnx.targets import Slots
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


def embedded(base: Base, texts: list[str]) -> Floats:
    model = classifier.build(base, 2, SPEC)
    return classifier.embed(model, classifier.tokenizer(base, model), texts)


def test_lexical_features_stand_beside_the_embedding_and_tell_texts_without_common_tokens_apart(
    tiny_base: Any, tmp_path: Path
) -> None:
    base = with_lexical_features(tiny_base, 256, tmp_path / "out")
    assert base.digest != tiny_base.digest
    before, both = embedded(tiny_base, TEXTS), embedded(base, TEXTS)
    np.testing.assert_allclose(both[:, : before.shape[1]] * math.sqrt(2), before, atol=1e-6)
    lexical = both[:, before.shape[1] :] * math.sqrt(2)
    skipped = pretrained.configuration(base).lexical_features["skipped"]
    tokens = [set(encoding.ids) - {*skipped} for encoding in pretrained.tokenizer(tiny_base).encode_batch(TEXTS)]
    cosines = lexical @ lexical.T
    for i, j in itertools.combinations(range(len(TEXTS)), 2):
        common = len(tokens[i] & tokens[j]) / math.sqrt(len(tokens[i]) * len(tokens[j]))
        assert abs(cosines[i, j] - common) < 5 / math.sqrt(256), (TEXTS[i], TEXTS[j])


def test_the_order_of_words_and_special_tokens_change_no_lexical_features(tiny_base: Any, tmp_path: Path) -> None:
    base = with_lexical_features(tiny_base, 8, tmp_path / "out")
    width = embedded(tiny_base, TEXTS[:1]).shape[1]
    one, other = embedded(base, ["stop the music", "music the stop"])[:, width:]
    np.testing.assert_allclose(one, other, atol=1e-6)
    assert not embedded(base, [""])[0, width:].any()  # only special tokens


def test_the_exported_base_answers_and_trains_as_torch_does_with_lexical_features(
    tiny_base: Any, tmp_path: Path
) -> None:
    base = with_lexical_features(tiny_base, 64, tmp_path / "out")
    exported = export_classifier(
        with_mean_head(base, Slots.of(("query", "value"))), base, Profile.NATIVE_INT8, training=True
    )
    assert exported.gradients is not None
    assert exported.gradients < 1e-4
    assert exported.slots["classifier.weight"][1] == str(embedded(base, ["stop"]).shape[1])


@pytest.mark.parametrize(
    "stated", [{}, {"size": 12, "skipped": []}, {"size": 8, "skipped": [-1]}, {"size": 2**20, "skipped": []}, 8]
)
def test_a_damaged_statement_of_lexical_features_is_refused(stated: Any, tiny_base: Any, tmp_path: Path) -> None:
    base = with_lexical_features(tiny_base, 8, tmp_path / "out")
    config = json.loads((base.folder / "config.json").read_text())
    (base.folder / "config.json").write_text(json.dumps(config | {"lexical_features": stated}))
    with refused(ConfigError, "lexical_features"):
        classifier.build(find_base(str(base.folder)), 2, SPEC)


@pytest.mark.parametrize("size", [0, 12, -8, 4096])
def test_lexical_features_of_another_size_are_refused(size: int, tiny_base: Any, tmp_path: Path) -> None:
    with refused(ConfigError, "--size"):
        with_lexical_features(tiny_base, size, tmp_path / "out")


def test_a_base_gets_lexical_features_once_and_is_pruned_before(tiny_base: Any, tmp_path: Path) -> None:
    base = with_lexical_features(tiny_base, 8, tmp_path / "out")
    with refused(ConfigError, "lexical_features"):
        with_lexical_features(base, 8, tmp_path / "again")
