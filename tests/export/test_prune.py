"""A base with fewer tokens answers as before where all tokens were kept, and reads every other text in shorter ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertModel

from aggregation.errors import ConfigError
from edgeadapt.bases.base import Base, find_base
from export.prune import frequent_words, prune
from tests.support import refused

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
    with refused(ConfigError, "--languages", value=["xx"]):
        frequent_words(["de", "xx"], 3)
