"""Each adapter method that is trained, through the real apps: secure aggregation, an audit, plain peft and a bundle."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from client.training.engine import classifier_trainer, language_trainer
from client.training.examples import Example, Split
from edgeadapt.auditing import AuditInput, AuditOptions, Check, Status
from edgeadapt.bases import pretrained
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.methods import causal
from edgeadapt.methods.classifier import PhraseClassifier, padded
from edgeadapt.methods.parts import Part, part_of
from edgeadapt.methods.peft.folder import to_peft
from export.bundle.base import resolved, wanted
from export.bundle.sources import from_registry
from export.bundle.write import device_inputs
from export.causal import export_causal
from export.onnx.classifier import export_classifier
from export.onnx.exported import Profile
from export.onnx.slotted import with_mean_head
from export.parity import compare
from export.parity.compare import OnnxRunner
from tests.support import FleetOf
from tests.support.authors import AUTHORS, fleet_of_authors, texts
from tests.support.exhaustive import few
from tests.support.models import llama, make_lm

__all__ = ["llama", "make_lm"]  # fixtures

DEVICES = 4
TEXTS = ["turn on the light", "stop the music"]
METHODS: dict[str, dict[str, Any]] = {
    "rslora": {"rank": 4, "bias": "lora_only"},
    "lora": {"rank": 2, "bias": "all"},
    "dora": {"rank": 2, "bias": "lora_only"},
    "adalora": {"rank": 4},
    "loha": {"rank": 3},
    "vera": {"rank": 24},
    "ia3": {},
    "ln_tuning": {},
    "beft": {"targets": ["query", "value", "output.dense"]},
    "bottleneck_gelu": {"rank": 3, "targets": ["output.dense", "output.LayerNorm"]},
}


# Each method is run with one kind of base; `make exhaustive` runs it with the other one too.
@pytest.mark.parametrize("method", few(METHODS, "rslora", "lora"))
def test_a_method_is_federated_audited_opened_by_peft_and_exported(
    app_fleet_of: FleetOf, tmp_path: Path, method: str
) -> None:
    settings = {"method": method, **METHODS[method]}
    fleet = app_fleet_of(DEVICES, adapter=settings, aggregation__keep_masked_inputs=True, rounds=2)
    records = fleet.federate(fleet.grid())
    assert [record.version for record in records] == [1, 2]
    registry = fleet.registry()
    config, last = registry.version(2).manifest.peft_config, registry.tensors(2)
    before = registry.tensors(0)
    require_all_trained(before, last)
    assert Part.HEAD in map(part_of, last)
    require_recomputed(fleet, 2)
    trainer = classifier_trainer(fleet.base, len(fleet.population.labels), config)
    assert trainer.layout == Layout.of(last)
    expected = trainer.logits(last, TEXTS)
    assert np.abs(expected - trainer.logits(before, TEXTS)).max() > 1e-3

    origin = from_registry(fleet.out / "coordinator", None, None)
    to_peft(origin.tensors, origin.peft_config, tmp_path / "peft")
    encoder = pretrained.load(fleet.base, AutoModel)
    plain = PhraseClassifier(encoder, len(fleet.population.labels))
    opened = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
    ids = [torch.tensor(trainer.tokenizer.encode(text).ids) for text in TEXTS]
    with torch.no_grad():
        found = opened(*padded(ids)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)

    exported_from = resolved(origin, fleet.base)
    slots = wanted(fleet.base, exported_from).slots
    exported = export_classifier(with_mean_head(fleet.base, slots), fleet.base, Profile.FP32)
    runner = OnnxRunner.open(exported.folder, exported.manifest)
    answers = runner.classify(TEXTS, device_inputs(exported_from, exported.manifest, "fp32"))
    np.testing.assert_allclose(answers, expected, atol=1e-4)


def require_all_trained(before: Tensors, after: Tensors) -> None:
    """Every tensor has moved, except those that are frozen."""
    moved = {name for name in after if not np.array_equal(after[name], before[name])}
    assert moved == {name for name in after if part_of(name) is not Part.FROZEN}


def require_recomputed(fleet: Any, rounds: int) -> None:
    """An audit recomputes each adapter from the masked inputs, bit for bit."""
    reports = AuditInput.open(fleet.out / "coordinator", AuditOptions()).audit(unfinished=False)
    (finding,) = (each for report in reports.values() for each in report.findings if each.check is Check.ADAPTERS)
    assert finding.status is Status.PASS, finding
    assert f"{rounds} of {rounds} recomputed" in finding.text


LANGUAGE: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "bias": "lora_only"},
    "dora": {"rank": 2},
    "adalora": {"rank": 4},
    "loha": {"rank": 3},
    "vera": {"rank": 24},
    "ia3": {},
    "ln_tuning": {},
    "beft": {},
    "bottleneck": {"rank": 3},
    "prompt_tuning": {"virtual_tokens": 4},
    "prefix_tuning": {"virtual_tokens": 3},
}


@pytest.mark.parametrize("method", few(LANGUAGE, *set(LANGUAGE) - {"lora"}))
def test_a_method_of_a_language_model_is_federated_audited_opened_by_peft_and_exported(
    one_thread: None, llama: Any, make_lm: Any, tmp_path: Path, method: str
) -> None:
    llama = make_lm(attention_bias=True) if "bias" in LANGUAGE[method] else llama
    fleet = fleet_of_authors(tmp_path / "fleet", llama, {"method": method, **LANGUAGE[method]})
    fleet.configure({"rounds": 2, "training.learning_rate": 0.05})
    records = fleet.federate(fleet.grid())
    assert [record.version for record in records] == [1, 2]
    require_recomputed(fleet, 2)
    registry = fleet.registry()
    config, before, last = registry.version(2).manifest.peft_config, registry.tensors(0), registry.tensors(2)
    require_all_trained(before, last)
    trainer = language_trainer(llama, config)
    assert trainer.layout == Layout.of(last)
    held_out = [Example(text.text, -1, Split.VALIDATION) for words in AUTHORS.values() for text in texts(words, 3)]
    assert trainer.score(last, held_out).loss < 0.9 * trainer.score(before, held_out).loss  # .77 with vera, the slowest

    origin = from_registry(fleet.out / "coordinator", None, None)
    to_peft(origin.tensors, origin.peft_config, tmp_path / "peft")
    opened = peft.PeftModel.from_pretrained(pretrained.load(llama, AutoModelForCausalLM), tmp_path / "peft").eval()
    ids = torch.tensor([trainer.encoder.tokenizer.encode("abab ab").ids])
    causal.load(trainer.engine.model, last)
    with torch.no_grad():
        found, expected = (model(input_ids=ids).logits[:, -ids.shape[1] :] for model in (opened, trainer.engine.model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    exported_from = resolved(origin, llama)
    exported = export_causal(llama, wanted(llama, exported_from).slots, Profile.FP32)
    runner = OnnxRunner.open(exported.folder, exported.manifest)
    inputs = device_inputs(exported_from, exported.manifest, "fp32")
    parity = compare.compare(trainer.engine.model, runner, inputs, [text.text for text in held_out])
    assert parity.agreement == 1
    assert parity.max_abs_diff < 1e-4
