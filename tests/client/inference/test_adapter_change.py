"""A chat that changes its adapter keeps what the layers below all slots read, and answers as a fresh one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.errors import DataError, TrustError
from aggregation.pki.identity import IdentityKey
from client.inference.engine import MAX_UNUSED, GenerationEngine
from client.inference.generate import Conversation, Generator
from client.inference.text import SamplingParams
from edgeadapt.bases.base import Base
from edgeadapt.formats.bundle import BASE_MANIFEST, CHAT, MODEL, TRUST
from edgeadapt.formats.files import sha256
from edgeadapt.formats.layout import Layout
from edgeadapt.formats.manifest import BaseManifest
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.peft.inputs import AdapterInputs
from export.bundle.write import AdapterSource, add_adapter, write_bundle
from export.causal import export_causal
from export.onnx.exported import ExportedBase, Profile
from export.onnx.targets import Slots
from tests.support import refused
from tests.support.bundles import flip, resign_base
from tests.support.models import TEMPLATE, MakeLm

CONFIG = PeftConfig.lora(4, 8, ("q_proj", "v_proj"))
PARAMS = SamplingParams(max_tokens=24)
QUESTIONS = ("lock the door", "and the light?", "turn it on")
NAMES = ("global", "anna", "ben")
CHATS, WHOLE = "chats", "whole"


def source(name: str, exported: ExportedBase, seed: int) -> AdapterSource:
    rng, values = np.random.default_rng(seed), {}
    for slot, sizes in exported.manifest.slots.items():
        path, _, kind = slot.rpartition(".lora_")
        shape = [int(size) if size.isdigit() else CONFIG.r for size in sizes][::-1]
        peft_name = f"base_model.model.{path}.lora_{kind}"
        values[peft_name] = (0.6 * rng.standard_normal(shape)).astype(np.float32)
    inputs = AdapterInputs.of_tensors(CONFIG, values)
    return AdapterSource(name, values, (), 1, Layout.of(values).digest, None, CONFIG, adapter_inputs=inputs)


@pytest.fixture(scope="module")
def three_layers(make_lm: MakeLm) -> Base:
    base = make_lm(num_hidden_layers=3, max_position_embeddings=512)
    settings = base.folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
    return base


@pytest.fixture(scope="module", params=[Profile.FP32, Profile.NATIVE_INT8, Profile.NATIVE_INT4])
def cut(request: pytest.FixtureRequest, three_layers: Base) -> ExportedBase:
    exported = export_causal(three_layers, Slots(("q_proj", "v_proj"), first=-1), request.param)
    assert CHAT in exported.manifest.files
    return exported


@pytest.fixture
def chats(cut: ExportedBase, vendor: IdentityKey, tmp_path: Path) -> Path:
    """A bundle with three adapters of the last layer, and next to it the same without the graph that keeps states."""
    sources = [source(name, cut, seed) for seed, name in enumerate(NAMES)]
    files = {name: digest for name, digest in cut.manifest.files.items() if name != CHAT}
    whole = replace(cut, manifest=replace(cut.manifest, files=files))
    for name, exported in ((CHATS, cut), (WHOLE, whole)):
        write_bundle(tmp_path / name, exported, sources, key=vendor)
    (tmp_path / TRUST).write_bytes(vendor.public.to_pem())
    return tmp_path / CHATS


@pytest.fixture
def from_states(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens that only the layers with slots read."""
    counts: list[int] = []
    read = GenerationEngine._read_states

    def counted(self: GenerationEngine, live: Any, states: Any, begin: int, end: int) -> None:
        counts.append(end - begin)
        read(self, live, states, begin, end)

    monkeypatch.setattr(GenerationEngine, "_read_states", counted)
    return counts


def written(generator: Generator, text: str, adapter: str | None, params: SamplingParams = PARAMS) -> str:
    return "".join(generator.complete(text, params, adapter))


@pytest.fixture
def generator(chats: Path) -> Generator:
    return Generator.open(chats, threads=1)


def whole(generator: Generator) -> Generator:
    return Generator.open(generator.library.bundle.with_name(WHOLE), threads=1)


def fresh(generator: Generator, text: str, adapter: str | None, params: SamplingParams = PARAMS) -> str:
    return written(whole(generator), text, adapter, params)


def test_the_text_after_a_change_is_that_of_a_fresh_chat(generator: Generator, from_states: list[int]) -> None:
    text, prompts, answers = "turn on the light", [0], []
    for question, adapter in zip(QUESTIONS * 2, (None, *NAMES, None, "global:0.5+ben"), strict=True):
        text += f" {question}"
        answers.append(written(generator, text, adapter))
        assert from_states[-1] >= prompts[-1]
        assert generator.last is not None
        assert generator.last.reused_tokens == 0  # the layers with slots read them again
        assert fresh(generator, text, adapter) == answers[-1]
        prompts.append(len(text))
        text += answers[-1]
    assert len(set(answers)) == len(answers)


def test_the_layers_below_do_not_read_again(generator: Generator) -> None:
    """With other states the text would be another one: nothing else is read of the tokens that are known."""
    text = "turn on the light in the kitchen"
    expected = written(generator, text, "anna")
    written(generator, text, "global")
    live = generator._engine._live
    assert live is not None
    assert live.states is not None
    live.states.values[:] = 7
    assert written(generator, text, "anna") != expected


def test_an_interrupted_answer_and_other_parameters_leave_the_next_one_right(generator: Generator) -> None:
    text = "turn on the light in the kitchen"
    expected = {name: fresh(generator, text, name) for name in NAMES}
    pieces = generator.complete(text, PARAMS, "global")
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert written(generator, text, "anna") == expected["anna"]
    for other in (SamplingParams(max_tokens=24, temperature=1.0, seed=3), SamplingParams(max_tokens=24, beams=3)):
        assert written(generator, text, "ben", other) == fresh(generator, text, "ben", other)
        assert written(generator, text, "ben") == expected["ben"]
    assert written(generator, text[:9], "global") == fresh(generator, text[:9], "global")


def test_a_lesson_replaces_the_adapter_in_use_and_the_cache_below_stays(
    generator: Generator, cut: ExportedBase, vendor: IdentityKey, from_states: list[int]
) -> None:
    text, bundle = "turn on the light", generator.library.bundle
    for lesson in range(MAX_UNUSED + 3):  # more than a generator holds
        for name in (CHATS, WHOLE):
            add_adapter(bundle.with_name(name), cut.adapter_inputs, source("anna", cut, 10 + lesson), key=vendor)
        assert written(generator, text, "anna") == fresh(generator, text, "anna")
        assert len(generator._engine._unused) <= MAX_UNUSED
    assert from_states.count(len(text) - 1) >= MAX_UNUSED


def test_a_conversation_goes_on_from_the_states(generator: Generator, from_states: list[int]) -> None:
    conversation = Conversation(generator, PARAMS, adapter="global")
    for adapter in (*NAMES, None):
        conversation.use(adapter)
        before = [*conversation.messages]
        answer = "".join(conversation.ask("lock the door"))
        again = Conversation(whole(generator), PARAMS, adapter=adapter)
        again._messages = before
        assert "".join(again.ask("lock the door")) == answer
    assert max(from_states) > 40


def test_a_changed_graph_is_refused(chats: Path) -> None:
    flip(chats / "base" / CHAT, 0.5)
    with refused(TrustError, CHAT):
        Generator.open(chats)


def test_a_signed_file_that_is_no_graph_is_refused(chats: Path, vendor: IdentityKey) -> None:
    (chats / "base" / CHAT).write_bytes(b"")
    files = BaseManifest.unverified((chats / BASE_MANIFEST).read_bytes()).files
    resign_base(chats, vendor, files=files | {CHAT: sha256(b"")})
    with refused(DataError, MODEL):
        Generator.open(chats)


def test_a_base_whose_slots_or_states_do_not_allow_it_has_no_such_graph(three_layers: Base, make_lm: Any) -> None:
    assert CHAT not in export_causal(three_layers, ("q_proj",), Profile.FP32).manifest.files
    assert CHAT not in export_causal(three_layers, Slots(("q_proj",), first=-1), Profile.WEB_INT8).manifest.files
    traced = make_lm("phi3", pad_token_id=2)  # its KV cache is not one buffer
    assert CHAT not in export_causal(traced, Slots(("qkv_proj",), first=-1), Profile.FP32).manifest.files
