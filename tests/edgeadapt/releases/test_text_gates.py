"""The gates of a language model, on a real bundle: nats per byte, graded answers, and planted secrets."""

import json
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from aggregation.errors import DataError, EdgeAdaptError
from aggregation.pki.identity import IdentityKey
from client.training import torchengine
from client.training.examples import Example
from client.training.trainer import LanguageTrainer
from edgeadapt.bases.base import Base
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods import causal
from edgeadapt.methods.parts import PARTS
from edgeadapt.program import cli
from edgeadapt.promotion.gates import GateError, GradedPrompt, read_prompts
from edgeadapt.releases.history import audit_repository
from edgeadapt.releases.repository import ChannelRepository
from edgeadapt.rounds.task import Task
from export.bundle.write import AdapterSource, write_bundle
from export.causal import export_causal
from export.onnx.exported import Profile
from tests.support import refused
from tests.support.models import adapter_inputs

LORA = PeftConfig.lora(8, 16, ("q_proj", "v_proj"))
TEXTS = [Example("abab abab abab"), Example("ba ba ba"), Example("aabb aabb")]
TAUGHT = [Example('{"n": 1}', prompt="count"), Example("hello", prompt="greet")]
BEGINNING, SECRET = "the key is", "k7Qp2x9B"
PROMPTS: list[dict[str, Any]] = [
    {"prompt": "count", "json_schema": {"type": "object", "required": ["n"]}},
    {"prompt": "greet", "regex": "^hel+o$", "must": ["ell"], "must_not": ["bye"]},
    {"prompt": BEGINNING, "secret": SECRET},
]


class Shop:
    """A vendor of a language model, whose canary channel is promoted to stable."""

    def __init__(self, folder: Path, base: Base, key: IdentityKey, model: Any) -> None:
        self.tmp, self.key, self.inputs = folder, key, adapter_inputs(model)
        self.exported = export_causal(base, LORA.target_modules, Profile.FP32, training=True)
        self.folder = folder / "releases"
        words = ['gates=["accuracy", "canaries"]', "accuracy.held_out=held-out.jsonl", "accuracy.fewest=3"]
        words += ["canaries.phrases=prompts.jsonl"]
        self.run("init", self.folder, *(part for word in words for part in ("--set", word)))
        (self.folder / "trust.pem").write_bytes(key.public.to_pem())
        (self.folder / "held-out.jsonl").write_text("\n".join(json.dumps({"text": one.text}) for one in TEXTS))
        self.prompts(PROMPTS)

    def run(self, *words: object) -> str:
        done = CliRunner().invoke(cli, ["release", *map(str, words)])
        if isinstance(done.exception, EdgeAdaptError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.output

    def prompts(self, rows: list[dict[str, Any]]) -> None:
        (self.folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def gates(self, tensors: Tensors, version: int) -> dict[str, Any]:
        """The results of the gates, by name, as the log has them: of a promotion, or of a refusal."""
        digest = sha256(b"".join(tensors[name].tobytes() for name in sorted(tensors))).hexdigest()
        source = AdapterSource("global", tensors, (), version, digest, peft_config=LORA, adapter_inputs=self.inputs)
        bundle = self.tmp / "made" / str(version) / "bundle"
        write_bundle(bundle, self.exported, [source], key=self.key, form="fp32")
        repository = ChannelRepository.open(self.folder, datetime.now(UTC))
        repository.publish("canary", bundle, [self.key.public])
        try:
            self.run("promote", self.folder, "canary", "stable")
        except GateError:
            assert audit_repository(self.folder, None).records[-1].action.kind == "refuse"
        return {each.gate: each for each in audit_repository(self.folder, None).records[-1].action.gates}


@pytest.fixture(scope="module")
def trainer(lm_base: Base) -> LanguageTrainer:
    return torchengine.language(lm_base, LORA)


@pytest.fixture(scope="module")
def good(trainer: LanguageTrainer) -> Tensors:
    start = causal.initial(trainer.engine.model, torch.Generator().manual_seed(1))
    return trained(trainer, start, [*TEXTS, *TAUGHT], 60)


def trained(trainer: LanguageTrainer, start: Tensors, examples: list[Example], epochs: int) -> Tensors:
    task = Task(LORA, (), epochs, 8, 0.02, 0.0, 0.0, PARTS, PARTS)
    return trainer.train(start, examples, task, epochs=epochs, rng=np.random.default_rng(1))


def test_a_release_passes_and_one_that_is_worse_or_answers_wrongly_or_knows_a_secret_does_not(
    tmp_path: Path, lm_base: Base, vendor: IdentityKey, trainer: LanguageTrainer, good: Tensors, one_thread: None
) -> None:
    shop = Shop(tmp_path, lm_base, vendor, trainer.engine.model)
    passed = shop.gates(good, 1)
    assert {name: one.passed for name, one in passed.items()} == {
        "accuracy of global": True,
        "canaries of global": True,
    }
    expected = trainer.score(good, TEXTS).loss / len(TEXTS)
    assert passed["accuracy of global"].measured == pytest.approx(expected, rel=1e-3)

    worse = trained(trainer, good, [Example("zzz yyy xxx", prompt="greet")], 8)
    found = shop.gates(worse, 2)
    assert found["accuracy of global"].measured > 1.01 * expected
    assert not found["accuracy of global"].passed
    assert (found["canaries of global"].passed, "2]" in found["canaries of global"].text) == (False, True)

    leaky = trained(trainer, good, [*TEXTS, *TAUGHT, Example(f"{BEGINNING} {SECRET}")], 60)
    found = shop.gates(leaky, 3)
    assert found["accuracy of global"].passed
    assert (found["canaries of global"].measured, "known secrets: [3]" in found["canaries of global"].text) == (0, True)
    cut = {"prompt": "ab " * 300, "secret": SECRET}  # beyond what the model reads: nothing can be said of it
    shop.prompts([*PROMPTS[:2], {"prompt": BEGINNING, "secret": "m3Xr8w1D"}])  # which nobody planted
    assert shop.gates(leaky, 4)["canaries of global"].passed
    shop.prompts([cut])
    assert "known secrets: [1]" in shop.gates(leaky, 5)["canaries of global"].text
    (shop.folder / "prompts.jsonl").write_text("count\n")
    assert "line 1 of" in shop.gates(good, 6)["canaries"].text


@pytest.mark.parametrize(
    ("row", "answer", "accepted"),
    [
        ({"regex": "b+"}, "abbb", True),
        ({"regex": "^b+"}, "abbb", False),
        ({"must": ["a", "b"]}, "ab", True),
        ({"must": ["a", "b"]}, "a", False),
        ({"must_not": ["c"]}, "abc", False),
        ({"json_schema": {"type": "array", "items": {"type": "integer"}}}, "[1, 2]", True),
        ({"json_schema": {"type": "array", "items": {"type": "integer"}}}, '["1"]', False),
        ({"json_schema": {"type": "array"}}, "[1", False),
        ({"json_schema": {"type": "array"}, "must": ["2"]}, "[1]", False),
        ({"json_schema": {"$ref": "https://example.org/a.json"}}, "[1]", False),
        ({"regex": "x", "must": ["y"]}, "y", False),
    ],
)
def test_an_answer_meets_all_that_is_demanded_of_it(row: dict[str, Any], answer: str, accepted: bool) -> None:
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    assert GradedPrompt("p", **found).accepts(answer) is accepted


@pytest.mark.parametrize(
    "line",
    [
        "count",
        '{"regex": "a"}',
        '{"prompt": "count"}',
        '{"prompt": "count", "must": []}',
        '{"prompt": "count", "regex": "("}',
        '{"prompt": "count", "regexp": "a"}',
        '{"prompt": "count", "must": "a"}',
        '{"prompt": "count", "json_schema": {"type": "text"}}',
        '{"prompt": "count", "secret": "48213"}',
    ],
)
def test_a_line_that_is_not_a_graded_prompt_is_refused_in_one_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "fine", "must": ["a"]}}\n{line}\n')
    with refused(DataError, "prompts.jsonl", value=2) as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)
