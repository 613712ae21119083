"""A base with slots in its last layers alone: its training graph in two parts gives what the whole one gives."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from aggregation.errors import ConfigError
from edgeadapt.bases.base import Base
from edgeadapt.bases.markedwords import MARKED
from edgeadapt.bases.states import STATES
from edgeadapt.bases.traininggraph import TrainingGraph, batch_of
from edgeadapt.formats.bundle import LOWER, MODEL, TRAINING, UPPER, WEIGHTS
from edgeadapt.formats.layout import Floats
from export.bundle.base import export_named, wanted
from export.causal import export_causal
from export.features import with_lexical_features, with_marked_words
from export.onnx import classifier, gradients
from export.onnx.classifier import export_classifier, open_base
from export.onnx.exported import ExportedBase, Profile
from export.onnx.slotted import with_mean_head
from export.onnx.targets import SlotKind, Slots
from tests.support import refused
from tests.support.exhaustive import few

TOP = Slots(("query", "value"), first=-1)


def opened(exported: ExportedBase) -> TrainingGraph:
    lower = exported.read(LOWER) if LOWER in exported.manifest.files else None
    return TrainingGraph(exported.read(TRAINING), exported.folder, lower=lower)


def inputs_of(graph: bytes) -> set[str]:
    return {value.name for value in onnx.load_from_string(graph).graph.input}


def reading_ids(base: Base, folder: Path) -> tuple[Base, list[int]]:
    """A base with marks and lexical features, and the numbers of the marks."""
    made = with_lexical_features(with_marked_words(base, folder / "marked"), 64, folder / "lexical")
    return made, json.loads((made.folder / "config.json").read_bytes())[MARKED]


def drawn(exported: ExportedBase) -> dict[str, Floats]:
    rng = np.random.default_rng(3)
    shapes = {name: [int(d) if d.isdigit() else 3 for d in sizes] for name, sizes in exported.manifest.slots.items()}
    return {name: rng.standard_normal(shape, dtype=np.float32) / 4 for name, shape in shapes.items()}


def test_both_parts_give_the_gradients_of_the_whole_and_compute_the_states_of_a_text_once(
    tiny_base: Base, tmp_path: Path
) -> None:
    """The head reads token ids besides the states: those of lexical features, and which word is marked."""
    base, (begin, end) = reading_ids(tiny_base, tmp_path)
    model = with_mean_head(base, TOP)
    both = (model, replace(model, cut=False))
    parts, whole = (export_classifier(each, base, Profile.FP32, training=True) for each in both)
    assert LOWER not in whole.manifest.files
    assert all(".layer.1." in name or name.startswith("classifier.") for name in parts.manifest.slots)
    reads = {STATES, "input_ids", "attention_mask", "targets", "shares", *parts.manifest.slots}
    assert inputs_of(parts.read(TRAINING)) == reads
    assert inputs_of(parts.read(LOWER)) == {"input_ids", "attention_mask"}
    # Neither part has weights of its own.
    assert (parts.folder / WEIGHTS).stat().st_size <= (whole.folder / WEIGHTS).stat().st_size
    graph, inputs = opened(parts), drawn(parts)
    computed: list[int] = []
    assert graph.lower is not None
    run = graph.lower.computed
    graph.lower.computed = lambda texts: computed.extend(map(len, texts)) or run(texts)  # type: ignore[func-returns-value,method-assign]
    for texts in ([[5, begin, 6, 7, end], [10, 11]], [[10, 11], [5]]):
        batch = batch_of(texts, [0, 1], [0.5, 0.25])
        (loss, found), (expected, right) = (one.gradients(batch, inputs) for one in (graph, opened(whole)))
        assert loss == pytest.approx(expected, rel=1e-5)
        for name, value in right.items():
            np.testing.assert_allclose(found[name], value, atol=1e-5 * max(1.0, float(np.abs(value).max())))
    assert computed == [5, 2, 1]


@pytest.mark.parametrize("profile", few([Profile.NATIVE_INT8, Profile.NATIVE_INT4, Profile.WEB_INT8], Profile.WEB_INT8))
def test_both_parts_are_those_of_the_answering_graph_over_its_weights(tiny_base: Base, profile: Profile) -> None:
    made = export_classifier(with_mean_head(tiny_base, TOP), tiny_base, profile, training=True)
    names = (LOWER, UPPER, MODEL)
    lower, upper, answering = (onnx.load_from_string(made.read(name)).graph for name in names)
    assert "input_ids" not in inputs_of(made.read(TRAINING))
    below, above, nodes = ({node.name: node.op_type for node in graph.node} for graph in (lower, upper, answering))
    assert nodes == below | above
    assert all({"MatMulInteger", "MatMulNBits"}.intersection(part.values()) for part in (below, above))
    places = [
        {tensor.name: [(each.key, each.value) for each in tensor.external_data] for tensor in graph.initializer}
        for graph in (lower, upper, answering)
    ]
    assert (places[0] | places[1]).items() <= places[2].items()


@pytest.mark.parametrize("profile", few([Profile.FP32, Profile.NATIVE_INT4], Profile.NATIVE_INT4))
def test_a_language_model_is_cut_as_well(llama: Base, profile: Profile) -> None:
    made = export_causal(llama, Slots(("q_proj", "down_proj"), first=-1), profile, training=True)  # held to torch's
    assert STATES in inputs_of(made.read(TRAINING))
    assert "input_ids" not in inputs_of(made.read(TRAINING))
    assert all("layers.1." in name for name in made.manifest.slots)


def test_states_of_another_place_are_refused(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    right = classifier.training_graphs

    def off(*given: object, **options: object) -> dict[str, onnx.ModelProto]:
        graphs: dict[str, onnx.ModelProto] = right(*given, **options)  # type: ignore[arg-type]
        for node in graphs[LOWER].graph.node:
            node.output[:] = ["before" if name == STATES else name for name in node.output]
        graphs[LOWER].graph.node.append(onnx.helper.make_node("Neg", ["before"], [STATES]))
        return graphs

    monkeypatch.setattr(classifier, "training_graphs", off)
    with refused(ConfigError, LOWER):
        export_classifier(with_mean_head(tiny_base, TOP), tiny_base, Profile.FP32, training=True)
    made = export_classifier(with_mean_head(tiny_base, TOP), tiny_base, Profile.FP32, training=None)
    assert not {LOWER, TRAINING}.intersection(made.manifest.files)
    assert not (made.folder / LOWER).exists()


def test_the_upper_part_is_held_to_torch(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "LIMIT", 0.0)
    with pytest.raises(ConfigError):
        export_classifier(with_mean_head(tiny_base, TOP), tiny_base, Profile.FP32, training=True)


@pytest.mark.parametrize(
    "slots",
    [
        lambda: Slots(("query",), first=-3),  # of two layers
        lambda: Slots(("query", "encoder.layer.0.output.dense"), first=-1),
        lambda: Slots(layers=("encoder.encoder.layer.0.attention.self.query",), first=-1),
        lambda: Slots(vectors=("encoder.encoder.layer.0.output.dense.output_scale",), first=-1),
        lambda: Slots(("query",), frozenset({SlotKind.PROMPT}), first=-1),
    ],
    ids=["too many layers", "a target", "an adapter's layer", "an adapter's vector", "virtual tokens"],
)
def test_what_is_below_the_last_layers_is_refused(tiny_base: Base, slots: Callable[[], Slots]) -> None:
    with refused(ConfigError, "--layers"):
        with_mean_head(tiny_base, slots())


def test_no_vector_is_below_the_last_layers(tiny_base: Base) -> None:
    slots = Slots(("dense",), frozenset({SlotKind.SCALE, SlotKind.NORMS}), first=-1)
    names = with_mean_head(tiny_base, slots).inputs.vectors
    assert len(names) > 4
    assert all(".layer.1." in name for name in names)


def test_a_named_base_with_slots_in_its_last_layers_is_cut(tiny_base: Base) -> None:
    made = export_named(str(tiny_base.folder), "fp32", wanted(tiny_base, slots=TOP))
    assert LOWER in made.manifest.files


@pytest.mark.parametrize("profile", few(Profile, Profile.FP32, Profile.NATIVE_INT8))
def test_both_parts_give_the_answers_of_the_whole_bit_for_bit(
    tiny_base: Base, profile: Profile, tmp_path: Path
) -> None:
    base, (begin, end) = reading_ids(tiny_base, tmp_path) if profile is Profile.FP32 else (tiny_base, (9, 7))
    made = export_classifier(with_mean_head(base, TOP), base, profile, training=True)
    graphs = [
        open_base(made.folder, names, made.manifest.slots, made.manifest.independent_rows)
        for names in (made.manifest.files, [MODEL])
    ]
    adapters = [classifier._random(made.manifest.slots, seed) for seed in range(3)]
    rows = [(text, adapter) for text in ([2, begin, 8, end, 3], [2, 11, 3], [2]) for adapter in adapters]
    for text, adapter in rows:
        parts, whole = (graph.logits(text, graph.feeds(adapter)) for graph in graphs)
        np.testing.assert_array_equal(parts, whole)
    parts, whole = (graph.mixed(*zip(*rows, strict=True)) for graph in graphs)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6 * float(np.abs(whole).max()))


def test_a_base_that_no_device_trains_is_cut_as_well(tiny_base: Base) -> None:
    made = export_classifier(with_mean_head(tiny_base, TOP), tiny_base, Profile.FP32)
    assert made.manifest.files.keys() >= {LOWER, UPPER}
    assert TRAINING not in made.manifest.files


def test_a_base_whose_slots_begin_in_its_first_layer_has_one_graph(tiny_base: Base) -> None:
    made = export_classifier(with_mean_head(tiny_base, ("query",)), tiny_base, Profile.FP32, training=True)
    assert not {LOWER, UPPER}.intersection(made.manifest.files)
