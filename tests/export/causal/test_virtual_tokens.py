"""A decoder with slots for virtual tokens gives peft's logits, on both paths and through its KV cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from aggregation.errors import ConfigError
from edgeadapt.bases.base import Base
from edgeadapt.formats.graphinputs import to_inputs, virtual_tokens, with_placeholders
from edgeadapt.formats.layout import Tensors
from edgeadapt.methods.peft.folder import read_peft
from export.causal import export_causal
from export.onnx import virtualtokens
from export.onnx.exported import ExportedBase, Profile
from export.onnx.targets import Slots
from tests.support import virtual

globals().update(virtual.FIXTURES)

IDS = [30, 31, 40, 7, 9, 30, 60]
WITHOUT = {"num_key_value_heads": ..., "head_dim": ..., "intermediate_size": ...}


def inputs_of(folder: Path, exported: ExportedBase) -> Tensors:
    """An adapter of virtual tokens, with what it lacks for the other slots of the base."""
    found = to_inputs(read_peft(folder).tensors, {})
    empty = {
        name: [int(size) if size.isdigit() else 0 for size in slot] for name, slot in exported.manifest.slots.items()
    }
    return {name: found.get(name, np.zeros(shape, np.float32)) for name, shape in empty.items()}


def differences(base: Base, exported: ExportedBase, runner: Any, tmp_path: Path) -> dict[str, float]:
    """By method: how far the graph's logits are from peft's, the text read at once or token by token."""
    found = {}
    for name in ("prompt", "prefix"):
        model = virtual.trained(base, name, tmp_path / name)
        inputs = inputs_of(tmp_path / name, exported)
        ids = np.array([with_placeholders(IDS, virtual_tokens(inputs))])
        expected = virtual.logits(model, IDS)
        ends = (ids.shape[1], 2, ids.shape[1] - len(IDS))  # also within the virtual tokens, and right after them
        rows = [runner(exported).logits(ids, inputs, first)[:, -len(IDS) :] for first in ends]
        found[name] = max(float(np.abs(row - expected).max()) for row in rows)
        bare = virtual.logits(model.get_base_model(), IDS)
        assert np.abs(bare - expected).max() > 0.5, "the virtual tokens decide"
        nothing = {key: value[:0] if key in virtualtokens.VIRTUAL else value for key, value in inputs.items()}
        assert runner(exported).logits(np.array([IDS]), nothing) == pytest.approx(bare, abs=1e-4)
    return found


def test_the_builder_path_gives_pefts_logits(
    llama: Base, virtual_base: ExportedBase, runner: Callable[[ExportedBase], Any], tmp_path: Path
) -> None:
    assert b"GroupQueryAttention" in virtual_base.model
    assert max(differences(llama, virtual_base, runner, tmp_path).values()) < 1e-4


@pytest.mark.exhaustive
def test_scaled_embeddings_are_those_after_scaling(make_lm: Any, runner: Any, tmp_path: Path) -> None:
    gemma = make_lm("gemma")
    exported = export_causal(gemma, Slots((), virtual.KINDS), Profile.FP32)
    assert max(differences(gemma, exported, runner, tmp_path).values()) < 1e-4


@pytest.mark.slow
def test_the_traced_path_gives_pefts_logits(make_lm: Any, runner: Any, tmp_path: Path) -> None:
    gpt2 = make_lm("gpt2", **WITHOUT)
    exported = export_causal(gpt2, Slots((), virtual.KINDS), Profile.FP32)
    assert b"GroupQueryAttention" not in exported.model
    assert max(differences(gpt2, exported, runner, tmp_path).values()) < 1e-4


def test_a_graph_that_scales_embeddings_otherwise_is_refused(virtual_base: ExportedBase) -> None:
    graph = onnx.load_from_string(virtual_base.model)
    for embedding in (virtualtokens.Embedding(98, 64, 3.0), virtualtokens.Embedding(97, 64)):
        with pytest.raises(ConfigError) as error:
            virtualtokens.insert_prompt(graph, embedding)
        assert error.value.about == "embeddings"


def test_a_cache_of_another_form_is_refused(virtual_base: ExportedBase) -> None:
    graph = onnx.load_from_string(virtual_base.model)
    for node in graph.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.op_type = "Attention"
    with pytest.raises(ConfigError) as error:
        virtualtokens.insert_prefix(graph)
    assert error.value.about == "past_key_values"
