"""Slots on layers that read two dimensions, and bases whose rows change each other's answers, as a device runs them."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from aggregation.errors import ConfigError
from aggregation.pki.identity import IdentityKey
from client.inference.session import ClassificationSession, Prediction
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base, find_base
from edgeadapt.formats.layout import Layout
from edgeadapt.methods.classifier import load
from export.bundle import adapter
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.classifier import export_classifier, independent_rows
from export.onnx.exported import ExportedBase, Profile
from export.parity.compare import Limits, OnnxRunner, ParityError, compare, gate, torch_logits
from tests.support import refused
from tests.support.exhaustive import few
from tests.support.models import draw, slotted_of

LIMITS = Limits(0.995, 0.01)
LABELS = ("Light", "Lock", "Music")
TEXTS = ("lock the door", "unlock", "set a timer for ten minutes and play the music in the kitchen", "play music")
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 40}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
BOTTLENECK = {"embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], bool]] = {
    "bert": ("bert", {}, ("query", "value", "dense"), True),
    "convbert": ("convbert", {"embedding_size": 32, "head_ratio": 2}, ("query", "value"), False),
    "fnet": ("fnet", {}, ("dense",), False),
    "mobilebert": ("mobilebert", BOTTLENECK, ("query", "value"), False),
    "deberta-v2": ("deberta-v2", RELATIVE, ("query_proj", "key_proj", "dense"), False),
    "electra": ("electra", {"embedding_size": 16}, ("query", "dense"), True),
}


@pytest.fixture(scope="module", params=few(FAMILIES, "bert", "fnet"))
def family(
    request: pytest.FixtureRequest, tiny_base: Base, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ExportedBase, Any, bool]:
    """An export with slots on every layer named, its torch model, and whether its rows are independent."""
    kind, settings, targets, independent = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(kind)
    config = AutoConfig.for_model(kind, vocab_size=75, num_hidden_layers=1, num_labels=3, **SIZES, **settings)
    model = AutoModelForSequenceClassification.from_config(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    shutil.copy(tiny_base.folder / "tokenizer.json", folder)
    base = find_base(str(folder))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="SEQ_CLS")
    peft = get_peft_model(pretrained.load(base, AutoModelForSequenceClassification), config).eval()
    return export_classifier(slotted_of(peft), base, Profile.FP32), peft, independent


@pytest.fixture
def opened(family: tuple[ExportedBase, Any, bool], tmp_path: Path, vendor: IdentityKey) -> ClassificationSession:
    """A device with two adapters of the family."""
    exported, model, _ = family
    sources = [
        AdapterSource(name, values, LABELS, 1, Layout.of(values).digest)
        for name, values in (("global", draw(model, 1)), ("anna", draw(model, 2)))
    ]
    write_bundle(tmp_path / "bundle", exported, sources, key=vendor, form="fp32")
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    return ClassificationSession.open(tmp_path / "bundle")


def expected(family: tuple[ExportedBase, Any, bool], seed: int, text: str) -> dict[str, float]:
    exported, model, _ = family
    load(model, draw(model, seed))
    tokenizer = OnnxRunner.open(exported.folder, exported.manifest).tokenizer
    logits = torch_logits(model, tokenizer.encode(text).ids)[0]
    weights = np.exp(logits - logits.max())
    return dict(zip(LABELS, (weights / weights.sum()).tolist(), strict=True))


def as_dict(ranking: list[Prediction]) -> dict[str, float]:
    return {one.label: one.probability for one in ranking}


def test_a_device_gives_torchs_answers_alone_and_in_a_mixed_batch(
    family: tuple[ExportedBase, Any, bool], opened: ClassificationSession
) -> None:
    assert family[0].manifest.independent_rows == family[2]
    rows = [(text, name) for text in TEXTS for name in ("global", "anna")]
    together = opened.rank_mixed(rows, 3)
    for (text, name), found in zip(rows, together, strict=True):
        torchs = expected(family, 1 if name == "global" else 2, text)
        assert as_dict(opened.rank([text], name, 3)[0]) == pytest.approx(torchs, abs=1e-4)
        assert as_dict(found) == pytest.approx(torchs, abs=1e-4)


def test_parity_asks_alone_and_in_a_mixed_batch_and_refuses_a_false_promise_of_independent_rows(
    family: tuple[ExportedBase, Any, bool],
) -> None:
    exported, model, independent = family
    values = draw(model, 1)
    load(model, values)
    inputs = adapter.decode(adapter.encode(values, exported.adapter_inputs, "fp32"), "fp32")
    found = compare(model, OnnxRunner.open(exported.folder, exported.manifest), inputs, TEXTS)
    assert found.max_abs_diff < 1e-4
    assert found.mixed_diff < 1e-5
    gate(found, LIMITS)
    if not independent:
        promised = replace(exported.manifest, independent_rows=True)
        with refused(ParityError, "parity"):
            gate(compare(model, OnnxRunner.open(exported.folder, promised), inputs, TEXTS), LIMITS)


def test_a_graph_that_does_not_run_is_refused_at_export(exported: ExportedBase) -> None:
    with refused(ConfigError, "onnxruntime"):
        independent_rows(
            exported.folder, exported.manifest.files, exported.manifest.slots, [10**6], (1, 16)
        )  # no such token
