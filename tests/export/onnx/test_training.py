"""A base's training graph: torch's gradients, over the weights that the device answers with; held to that at export."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from aggregation.errors import ConfigError, TrustError
from aggregation.pki.identity import IdentityKey
from edgeadapt.bases.base import Base
from edgeadapt.bases.traininggraph import TrainingBatch, TrainingGraph, missing_slots
from edgeadapt.formats.bundle import MODEL, TRAINING, Bundle
from edgeadapt.formats.graphinputs import to_inputs
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.classifier import build, load, tensors
from export.bundle.write import write_bundle
from export.onnx import classifier, derivatives, gradients, training
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from export.onnx.peftmodel import layer_weight
from export.onnx.slotted import with_mean_head, with_own_head
from export.onnx.targets import SlotKind, Slots
from tests.support import refused
from tests.support.exhaustive import few
from tests.support.models import adapter_inputs, slotted_of
from tests.support.training import check_shared_weights, round_as

Exported = Callable[[Profile], ExportedBase]


@pytest.fixture(scope="module")
def trained(model: PeftModel, tiny_base: Base) -> Exported:
    made = {profile: export_classifier(slotted_of(model), tiny_base, profile, training=True) for profile in Profile}
    return made.__getitem__


def opened(exported: ExportedBase) -> TrainingGraph:
    return TrainingGraph(exported.read(TRAINING), exported.folder)


def in_torch(
    base: Base, exported: ExportedBase, config: PeftConfig, labels: int, values: Tensors, batch: TrainingBatch
) -> Tensors:
    """Torch's gradients in peft's own model, in peft's names, on the weights of the profile."""
    import torch

    model = build(base, labels, config)
    round_as(exported, model.get_base_model().encoder)
    load(model, values)
    logits = model(input_ids=torch.from_numpy(batch.ids), attention_mask=torch.from_numpy(batch.mask))
    losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.targets), reduction="none")
    (losses * torch.from_numpy(batch.shares)).sum().backward()
    found = {name: p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}
    return {name.replace(".default", "").replace("modules_to_save.", ""): value for name, value in found.items()}


@given(
    rank=st.integers(1, 9),
    labels=st.integers(2, 9),
    texts=st.integers(1, 4),
    length=st.integers(1, 24),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=6, deadline=None)
@pytest.mark.parametrize("profile", Profile)
def test_the_gradients_are_torchs_for_any_rank_labels_batch_and_length_over_the_weights_of_the_answering_graph(
    tiny_base: Base, trained: Exported, profile: Profile, rank: int, labels: int, texts: int, length: int, seed: int
) -> None:
    rng, config = np.random.default_rng(seed), PeftConfig.lora(rank=rank, alpha=3)
    model = build(tiny_base, labels, config)
    values = {n: rng.standard_normal(v.shape, dtype=np.float32) / 3 for n, v in tensors(model).items()}
    mask = (np.arange(length) < rng.integers(1, length + 1, (texts, 1))).astype(np.int64)
    shares = rng.random(texts, dtype=np.float32)
    batch = TrainingBatch(rng.integers(4, 60, mask.shape) * mask, mask, rng.integers(0, labels, texts), shares)
    scaling = adapter_inputs(model).scaling
    check_shared_weights(trained(profile), 0)
    loss, found = opened(trained(profile)).gradients(batch, to_inputs(values, scaling))
    expected = in_torch(tiny_base, trained(profile), config, labels, values, batch)
    assert loss > 0
    # What moves an input by so much moves it by the transpose of what peft's tensor moves: B's is scaled once more.
    for name, value in to_inputs(expected, {path: 1 / factor for path, factor in scaling.items()}).items():
        np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=2e-5 * max(1.0, float(np.abs(value).max())))


def test_slots_of_rank_zero_have_empty_gradients(trained: Exported, model: PeftModel) -> None:
    exported = trained(Profile.NATIVE_INT8)
    inputs = to_inputs(tensors(model), adapter_inputs(model).scaling)
    empty = {
        name: value[:, :0] if "lora_A" in name else value[:0] if "lora_B" in name else value
        for name, value in inputs.items()
    }
    ones = np.ones((2, 3), np.int64)
    batch = TrainingBatch(5 * ones, ones, np.array([0, 1]), np.full(2, 0.5, np.float32))
    _, found = opened(exported).gradients(batch, empty)
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in empty.items()}
    assert np.abs(found["classifier.weight"]).max() > 0


def test_a_batch_in_parts_has_the_gradients_of_the_whole(trained: Exported, model: PeftModel) -> None:
    opens = opened(trained(Profile.FP32))
    inputs = to_inputs(tensors(model), adapter_inputs(model).scaling)
    rng = np.random.default_rng(2)
    ids, ones = rng.integers(4, 60, (5, 7)), np.ones((5, 7), np.int64)
    targets, shares = rng.integers(0, 4, 5), np.full(5, 0.2, np.float32)
    loss, whole = opens.gradients(TrainingBatch(ids, ones, targets, shares), inputs)
    parts = [
        opens.gradients(TrainingBatch(ids[s], ones[s], targets[s], shares[s]), inputs) for s in (slice(2), slice(2, 5))
    ]
    assert loss == pytest.approx(sum(part for part, _ in parts), rel=1e-5)
    for name, value in whole.items():
        np.testing.assert_allclose(sum(part[name] for _, part in parts), value, rtol=1e-3, atol=1e-6)


def test_the_answering_graph_is_the_same_with_and_without_a_training_graph(
    trained: Exported, exported: ExportedBase
) -> None:
    with_it, without = trained(Profile.FP32), exported
    assert [with_it.read(MODEL), set(with_it.manifest.files) - set(without.manifest.files)] == [
        without.read(MODEL),
        {TRAINING},
    ]
    assert not missing_slots(opened(with_it), with_it.manifest.slots)


def test_an_altered_training_graph_is_refused(trained: Exported, tmp_path: Path, vendor: IdentityKey) -> None:
    write_bundle(tmp_path / "bundle", trained(Profile.FP32), [], key=vendor)
    bundle = Bundle(tmp_path / "bundle", (vendor.public,))
    assert bundle.base().read(TRAINING)
    file = tmp_path / "bundle" / "base" / TRAINING
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with refused(TrustError, TRAINING):
        bundle.base()


@pytest.mark.parametrize("kind", ["LayerNormalization", "MatMul"])
def test_a_graph_whose_gradients_are_one_percent_off_is_refused(
    model: PeftModel, tiny_base: Base, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    right = derivatives.RULES[kind]

    def off(to: object, node: onnx.NodeProto, gradient: str, wanted: set[int]) -> dict[int, str]:
        found = dict(right(to, node, gradient, wanted))  # type: ignore[arg-type]
        return {n: to.add("Mul", name, to.number(1.01)) for n, name in found.items()}  # type: ignore[attr-defined]

    monkeypatch.setattr(derivatives, "RULES", derivatives.RULES | {kind: off})
    with pytest.raises(ConfigError) as caught:
        export_classifier(slotted_of(model), tiny_base, Profile.FP32, training=True)
    assert caught.value.about in adapter_inputs(model).names


@pytest.mark.parametrize("profile", few([Profile.NATIVE_INT4, Profile.WEB_INT8], Profile.NATIVE_INT4))
def test_a_graph_over_other_weights_is_refused(
    model: PeftModel, tiny_base: Base, monkeypatch: pytest.MonkeyPatch, profile: Profile
) -> None:
    monkeypatch.setattr(classifier, "as_stored", lambda slotted, *_: slotted)  # torch keeps the weights in float
    with pytest.raises(ConfigError):
        export_classifier(slotted_of(model), tiny_base, profile, training=True)


def test_an_operator_without_a_derivative_is_refused_only_where_a_training_graph_is_demanded(
    model: PeftModel, tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derivatives, "RULES", {k: rule for k, rule in derivatives.RULES.items() if k != "Softmax"})
    with refused(ConfigError, "Softmax"):
        export_classifier(slotted_of(model), tiny_base, Profile.FP32, training=True)
    made = export_classifier(slotted_of(model), tiny_base, Profile.FP32, training=None)
    assert "Softmax" in made.untrainable
    assert TRAINING not in made.manifest.files


def test_a_base_whose_gradients_are_off_is_exported_without_a_training_graph_by_default(
    model: PeftModel, tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "LIMIT", 0.0)
    made = export_classifier(slotted_of(model), tiny_base, Profile.FP32, training=None)
    assert made.untrainable
    assert TRAINING not in made.manifest.files
    assert not (made.folder / TRAINING).exists()


@pytest.mark.parametrize("profile", few([Profile.FP32, Profile.WEB_INT8], Profile.FP32))
def test_slots_of_every_kind_have_gradients(tiny_base: Base, profile: Profile) -> None:
    # Biases are left out: that of the pooler, which no answer reads, has no gradient.
    kinds = frozenset(SlotKind) - {SlotKind.PROMPT, SlotKind.PREFIX, SlotKind.BIASES}
    slotted = with_mean_head(tiny_base, Slots(("query", "intermediate.dense"), kinds))
    made = export_classifier(slotted, tiny_base, profile, training=True)  # and holds them to torch's
    assert not missing_slots(opened(made), made.manifest.slots)
    ends = (".output_scale", ".input_scale", ".output_offset", "LayerNorm.weight.replaced")
    assert all(any(name.endswith(end) for name in made.manifest.slots) for end in ends)


def test_a_norm_of_other_weights_is_refused(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    slotted = with_mean_head(tiny_base, Slots(("query",), frozenset({SlotKind.LOW_RANK, SlotKind.SCALE})))
    other = slotted.model.get_submodule("encoder.encoder.layer.0.attention.self.key")
    monkeypatch.setattr(training, "layer_weight", lambda _: layer_weight(other))
    with refused(ConfigError, "encoder.encoder.layer.0.attention.self.query.weight_norm"):
        export_classifier(slotted, tiny_base, Profile.FP32, training=True)


def test_the_first_token_as_the_answers_source_has_gradients(tiny_base: Base) -> None:
    slotted = with_own_head(tiny_base, ["query", "value"])  # BERT's pooler reads the first token
    made = export_classifier(slotted, tiny_base, Profile.FP32, training=True)
    assert not missing_slots(opened(made), made.manifest.slots)
