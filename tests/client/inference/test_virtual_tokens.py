"""A device writes with virtual tokens what peft computes, also after a change of adapter, and in a composition."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PromptTuningConfig

from aggregation.errors import ConfigError, DataError
from aggregation.pki.identity import IdentityKey
from client.inference.generate import ChatMessage, Conversation, Generator
from client.inference.library import Composition, Library
from client.inference.phrases import PhraseReader
from client.inference.text import SamplingParams
from edgeadapt.bases.base import Base
from edgeadapt.formats.graphinputs import PROMPT
from export.bundle.sources import from_peft
from export.bundle.write import add
from tests.support import models, refused, virtual

globals().update(virtual.FIXTURES)

TEXT, PARAMS = "turn on", SamplingParams(max_tokens=10)


@pytest.fixture
def writer(virtual_bundle: Path) -> Generator:
    return Generator.open(virtual_bundle)


def written(writer: Generator, adapter: str | None, text: str = TEXT) -> str:
    return "".join(writer.complete(text, PARAMS, adapter))


def expected(writer: Generator, model: Any, text: str = TEXT) -> str:
    engine = writer._engine
    decoder = engine.decoder()
    return "".join(decoder.decode(token) for token in virtual.greedy(model, engine.encode(text), 10) if token != 2)


def test_the_text_is_pefts_with_each_method_in_turn_and_without(writer: Generator, virtual_models: Any) -> None:
    found = {}
    for name in (*virtual.METHODS, "prompt", "lora", "prefix"):
        found[name] = written(writer, name)
        assert found[name] == expected(writer, virtual_models[name][0]), name
        assert writer.last is not None
        assert writer.last.prompt_tokens == len(TEXT), "virtual tokens are not the user's"
    found["bare"] = written(writer, None)
    assert found["bare"] == expected(writer, virtual_models["prompt"][0].get_base_model())
    assert len(set(found.values())) == len(found), "the virtual tokens decide"


def test_a_prompt_that_is_read_in_pieces_has_its_virtual_tokens_in_any_of_them(
    writer: Generator, virtual_models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (2, 5):
        monkeypatch.setattr("client.inference.engine.PIECE", size)
        for name in ("prompt", "prefix"):
            assert written(writer, name) == expected(writer, virtual_models[name][0]), (size, name)


def test_a_text_that_goes_on_is_read_from_the_cache(writer: Generator, virtual_models: Any) -> None:
    written(writer, "prefix")
    assert written(writer, "prefix", TEXT + " it") == expected(writer, virtual_models["prefix"][0], TEXT + " it")
    assert writer.last is not None
    assert writer.last.reused_tokens == len(TEXT)
    written(writer, "prompt")
    assert written(writer, "prompt", "?" + TEXT) == expected(writer, virtual_models["prompt"][0], "?" + TEXT)
    assert writer.last.reused_tokens == 0


def test_a_composition_has_the_virtual_tokens_of_all_and_the_updates_of_others(
    virtual_bundle: Path, virtual_models: Any, llama: Base, tmp_path: Path
) -> None:
    library, tensors = Library.open(virtual_bundle, None), {n: m[1].tensors for n, m in virtual_models.items()}
    composed = library.load(Composition.parse("p-tuning+prompt+lora:0.5"))
    name = f"base_model.model.{PROMPT}"
    both = np.concatenate([tensors["p-tuning"][name], tensors["prompt"][name]])
    assert np.array_equal(composed.inputs[PROMPT], both)
    assert (composed.virtual_tokens, composed.rank) == (8, 4)
    config = PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM")
    joined = virtual.trained(llama, "prompt", tmp_path / "both", config)
    with torch.no_grad():
        joined.prompt_encoder["default"].embedding.weight.copy_(torch.from_numpy(both))
    writer = Generator.of(library)
    assert written(writer, "prompt+p-tuning") == expected(writer, joined)


@pytest.mark.parametrize(
    ("composition", "about"),
    [
        ("prompt:0.5", "composition.weight"),
        ("prompt:-1+lora", "composition.weight"),
        ("prefix:2+lora", "composition.weight"),
        ("prompt+prefix", "composition.virtual_tokens"),
    ],
)
def test_a_composition_that_is_not_defined_is_refused(virtual_bundle: Path, composition: str, about: str) -> None:
    with refused(ConfigError, about):
        Library.open(virtual_bundle, None).load(Composition.parse(composition))


def test_virtual_tokens_count_towards_the_context(writer: Generator) -> None:
    most = writer.context - 5
    assert len(written(writer, "prompt", "a" * (most - 1))) == 1
    with refused(DataError, "prompt", value=most):
        writer.complete("a" * most, PARAMS, "prompt")
    assert written(writer, "lora", "a" * most), "of five tokens less"


def test_a_conversation_drops_messages_for_virtual_tokens(
    virtual_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Generator.open(virtual_bundle)
    monkeypatch.setattr(writer._engine, "apply_chat_template", lambda messages: "".join(m["content"] for m in messages))
    lengths = {}
    for adapter in ("lora", "prompt"):
        chat = Conversation(writer, SamplingParams(max_tokens=8), adapter=adapter)
        chat._messages = [ChatMessage("user", "a" * 20), ChatMessage("assistant", "b" * 10)]
        assert "".join(chat.ask("c" * 24))
        lengths[adapter] = len(chat.messages)
    assert lengths == {"lora": 4, "prompt": 2}


def test_an_adapter_of_more_virtual_tokens_than_the_context_is_refused(
    llama: Base, virtual_bundle: Path, vendor: IdentityKey, tmp_path: Path
) -> None:
    config = PromptTuningConfig(num_virtual_tokens=64, task_type="CAUSAL_LM")
    virtual.trained(llama, "long", tmp_path / "long", config)
    with refused(DataError, "num_virtual_tokens", value=64):
        add(virtual_bundle, from_peft(tmp_path / "long", 1, ()), name="long", form="fp32", key=vendor)


def test_a_base_without_a_slot_names_it(virtual_models: Any, lm_bundle: Path, vendor: IdentityKey) -> None:
    with refused(DataError, PROMPT):
        add(lm_bundle, virtual_models["prompt"][1], name="prompt", form="fp32", key=vendor)


def penalized(model: Any, prompt: list[int], count: int, penalty: float) -> list[int]:
    """The most likely tokens where tokens that were there are less likely (Keskar et al. 2019), by peft's logits."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count and 2 not in ids[len(prompt) :]:
        row = virtual.logits(model, ids)[0, -1]
        seen = sorted(set(ids))
        row[seen] = np.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        ids.append(int(row.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_placeholders_are_not_penalized_as_tokens_of_the_text(
    writer: Generator, virtual_models: Any, name: str
) -> None:
    engine, text = writer._engine, "turn on the light"
    params = SamplingParams(max_tokens=10, repetition_penalty=1.5)
    found = "".join(writer.complete(text, params, name))
    decoder, tokens = engine.decoder(), penalized(virtual_models[name][0], engine.encode(text), 10, 1.5)
    assert found == "".join(decoder.decode(token) for token in tokens if token != 2)
    assert found != written(writer, name, text)


def test_beams_read_virtual_tokens_once_for_each(writer: Generator, virtual_models: Any) -> None:
    """The best of several answers is at least as likely as the greedy one, and no other adapter's."""
    engine, prompt = writer._engine, writer._engine.encode(TEXT)
    model = virtual_models["prompt"][0]
    "".join(writer.complete(TEXT, SamplingParams(max_tokens=6, beams=3), "prompt"))
    assert engine._live is not None
    found = [int(token) for token in engine._live.inner.get_sequence(0)][5 + len(prompt) :]

    def likelihood(tokens: list[int]) -> float:
        rows = torch.from_numpy(virtual.logits(model, prompt + tokens)).log_softmax(-1)[0, len(prompt) - 1 :]
        return float(sum(rows[at, token] for at, token in enumerate(tokens)))

    greedy = virtual.greedy(model, prompt, 6)
    assert likelihood(found) >= likelihood(greedy) - 1e-4


def test_virtual_tokens_that_leave_a_phrase_no_room_are_refused() -> None:
    tokenizer = models.wordpiece()
    tokenizer.no_padding()
    tokenizer.enable_truncation(8)
    reader = PhraseReader.of(tokenizer.to_str().encode())
    start, end = 2, 3
    whole = reader.tokens("turn on the light")
    assert reader.tokens("turn on the light", 2) == whole
    assert reader.tokens("turn on the light", 5) == [start, whole[1], end]
    for count in (6, 7, 8, 900):
        with refused(DataError, "adapter", value=count):
            reader.tokens("turn on the light", count)
