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
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertModel, LlamaConfig, LlamaModel

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
from export.prune import frequent_words, prune
from tests.support import refused

TEXTS = ["turn on the light", "play some music", "how warm is it here", "stop"]
SPEC = PeftConfig.lora(2, 4, ("query", "value"))


def means(base: Base) -> torch.Tensor:
    """The mean over each text's tokens, before it gets unit length."""
    model = classifier.build(base, 2, SPEC)
    ids = [torch.tensor(encoding.ids) for encoding in classifier.tokenizer(base, model).encode_batch(TEXTS)]
    tokens, mask = classifier.padded(ids)
    with torch.inference_mode():
        return classifier.pooled(model.get_base_model().encoder, tokens, mask)


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
    assert exported.manifest.slots["classifier.weight"][1] == str(embedded(base, ["stop"]).shape[1])


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


# Fewer tokens


SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
LATIN = ["▁", *"abcdehlnorstuwABH", "▁hello", "▁world", "▁house", "▁abs", "urd", "▁Hello", "▁HAL", "'", "1", "!?", "😀"]
OTHERS = [*"ждя", "▁да", "▁я", "東", "京", "東京"]
VOCABULARY = [*SPECIAL, *LATIN, *OTHERS, "<mask>"]
ROWS = len(VOCABULARY) + 3  # an embedding may have more rows than there are tokens


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("unigram")
    generator = torch.Generator().manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=ROWS, max_position_embeddings=32, pad_token_id=1, bos_token_id=0, **sizes)
    model = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder)
    scores = [0.0] * 4 + [-len(VOCABULARY) / len(token) for token in VOCABULARY[4:]]
    tokenizer = Tokenizer(models.Unigram(list(zip(VOCABULARY, scores, strict=True)), 3, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens([*SPECIAL, "<mask>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return find_base(str(folder))


def tokens(folder: Path, text: str) -> list[str]:
    found: list[str] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).tokens
    return found


def states(folder: Path, text: str) -> np.ndarray:
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        answer: np.ndarray = model(input_ids=torch.tensor([ids]))[0].numpy()
    return answer


@pytest.fixture
def pruned(unigram: Base, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    result = prune(unigram, ["hello", "world", "house", "bad"], ["HAL"], out)
    assert (result.before, result.after) == (len(VOCABULARY), len(kept(out)))
    assert result.bytes == (out / "model.safetensors").stat().st_size < unigram.weight_bytes
    return out


def kept(folder: Path) -> list[str]:
    return [token for token, _ in json.loads((folder / "tokenizer.json").read_bytes())["model"]["vocab"]]


def test_tokens_of_words_and_texts_remain_in_their_order(pruned: Path) -> None:
    found = kept(pruned)
    assert found == [token for token in VOCABULARY if token in found]
    assert {*SPECIAL, "<mask>", "▁hello", "▁Hello", "▁world", "▁HAL"} <= {*found}
    assert {"1", "!?", "😀", "'"} <= {*found}  # without letters
    assert not {"ж", "▁да", "東", "東京", "▁abs", "urd"} & {*found}


@pytest.mark.parametrize("text", ["hello world", "Hello house", "HAL 1!?", "hello<mask>"])
def test_a_text_of_kept_tokens_has_the_answer_that_it_had(unigram: Base, pruned: Path, text: str) -> None:
    assert tokens(pruned, text) == tokens(unigram.folder, text)
    np.testing.assert_array_equal(states(pruned, text), states(unigram.folder, text))


def test_other_texts_are_cut_shorter_or_unknown(unigram: Base, pruned: Path) -> None:
    before, after = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (unigram.folder, pruned))
    assert after.encode("absurd").tokens == ["<s>", *"▁absurd", "</s>"] != before.encode("absurd").tokens
    assert [number == 3 for number in after.encode("東京").ids] == [False, False, True, False]
    assert 3 not in before.encode("東京").ids


def test_the_configuration_has_the_new_numbers(pruned: Path) -> None:
    config = json.loads((pruned / "config.json").read_bytes())
    found = kept(pruned)
    assert config["vocab_size"] == len(found)
    assert (config["pad_token_id"], config["bos_token_id"]) == (found.index("<pad>"), found.index("<s>"))
    rows = load_file(pruned / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert rows.shape == (len(found), 16)


def test_equal_inputs_give_the_same_base(unigram: Base, pruned: Path, tmp_path: Path) -> None:
    prune(unigram, ["bad", "house", "world", "hello"], ["HAL"], tmp_path / "again")
    assert find_base(str(tmp_path / "again")).digest == find_base(str(pruned)).digest != unigram.digest


def test_nothing_is_written_over_or_left_behind(unigram: Base, tiny_base: Any, tmp_path: Path) -> None:
    with refused(ConfigError, "--out"):
        prune(unigram, [], ["a"], tmp_path)
    with refused(ConfigError, "tokenizer.json"):
        prune(tiny_base, [], ["a"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_of_as_many_rows_is_cut_as_well(unigram: Base, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in unigram.folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = load_file(copy / "model.safetensors")
    save_file({**weights, "bias": np.arange(ROWS, dtype=np.float32)}, copy / "model.safetensors")
    prune(find_base(str(copy)), ["hello"], [], tmp_path / "out")
    bias = load_file(tmp_path / "out" / "model.safetensors")["bias"]
    assert bias.tolist() == [VOCABULARY.index(token) for token in kept(tmp_path / "out")]


def test_frequent_words_of_a_language_without_a_list_are_refused_by_name() -> None:
    assert {*frequent_words(["de"], 10)} >= {"der", "die", "und"}
    assert len(frequent_words(["de", "fr"], 50)) == 100
    with refused(ConfigError, "--languages"):
        frequent_words(["de", "xx"], 3)
