"""Encoders of other families than BERT give torch's logits, and texts are truncated at what they can read.

One layer each, because a trace takes seconds; the tiny base has two.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base, find_base
from edgeadapt.bases.classifiergraph import open_session
from edgeadapt.formats.bundle import MODEL
from edgeadapt.formats.graphinputs import to_inputs
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.classifier import build, load, tensors
from edgeadapt.methods.peft.folder import read_peft
from edgeadapt.methods.peft.inputs import AdapterInputs
from export.bundle.base import export_named, wanted
from export.onnx import tasks
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from export.onnx.slotted import USUAL_HEADS, has_own_head, with_mean_head, with_own_head
from export.onnx.targets import Slots
from export.parity.compare import OnnxRunner
from tests.support import refused
from tests.support.exhaustive import few
from tests.support.models import slotted_of

POSITIONS = 24  # rows of the position embedding
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": POSITIONS,
}
DISTILBERT = {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": POSITIONS}
MODERNBERT = SIZES | {"num_hidden_layers": 2, "pad_token_id": 0, "local_attention": 8}  # the second layer is local
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": POSITIONS}
# Family, settings, layers with slots, longest text in tokens: RoBERTa's and MPNet's positions begin at 2.
Family = tuple[str, dict[str, Any], tuple[str, ...], int]
ROBERTA: Family = ("roberta", SIZES, ("query", "value"), POSITIONS - 2)
GPT: Family = ("gpt2", GPT2, ("c_attn", "c_proj"), POSITIONS)  # a decoder as an encoder, with Conv1D layers
FAMILIES: list[Family] = [
    ("distilbert", DISTILBERT, ("q_lin", "v_lin"), POSITIONS),
    ROBERTA,
    ("xlm-roberta", SIZES, ("query", "value"), POSITIONS - 2),
    ("mpnet", SIZES, ("q", "v", "o"), POSITIONS - 2),
    ("electra", SIZES | {"embedding_size": 16}, ("query", "dense"), POSITIONS),
    ("deberta-v2", SIZES, ("query_proj", "value_proj"), POSITIONS),
    ("modernbert", MODERNBERT, ("Wqkv", "Wo"), POSITIONS),
    GPT,
]
MakeFamily = Callable[..., Base]


@pytest.fixture(scope="module")
def make_family(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> MakeFamily:
    def make(kind: str, settings: dict[str, Any], head: Any = AutoModel) -> Base:
        folder: Path = tmp_path_factory.mktemp(kind)
        model = head.from_config(AutoConfig.for_model(kind, vocab_size=75, **settings))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder)
        (folder / "tokenizer.json").write_bytes((tiny_base.folder / "tokenizer.json").read_bytes())
        return find_base(str(folder))

    return make


def answers(exported: ExportedBase, ids: np.ndarray, mask: np.ndarray, inputs: Any) -> np.ndarray:
    session = open_session((exported.folder / MODEL).read_bytes(), exported.folder, exported.manifest.slots)
    found: np.ndarray = session.run(["logits"], {"input_ids": ids, "attention_mask": mask, **inputs})[0]
    return found


def exact(model: torch.nn.Module, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """In double precision: with random weights torch's own float32 is sometimes less exact than the graph's."""
    with torch.no_grad():
        found = model.double()(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    logits: np.ndarray = getattr(found, "logits", found).numpy()
    return logits


@pytest.mark.parametrize("family", few(FAMILIES, ROBERTA, GPT))
def test_each_family_gives_torchs_logits_up_to_its_longest_text(make_family: MakeFamily, family: Family) -> None:
    kind, settings, targets, longest = family
    base = make_family(kind, settings)
    model = build(base, 3, PeftConfig.lora(rank=4, alpha=6, targets=targets))
    rng = np.random.default_rng(0)
    load(model, {name: rng.standard_normal(v.shape, dtype=np.float32) for name, v in tensors(model).items()})
    exported = export_classifier(slotted_of(model), base, Profile.FP32)
    tokenizer = OnnxRunner.open(exported.folder, exported.manifest).tokenizer
    assert len(tokenizer.encode("lock " * 100).ids) == longest
    inputs = to_inputs(tensors(model), exported.adapter_inputs.scaling)
    ids = rng.integers(4, 75, (3, longest))
    mask = np.ones_like(ids)
    mask[1, 5:] = mask[2, 1:] = 0
    ids *= mask
    expected = exact(model, ids, mask)
    found = answers(exported, ids, mask, inputs)
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1.0, float(np.abs(expected).max())))


HEADS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "bert": (SIZES, ("query", "value")),
    "distilbert": (DISTILBERT, ("q_lin", "v_lin")),  # of the head's two layers, the second is the adapter's
    "roberta": (SIZES, ("query", "value")),  # both are
}


@pytest.mark.parametrize("kind", few(HEADS, "distilbert"))
def test_the_bases_own_head_takes_an_adapter_from_peft_with_any_number_of_labels(
    make_family: Any, tmp_path: Path, kind: str
) -> None:
    settings, targets = HEADS[kind]
    base = make_family(kind, settings | {"num_labels": 3}, AutoModelForSequenceClassification)
    assert has_own_head(base)
    exported = export_classifier(with_own_head(base, targets), base, Profile.FP32)
    inner = pretrained.load(base, AutoModelForSequenceClassification, num_labels=7, saved=USUAL_HEADS)
    theirs = get_peft_model(inner, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=list(targets))).eval()
    rng = np.random.default_rng(0)
    load(theirs, {name: rng.standard_normal(v.shape, dtype=np.float32) for name, v in tensors(theirs).items()})
    theirs.save_pretrained(tmp_path)
    read = read_peft(tmp_path)
    inputs = to_inputs(read.tensors, AdapterInputs.of_tensors(read.peft_config, read.tensors).scaling)
    ids = rng.integers(4, 75, (2, 9))
    mask = np.ones_like(ids)
    expected = exact(theirs, ids, mask)
    assert expected.shape == (2, 7)
    found = answers(exported, ids, mask, inputs)
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("settings", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}])
def test_a_head_that_is_not_single_label_is_refused(make_family: Any, settings: dict[str, Any]) -> None:
    base = make_family("bert", SIZES | settings, AutoModelForSequenceClassification)
    with refused(ConfigError, "head", value=settings.get("num_labels", 2)):
        with_own_head(base, ("query",))


def test_a_model_that_reads_far_fewer_tokens_than_it_states_is_refused() -> None:
    def short(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return torch.zeros(9)[input_ids.shape[1] - 1]

    assert tasks.readable_length(short, [5, 6], 12) == 9
    with refused(ConfigError, "max_position_embeddings", value=20):
        tasks.readable_length(short, [5, 6], 20)


def test_xlnet_is_refused_by_what_it_lacks(make_family: MakeFamily) -> None:
    base = make_family("xlnet", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16})  # states -1 positions
    with refused(ConfigError, "--targets"):
        with_mean_head(base, ("query",))
    model, tokenizer = with_mean_head(base, ("layer_1",)), base.folder / "tokenizer.json"
    with refused(ConfigError, "max_position_embeddings", value=None):
        export_classifier(model, base, Profile.FP32)
    truncation = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"truncation": truncation}))
    with refused(ConfigError, "torch.onnx"):
        export_classifier(model, base, Profile.FP32)


@pytest.mark.exhaustive
def test_a_family_that_takes_1_for_padding_whatever_it_states_reads_its_longest_text(make_family: MakeFamily) -> None:
    base = make_family("mpnet", SIZES | {"pad_token_id": 0})
    exported = export_classifier(slotted_of(build(base, 3, PeftConfig.lora(targets=("q", "v")))), base, Profile.FP32)
    runner = OnnxRunner.open(exported.folder, exported.manifest)
    ids = runner.tokenizer.encode("lock " * 100).ids
    assert len(ids) == POSITIONS - 2
    empty = {
        name: np.zeros([int(d) if d.isdigit() else 3 for d in dimensions], np.float32)
        for name, dimensions in exported.manifest.slots.items()
    }
    assert runner.logits(ids, empty).shape == (1, 3)


FUNNEL = {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1]}
REFUSED: list[Any] = [
    ("funnel", FUNNEL, AutoModelForSequenceClassification, ("q_head",), "max_position_embeddings"),
    ("canine", SIZES, AutoModelForSequenceClassification, ("query",), "model_type"),
    ("distilbert", DISTILBERT, AutoModelForSequenceClassification, ("q_lin", "pre_classifier"), "--targets"),
    ("big_bird", SIZES, AutoModelForSequenceClassification, ("query",), "attention_type"),
    ("clip", {}, AutoModel, ("q_proj",), "CLIPModel"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0])
def test_what_cannot_be_exported_is_refused_in_one_line_and_nothing_else_is_printed(
    make_family: Any, capfd: pytest.CaptureFixture[str], case: Any
) -> None:
    kind, settings, head, targets, about = case
    base = make_family(kind, settings | {"num_labels": 3} if kind != "clip" else settings, head)
    capfd.readouterr()
    with refused(ConfigError, about) as caught:
        export_named(str(base.folder), "fp32", wanted(base, task="text-classification", slots=Slots.of(targets)))
    assert len(str(caught.value)) < 400
    printed = capfd.readouterr()
    assert not printed.out
    assert "def forward" not in printed.err
    assert "symbolic_shapes" not in printed.err


def test_convolution_layers_are_refused_by_name(make_family: MakeFamily) -> None:
    base = make_family("squeezebert", SIZES | {"embedding_size": 32})
    with refused(ConfigError, "Conv1d") as caught:
        with_mean_head(base, ("query",))
    assert "attention.query" in str(caught.value)
