"""Training of a language model on the device: what is learned, what a score says, and refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from aggregation.errors import ConfigError, DataError
from client.training import torchengine
from client.training.examples import Example, Split, parse_examples, read_examples, write_examples
from client.training.trainer import LanguageTrainer
from edgeadapt.bases.base import Base
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods import causal
from edgeadapt.methods.parts import PARTS
from edgeadapt.rounds.task import MAX_LOSS, Task
from tests.support import refused
from tests.support.models import MakeLm

pytestmark = pytest.mark.usefixtures("one_thread")
TASK = Task(PeftConfig("LORA", 4, 8, ("q_proj", "v_proj")), (), 1, 4, 0.02, 0.0, 0.0, PARTS, PARTS)
LORA = PeftConfig.lora(4, 8, ("q_proj", "v_proj"))
TEXTS = tuple(Example(text) for text in ("abab abab abab", "ba ba ba", "abba", "aabb aabb", "b a b a b a"))
TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def trainer(llama: Base) -> LanguageTrainer:
    return torchengine.language(llama, LORA)


@pytest.fixture(scope="module")
def start(trainer: LanguageTrainer) -> Tensors:
    return causal.initial(trainer.engine.model, torch.Generator().manual_seed(1))


@pytest.fixture
def chatty(make_lm: MakeLm) -> LanguageTrainer:
    base = make_lm()
    path = base.folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return torchengine.language(base, LORA)


def rng(seed: int = 3) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_training_lowers_the_loss_of_texts(trainer: LanguageTrainer, start: Tensors) -> None:
    first = trainer.train(start, TEXTS, TASK, epochs=20, rng=rng())
    before, after = trainer.score(start, TEXTS), trainer.score(first, TEXTS)
    assert after.loss < 0.8 * before.loss
    assert after.correct > before.correct
    assert after.count == len(TEXTS)


def test_a_score_is_nats_for_each_byte_of_what_is_learned(trainer: LanguageTrainer, start: Tensors) -> None:
    example = Example("b ä ab")  # the first token, b, is not learned
    ids = torch.tensor([*trainer.encoder.tokenizer.encode(example.text).ids, trainer.encoder.end])
    causal.load(trainer.engine.model, start)
    with torch.no_grad():
        logits = trainer.engine.model(input_ids=ids[None]).logits[0]
    nats = float(cross_entropy(logits[:-1], ids[1:], reduction="sum"))
    (encoded,) = trainer.encode([example])
    assert encoded.size == len(" ä ab".encode())
    assert trainer.score(start, [example]).loss == pytest.approx(nats / encoded.size, rel=1e-5)


def test_rows_of_a_batch_are_scored_as_alone(trainer: LanguageTrainer, start: Tensors) -> None:
    together = trainer.score(start, TEXTS)
    alone = [trainer.score(start, [example]) for example in TEXTS]
    assert together.loss == pytest.approx(sum(score.loss for score in alone), rel=1e-5)
    assert together.correct == pytest.approx(sum(score.correct for score in alone))


def test_of_an_answer_to_a_prompt_only_the_answer_is_learned(trainer: LanguageTrainer) -> None:
    (encoded,) = trainer.encode([Example("ab", prompt="ba ba")])
    asked = len(trainer.encoder.tokenizer.encode("ba ba").ids)
    answer = trainer.encoder.tokenizer.encode("ab").ids
    assert (encoded.first, encoded.targets.tolist()) == (asked - 1, [*answer, trainer.encoder.end])
    assert encoded.size == 2


def test_a_prompt_is_rendered_by_the_chat_template_and_the_turns_end_is_learned(chatty: LanguageTrainer) -> None:
    (encoded,) = chatty.encode([Example("ab", prompt="ba")])
    text = "<u>ba</><a>ab</>"
    assert encoded.ids.tolist() == [
        token
        for part in ("<u>ba</><a>", "ab", "</>")
        for token in chatty.encoder.tokenizer.encode(part, add_special_tokens=False).ids
    ]
    assert chatty.encoder.tokenizer.decode(encoded.targets.tolist(), skip_special_tokens=False) == "ab</>"
    assert text.startswith("<u>ba</>")
    (plain,) = chatty.encode([Example("ab")])  # a text to continue is no turn of a chat
    assert plain.ids.tolist() == [*chatty.encoder.tokenizer.encode("ab").ids, chatty.encoder.end]


def test_a_template_that_changes_answers_is_refused(chatty: LanguageTrainer) -> None:
    def loud(messages: list[dict[str, str]], answer: bool) -> str:
        return "<u>" if answer else "<u>" + messages[-1]["content"].upper()

    with refused(ConfigError, "chat_template"):
        replace(chatty.encoder, template=loud).encode(Example("ab", prompt="ba"))


def test_long_texts_are_cut_off_and_a_prompt_without_room_is_refused(trainer: LanguageTrainer, start: Tensors) -> None:
    long, (cut,) = "ab" * 400, trainer.encode([Example("ab" * 400)])
    assert len(cut.ids) == trainer.encoder.longest == 64  # as many as the base reads
    assert cut.size < len(long)
    with refused(DataError, "example.prompt"):
        trainer.score(start, [Example("ab", prompt=long)])
    assert trainer.score(start, []).count == 0


def test_virtual_tokens_need_room_for_a_text(llama: Base) -> None:
    prompt = PeftConfig("PROMPT_TUNING", 0, 0, (), num_virtual_tokens=62)
    assert torchengine.language(llama, prompt).encoder.longest == 2
    with refused(ConfigError, "num_virtual_tokens", value=63):
        torchengine.language(llama, replace(prompt, num_virtual_tokens=63))


def test_no_example_weighs_more_than_the_bound_of_its_metric(trainer: LanguageTrainer, start: Tensors) -> None:
    loud = {name: np.full_like(value, 50.0) for name, value in start.items()}
    assert trainer.score(loud, TEXTS).loss <= MAX_LOSS * len(TEXTS)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_lora_on_layers_with_a_row_for_each_token_is_refused(make_lm: MakeLm, target: str) -> None:
    """Their updates name the tokens of the examples."""
    with refused(ConfigError, "target_modules"):
        torchengine.language(make_lm(tie_word_embeddings=False), PeftConfig.lora(2, 4, ("q_proj", target)))


def test_what_the_output_layers_update_would_show(make_lm: MakeLm) -> None:
    """The alive half of the test above: after one step, the rows of the examples' tokens have another sign."""
    model = causal.build(make_lm(tie_word_embeddings=False), PeftConfig.lora(1, 1, ("lm_head",)))
    start = causal.initial(model, torch.Generator().manual_seed(1))
    causal.load(model, start)
    ids = torch.tensor([[5, 6, 5, 6, 5]])
    cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).backward()
    (gradient,) = (p.grad for name, p in model.named_parameters() if ".lora_B." in name and p.grad is not None)
    sizes = gradient[:, 0].abs()
    assert set(sizes.argsort(descending=True)[:2].tolist()) == {5, 6}


# The examples file.


def test_examples_of_a_language_model_are_read_as_they_were_written(tmp_path: Path) -> None:
    examples = (Example("ab"), Example("ba", prompt="a?"), Example("held out", split=Split.VALIDATION))
    write_examples(tmp_path / "examples.jsonl", examples)
    assert read_examples(tmp_path / "examples.jsonl", 0) == examples
    assert "label" not in (tmp_path / "examples.jsonl").read_text()


@pytest.mark.parametrize(
    ("row", "about"),
    [
        ({"prompt": "a"}, "example"),
        ({"text": ""}, "example.text"),
        ({"text": "a", "prompt": 3}, "example.prompt"),
        ({"text": "a", "prompt": "p" * 2001}, "example.prompt"),
        ({"text": "a", "prompt": "\ud800"}, "example.prompt"),
    ],
)
def test_a_broken_line_is_refused(row: dict[str, Any], about: str) -> None:
    with refused(DataError, about):
        parse_examples(json.dumps(row).encode(), Path("examples.jsonl"), 0)


def test_a_label_is_not_read_and_without_a_task_it_is_needed() -> None:
    line = json.dumps({"text": "a", "label": "x"}).encode()
    assert parse_examples(line, Path("e"), 0) == (Example("a"),)
    with refused(DataError, "example"):
        parse_examples(b'{"text": "a"}', Path("e"), 2)
