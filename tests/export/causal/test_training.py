"""The training graph of a language model: torch's gradients, over the weights that the device answers with."""

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.nn.functional import cross_entropy

from aggregation.errors import ConfigError
from edgeadapt.bases.base import Base
from edgeadapt.bases.traininggraph import TrainingBatch, TrainingGraph, missing_slots
from edgeadapt.formats.bundle import TRAINING
from edgeadapt.formats.graphinputs import PREFIX, PROMPT, to_inputs
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods import causal
from export.bundle.base import export_named, wanted
from export.causal import export_causal
from export.onnx import derivatives, gradients
from export.onnx.exported import ExportedBase, Profile
from export.onnx.targets import SlotKind, Slots
from tests.support.exhaustive import few
from tests.support.models import MakeLm, adapter_inputs
from tests.support.training import check_shared_weights, round_as

TARGETS = ("q_proj", "v_proj", "down_proj")
LORA = PeftConfig.lora(rank=3, alpha=6, targets=TARGETS)
Exported = Callable[[Profile], ExportedBase]
VIRTUAL = Slots((), frozenset({SlotKind.PROMPT, SlotKind.PREFIX}))  # test_language_step.py has them too


@pytest.fixture(scope="module")
def trained(lm_base: Base) -> Exported:
    return cache(lambda profile: export_causal(lm_base, TARGETS, profile, training=True))


def opened(exported: ExportedBase) -> TrainingGraph:
    return TrainingGraph(exported.read(TRAINING), exported.folder)


def batch_of(lengths: list[int], seed: int = 0) -> TrainingBatch:
    """Padded rows, of which the second half of each is learned."""
    rng, longest = np.random.default_rng(seed), max(lengths)
    mask = (np.arange(longest) < np.array(lengths)[:, None]).astype(np.int64)
    ids = rng.integers(3, 90, mask.shape) * mask
    places = [row * longest + at for row, length in enumerate(lengths) for at in range(length // 2, length)]
    shares = rng.random(len(places), dtype=np.float32)
    return TrainingBatch(ids, mask, rng.integers(3, 90, len(places)), shares, np.array(places))


def in_torch(base: Base, exported: ExportedBase, batch: TrainingBatch, values: Tensors) -> tuple[float, Tensors, Any]:
    """Torch's loss, gradients in peft's own model, and scaling."""
    model = causal.build(base, LORA)
    round_as(exported, model.get_base_model())
    causal.load(model, values)
    logits = model(input_ids=torch.from_numpy(batch.ids), attention_mask=torch.from_numpy(batch.mask)).logits
    learned = logits.flatten(0, 1)[torch.from_numpy(batch.positions)]
    losses = cross_entropy(learned, torch.from_numpy(batch.targets), reduction="none")
    loss = (losses * torch.from_numpy(batch.shares)).sum()
    loss.backward()
    found = {name.replace(".default", ""): p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}
    return float(loss.detach()), found, adapter_inputs(model).scaling


LENGTHS = ([1], [2, 1], [9, 4, 7], [33, 40])
PAIRS = list(zip(Profile, LENGTHS, strict=True))


@pytest.mark.parametrize("pair", few(itertools.product(Profile, LENGTHS), *PAIRS), ids=str)
def test_the_gradients_are_torchs_for_any_batch_and_length_over_the_weights_of_the_answering_graph(
    lm_base: Base, trained: Exported, pair: tuple[Profile, list[int]]
) -> None:
    profile, (rng, batch) = pair[0], (np.random.default_rng(1), batch_of(pair[1]))
    shapes = {name: value.shape for name, value in causal.tensors(causal.build(lm_base, LORA)).items()}
    values = {name: rng.standard_normal(shape, dtype=np.float32) / 4 for name, shape in shapes.items()}
    check_shared_weights(trained(profile), 0)
    assert not missing_slots(opened(trained(profile)), trained(profile).manifest.slots)
    wanted_loss, expected, scaling = in_torch(lm_base, trained(profile), batch, values)
    loss, found = opened(trained(profile)).gradients(batch, to_inputs(values, scaling))
    assert loss == pytest.approx(wanted_loss, rel=1e-4)
    # What moves an input by so much moves it by the transpose of what peft's tensor moves: B's is scaled once more.
    for name, value in to_inputs(expected, {path: 1 / factor for path, factor in scaling.items()}).items():
        np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=3e-5 * max(1.0, float(np.abs(value).max())))


def test_a_score_is_that_of_the_logits(lm_base: Base, trained: Exported) -> None:
    batch, model = batch_of([9, 4]), causal.build(lm_base, LORA)
    graph = opened(trained(Profile.FP32))
    inputs = to_inputs(causal.tensors(model), adapter_inputs(model).scaling)
    logits = model(input_ids=torch.from_numpy(batch.ids), attention_mask=torch.from_numpy(batch.mask)).logits
    learned = logits.flatten(0, 1)[torch.from_numpy(batch.positions)].detach()
    likely = TrainingBatch(batch.ids, batch.mask, learned.argmax(1).numpy(), batch.shares, batch.positions)
    for each, every in ((batch, False), (likely, True)):
        nats, hits = graph.scores(each, inputs)
        expected = cross_entropy(learned, torch.from_numpy(each.targets), reduction="none")
        np.testing.assert_allclose(-nats, expected, rtol=1e-4)
        assert hits.all() == every


@pytest.mark.parametrize(
    ("rule", "slots", "about"),
    [
        ("Slice", TARGETS, "q_proj"),
        ("Expand", VIRTUAL, PROMPT),
        pytest.param("Expand", Slots(("q_proj",), frozenset({SlotKind.PREFIX})), PREFIX, marks=pytest.mark.exhaustive),
    ],
)
def test_a_graph_whose_gradients_are_one_percent_off_is_refused(
    lm_base: Base, monkeypatch: pytest.MonkeyPatch, rule: str, slots: Any, about: str
) -> None:
    right = derivatives.RULES[rule]

    def off(to: Any, node: onnx.NodeProto, gradient: str, wanted: set[int]) -> dict[int, str]:
        return {n: to.add("Mul", name, to.number(1.01)) for n, name in right(to, node, gradient, wanted).items()}

    monkeypatch.setattr(derivatives, "RULES", derivatives.RULES | {rule: off})
    with pytest.raises(ConfigError) as caught:
        export_causal(lm_base, slots, Profile.FP32, training=True)
    assert about in caught.value.about


def test_virtual_tokens_are_compared_at_the_size_that_they_have_in_use(
    lm_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared, run = list[Tensors](), gradients.TrainingGraph.gradients

    def kept(graph: TrainingGraph, batch: TrainingBatch, inputs: Tensors) -> tuple[float, Tensors]:
        compared.append(inputs)
        return run(graph, batch, inputs)

    monkeypatch.setattr(gradients.TrainingGraph, "gradients", kept)
    exported = export_causal(lm_base, VIRTUAL, Profile.FP32, training=True)
    assert 0 < (exported.gradients or 0) <= gradients.LANGUAGE_LIMIT
    table = causal.build(lm_base, LORA).get_input_embeddings().weight.detach().numpy()
    prompts = [inputs[PROMPT] for inputs in compared if inputs[PROMPT].size]
    assert len(prompts) > 1
    assert all((table == row).all(axis=1).any() for prompt in prompts for row in prompt)
    assert np.concatenate([inputs[PREFIX].ravel() for inputs in compared]).std() == pytest.approx(1, abs=0.1)


@pytest.mark.exhaustive
def test_a_base_with_few_positions_has_gradients_of_virtual_tokens(make_lm: MakeLm) -> None:
    base = make_lm("gpt2", n_embd=64, n_layer=1, n_head=4, n_positions=5)
    kinds = frozenset({SlotKind.LOW_RANK, SlotKind.PROMPT, SlotKind.PREFIX})
    made = export_causal(base, Slots(("c_attn",), kinds), Profile.NATIVE_INT8, training=True)  # holds them to torch's
    assert not missing_slots(opened(made), made.manifest.slots)


@pytest.mark.parametrize("profile", few([Profile.NATIVE_INT8, Profile.WEB_INT8], Profile.NATIVE_INT8))
def test_a_tied_output_layer_has_the_norms_of_its_stored_bytes(make_lm: MakeLm, profile: Profile) -> None:
    kinds = frozenset({SlotKind.LOW_RANK, SlotKind.SCALE, SlotKind.OFFSET})
    base = make_lm("llama", tie_word_embeddings=True)
    made = export_causal(base, Slots(("q_proj", "lm_head"), kinds), profile, training=True)  # holds norms to torch's
    assert "lm_head" in opened(made).normed


@pytest.mark.exhaustive
def test_another_family_with_an_output_layer_of_its_own_has_one(make_lm: MakeLm) -> None:
    base = make_lm("qwen2", tie_word_embeddings=False)
    want = wanted(base, slots=Slots(("q_proj", "down_proj")))
    made = export_named(str(base.folder), "native-int8", want, training=True)
    assert not missing_slots(opened(made), made.manifest.slots)


@pytest.mark.parametrize("profile", few([Profile.FP32, Profile.NATIVE_INT8], Profile.NATIVE_INT8))
def test_queries_keys_and_values_of_one_matrix_have_gradients(make_lm: MakeLm, profile: Profile) -> None:
    base = make_lm("gpt2", n_embd=64, n_layer=1, n_head=4, n_positions=64)
    kinds = frozenset({SlotKind.LOW_RANK, SlotKind.SCALE, SlotKind.OFFSET, SlotKind.BOTTLENECK})
    made = export_causal(base, Slots(("c_attn", "mlp.c_proj"), kinds), profile, training=True)  # holds them to torch's
    assert not missing_slots(opened(made), made.manifest.slots)
    check_shared_weights(made, 16 * 1024)
