"""A frozen causal language model, exported once for every adapter of its layers.

A decoder that goes on from the states below all slots: a chat that changes its adapter keeps what is below.

The layers below become a branch. Where ``KEPT_RANGE`` is not empty, the other branch returns these states, and the KV
cache of these layers as it is: the runtime writes it into one buffer, which still has the tokens that were read before.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, helper, load_model_from_string, numpy_helper
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base
from edgeadapt.bases.states import KEPT_RANGE, KEPT_STATES, STATES
from edgeadapt.formats.bundle import CHAT, GENERATION, MODEL, TOKENIZER, TRAINING
from edgeadapt.formats.graphinputs import DOWN, OUTPUT_SCALE, PREFIX, PROMPT, layer_of
from edgeadapt.formats.layout import Floats
from edgeadapt.formats.manifest import BaseManifest
from edgeadapt.formats.storage import WorkFolder
from edgeadapt.methods.peft.inputs import AdapterInputs, LoraSlot
from export.causal import builder, traced
from export.causal.sample import Sample, sample_logits
from export.causal.training import LearnedLogits, trace
from export.onnx import cut, headers, matmuls, virtualtokens
from export.onnx.calibrate import SHORT_TEXT, TEXT, TOKENS
from export.onnx.dequantize import as_stored
from export.onnx.exported import MAX_RANK, ExportedBase, Profile, Report, counted, metadata, written
from export.onnx.gradients import check_gradients
from export.onnx.graph import ANSWER
from export.onnx.peftmodel import SlottedModel
from export.onnx.quantize import quantize
from export.onnx.segments import reads
from export.onnx.targets import Slots, low_rank, vectors
from export.onnx.tasks import check_reads_embeddings, sizes
from export.onnx.tensorstore import OnDisk, size_of
from export.onnx.training import training_graphs
from export.onnx.vectors import insert_vectors, scale_inputs

PAST, PRESENT = "past_key_values", "present"  # begin the names of the KV cache before a run, and after it
# Adds two inputs, and normalizes; the last one of its four outputs is the sum.
FUSED, FUSED_OUTPUTS = "SkipSimplifiedLayerNormalization", 4
BEGIN, END, SOME, ZERO, ONE = (f"{KEPT_RANGE}/{name}" for name in ("begin", "end", "some", "0", "1"))


def keep_states(graph: onnx.ModelProto, slots: Collection[str], width: int) -> bool:
    """Let ``graph`` return ``STATES`` of its tokens, ``(batch, sequence, width)``, and go on from ``KEPT_STATES`` of
    ``(1, kept, width)``, in place. Its other outputs are the same bit for bit. Its KV cache has to be one buffer.
    Returns False, and changes nothing, if the graph cannot be cut."""
    inner, nodes = graph.graph, list(graph.graph.node)
    fused = _last_fused(nodes, slots)
    values = {name for node in nodes for name in node.output}
    best = min(cut.cuts(_split(nodes, fused), slots, [ANSWER], values), default=None)
    if best is None or best[0]:
        return False
    states = best[2]
    if fused is not None and states != fused.output[-1]:
        fused = None
    passed = [states] if fused is None else [states, fused.output[0]]  # to the upper layers
    outputs = {value.name: value for value in inner.output}
    above = outputs.keys() & set[str]().union(*(cut.reached(nodes, name) for name in passed))
    if not (cache := [name for name in outputs if name not in above]):
        return False
    upper = cut.needed(nodes, above, passed)
    of_both = {node.output[0] for node in upper}
    lower = [node for node in cut.needed(nodes, [*passed, *cache]) if node.output[0] not in of_both]
    sizes = [size.dim_param or size.dim_value for size in inner.input[0].type.tensor_type.shape.dim]
    types = outputs | {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [*sizes, width]) for name in passed}
    kept = [
        helper.make_node("Slice", [KEPT_STATES, BEGIN, END, ONE], [states]),
        *(helper.make_node("Identity", [name.replace(PRESENT, PAST, 1)], [name]) for name in cache),
    ]
    if fused is not None:  # of a sum with zeros, so that it rounds as below
        again = onnx.NodeProto()
        again.CopyFrom(fused)
        again.input[:] = [states, f"{STATES}/zeros", *fused.input[2:]]
        again.output[:] = [fused.output[0]]
        kept += [helper.make_node("Sub", [states, states], [f"{STATES}/zeros"]), again]
    results = [*passed, *cache]
    branches = {
        "then_branch": _branch("kept", kept, results, types),
        "else_branch": _branch("below", lower, results, types),
    }
    public = {states: STATES}
    chosen = [
        helper.make_node("Gather", [KEPT_RANGE, ZERO], [BEGIN]),
        helper.make_node("Gather", [KEPT_RANGE, ONE], [END]),
        helper.make_node("Less", [BEGIN, END], [SOME]),
        helper.make_node("If", [SOME], [public.get(name, name) for name in results], STATES, **branches),
    ]
    later = set[str]().union(*(cut.reached(upper, name) for name in passed))
    del inner.node[:]
    inner.node.extend(node for node in upper if later.isdisjoint(node.output))
    inner.node.extend(chosen)
    inner.node.extend(_renamed((node for node in upper if not later.isdisjoint(node.output)), public))
    inner.initializer.extend(numpy_helper.from_array(np.array([at]), name) for at, name in enumerate((ZERO, ONE)))
    inner.input.append(helper.make_tensor_value_info(KEPT_STATES, TensorProto.FLOAT, [1, "kept", width]))
    inner.input.append(helper.make_tensor_value_info(KEPT_RANGE, TensorProto.INT64, [2]))
    inner.output.append(helper.make_tensor_value_info(STATES, TensorProto.FLOAT, [*sizes, width]))
    return True


def _last_fused(nodes: Iterable[onnx.NodeProto], slots: Collection[str]) -> onnx.NodeProto | None:
    """Find the last normalization before the first slot that also returns what it normalizes."""
    last = None
    for node in nodes:
        if not reads(node).isdisjoint(slots):
            return last
        if node.op_type == FUSED and len(node.output) == FUSED_OUTPUTS:
            last = node
    return None


def _split(nodes: Iterable[onnx.NodeProto], fused: onnx.NodeProto | None) -> list[onnx.NodeProto]:
    """Write ``fused`` as two nodes, of which the second reads the sum, to find the values on which others depend."""
    if fused is None:
        return list(nodes)
    total = fused.output[-1]
    added = helper.make_node("Add", fused.input[:2], [total])
    normal = helper.make_node("Mul", [total, fused.input[2]], fused.output[:1])
    return [part for node in nodes for part in ([added, normal] if node is fused else [node])]


def _branch(
    name: str, nodes: Iterable[onnx.NodeProto], results: Iterable[str], types: Mapping[str, onnx.ValueInfoProto]
) -> onnx.GraphProto:
    names = {result: f"{name}/{result}" for result in results}
    values = []
    for result, own in names.items():
        value = onnx.ValueInfoProto()
        value.CopyFrom(types[result])
        value.name = own
        values.append(value)
    return helper.make_graph(_renamed(nodes, names), name, [], values)


def _renamed(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> list[onnx.NodeProto]:
    result = []
    for node in nodes:
        renamed = onnx.NodeProto()
        renamed.CopyFrom(node)
        for values in (renamed.input, renamed.output):
            values[:] = [names.get(value, value) for value in values]
        result.append(renamed)
    return result


def export_causal(
    base: Base,
    slots: Slots | Sequence[str],
    profile: Profile,
    max_rank: int = MAX_RANK,
    where: Path | None = None,
    report: Report = lambda *_: None,
    *,
    training: bool = False,
) -> ExportedBase:
    """Export ``base`` with ``slots`` at linear layers, or low-rank ones at targets such as ``("q_proj", "v_proj")``.

    ``where`` is the folder that holds the result's files and those that are needed meanwhile, about six bytes a
    parameter. ``training``: with a training graph, whose gradients are compared with torch's, for which the base has to
    fit into memory in float32, twice if it is quantized. Raises ConfigError: the base is an encoder-decoder or cannot
    be exported, a target names no linear layer, a layer's MatMul or a place for virtual tokens cannot be found in the
    graph, or as ``training_graph`` and ``check_gradients``."""
    check_decoder(pretrained.configuration(base))
    with closing(WorkFolder(where)) as scratch:
        store, work, wanted = OnDisk(scratch.path / "tensors"), WorkFolder(where), Slots.of(slots)
        model = pretrained.load(base, AutoModelForCausalLM, offload=scratch.path / "offload")
        adapted, names = low_rank(model, wanted), vectors(model, wanted, norms=False)
        sites = [layer_of(name) for name in names if pretrained.is_linear(model.get_submodule(layer_of(name)))]
        weights = _Weights(model, list(dict.fromkeys([*adapted, *sites])))
        parameters = _vectors(model) if names else {}
        report("running torch", 0, 0)
        tokenizer = pretrained.tokenizer(base)
        embedding = _embedding(model, tokenizer) if wanted.virtual else None
        sample = sample_logits(model, tokenizer)
        decoder = _decoder(base, model, sample, store, report)
        layers = matmuls.find(decoder.graph, weights, store)
        scale_inputs(decoder.graph, layers, names)
        ids = Tokenizer.from_str(decoder.files[TOKENIZER].decode()).encode(TEXT).ids[:TOKENS]
        passes = 3 if profile is Profile.WEB_INT8 else 1  # the MatMuls that lose too much are found first
        store.reports(counted(report, "quantizing", passes * size_of(decoder.graph)))
        graph = quantize(decoder.graph, profile, ids, store)
        vector_slots = insert_vectors(graph, layers, names, parameters, store)
        scaled = {layer_of(name) for name in names if name.endswith((OUTPUT_SCALE, *DOWN))}
        # The update comes after what changes, or reads, the output without it, and so after the bias.
        places = {path: replace(layers[path], y=layers[path].end) for path in adapted if path in scaled}
        places = {path: layers[path] for path in adapted} | places
        inserted = matmuls.insert_lora(graph, places) | vector_slots | _insert_virtual(graph, wanted, embedding)
        parts = matmuls.merge(graph, store)
        runtime, opset = headers.requirements(graph)
        # An adapter of a language model brings its own scaling (AdapterSource.adapter_inputs); 1 leaves B as it is.
        inputs = AdapterInputs(
            "default", tuple(LoraSlot(path, 1.0) for path in adapted), (), names, virtual=wanted.virtual
        )
        store.keep([graph])
        stored, others, difference = None, dict[str, ModelProto](), None
        if training:
            report("tracing the training graph", 0, 0)
            slotted = SlottedModel(pretrained.load(base, AutoModelForCausalLM), inputs, bool(wanted.first))
            others = training_graphs(trace(slotted, store), slotted, graph, profile, ids, store)
            stored = as_stored(slotted, profile, graph, store)
            opset = max(opset, headers.requirements(others[TRAINING])[1])
        graphs = [graph, *others.values()]
        store.keep(graphs)
        store.reports(counted(report, "writing", sum(map(size_of, graphs))))
        about = metadata(base, "text-generation", profile, runtime)
        digests = headers.split(graph, inserted, about, work.path, store, others, parts) | written(
            work.path, decoder.files
        )
        # With one scale for all activations of a MatMul, states depend on the tokens that were read together.
        shared = json.loads(decoder.files[GENERATION])["search"].get("past_present_share_buffer")
        if wanted.first and profile is not Profile.WEB_INT8 and shared:
            header = load_model_from_string((work.path / MODEL).read_bytes())
            if keep_states(header, list(inserted), sizes(model.config).hidden):
                digests |= written(work.path, {CHAT: header.SerializeToString(deterministic=True)})
        if stored is not None:
            report("comparing gradients with torch", 0, 0)
            longest = pretrained.configuration(base).max_position_embeddings
            module = LearnedLogits(stored)
            difference = check_gradients(
                work.path, module, inserted, sample.ids[0].tolist(), (1, longest), language=True
            )
        manifest = BaseManifest(
            base_digest=base.digest,
            task="text-generation",
            profile=profile.value,
            files=digests,
            slots=inserted,
            max_rank=max_rank,
            independent_rows=False,
            onnxruntime=runtime,
            opset=opset,
            merged=dict(base.merged),
        )
        return ExportedBase(manifest, inputs, work, gradients=difference)


def _insert_virtual(graph: ModelProto, wanted: Slots, embedding: virtualtokens.Embedding | None) -> virtualtokens.Slots:
    slots: virtualtokens.Slots = {}
    if embedding is not None and PROMPT in wanted.virtual:
        slots |= virtualtokens.insert_prompt(graph, embedding)
    if PREFIX in wanted.virtual:
        slots |= virtualtokens.insert_prefix(graph)
    return slots


def check_decoder(config: Any) -> None:
    """Check that a configuration is of one stack of layers. Raises ConfigError for an encoder with a decoder."""
    if config.is_encoder_decoder:
        raise ConfigError(
            f"{config.model_type} is an encoder-decoder: it would need a graph of its encoder, one of its decoder with "
            "a cache of cross-attention, and a device that runs both; use a decoder-only model",
            about="is_encoder_decoder",
        )


def _decoder(base: Base, model: Any, sample: Sample, store: OnDisk, report: Report) -> builder.DecoderGraph:
    """Build by the builder path if its graph gives torch's logits, else by the traced path."""
    try:
        return builder.build(base, model.config, sample, store, report)
    except builder.BuilderPathError:
        store.keep([])
        return traced.build(base, sample, store, report)


def _embedding(model: nn.Module, tokenizer: Tokenizer) -> virtualtokens.Embedding:
    """Find the embedding of tokens of a model that can have virtual tokens. Raises ConfigError for another model."""
    ids = tokenizer.encode(SHORT_TEXT).ids
    check_reads_embeddings(model, ids)
    module: Any = model.get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        plain, read = module.weight[ids], module(torch.tensor(ids))
        scale = float((read / plain)[plain != 0].median())
    if not torch.allclose(plain * scale, read, rtol=1e-4):
        raise ConfigError(
            f"{type(module).__name__} does more than to scale the embeddings of tokens: virtual tokens cannot be "
            "exported for this base",
            about="embeddings",
        )
    rows, width = module.weight.shape
    return virtualtokens.Embedding(int(rows), int(width), round(scale, 4))


def _vectors(model: nn.Module) -> dict[str, Floats]:
    by_path = {}
    for path, module in model.named_modules():
        names = [name for name, value in module.named_parameters(recurse=False) if value.ndim == 1]
        if names:
            with pretrained.loaded(module):
                values = {name: module.get_parameter(name).detach().numpy().copy() for name in names}
            by_path.update({f"{path}.{name}": value for name, value in values.items()})
    return by_path


class _Weights(Mapping[str, Floats]):
    """Each layer's, by path, shape ``(out, in)``, read when it is asked for."""

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self._layers = {path: model.get_submodule(path) for path in paths}

    def __getitem__(self, path: str) -> Floats:
        layer = self._layers[path]
        with pretrained.loaded(layer):
            weight: Floats = layer.weight.detach().numpy()  # type: ignore[operator]
        return weight.T if type(layer) is Conv1D else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)
