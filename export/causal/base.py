"""A frozen causal language model, exported once for every adapter of its layers."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto, load_model_from_string
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base
from edgeadapt.formats.bundle import CHAT, GENERATION, MODEL, TOKENIZER, TRAINING
from edgeadapt.formats.graphinputs import OUTPUT_SCALE, PREFIX, PROMPT, layer_of
from edgeadapt.formats.layout import Floats
from edgeadapt.formats.workfolder import WorkFolder
from edgeadapt.methods.peft.inputs import AdapterInputs, LoraSlot
from export.causal import builder, traced
from export.causal.keptstates import keep_states
from export.causal.sample import Sample, sample_logits
from export.causal.training import LearnedLogits, trace
from export.onnx import headers, matmuls, virtualtokens
from export.onnx.calibrate import SHORT_TEXT, TEXT, TOKENS
from export.onnx.dequantize import as_stored
from export.onnx.exported import MAX_RANK, ExportedBase, Profile, Report, counted, metadata, written
from export.onnx.gradients import check_gradients
from export.onnx.peftmodel import SlottedModel
from export.onnx.quantize import quantize
from export.onnx.targets import Slots, low_rank, vectors
from export.onnx.tasks import check_reads_embeddings, sizes
from export.onnx.tensorstore import OnDisk, size_of
from export.onnx.training import training_graphs
from export.onnx.vectors import insert_vectors, scale_inputs


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
    graph, or as ``training_graph`` and ``check_gradients``.
    """
    check_decoder(pretrained.configuration(base))
    with closing(WorkFolder(where)) as scratch:
        store, work, wanted = OnDisk(scratch.path / "tensors"), WorkFolder(where), Slots.of(slots)
        model = pretrained.load(base, AutoModelForCausalLM, offload=scratch.path / "offload")
        adapted, names = low_rank(model, wanted), vectors(model, wanted)
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
        scaled = {layer_of(name) for name in names if name.endswith(OUTPUT_SCALE)}
        # The update comes after a scale of the output, and so after the bias.
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
            difference = check_gradients(work.path, module, inserted, sample.ids[0].tolist(), longest, language=True)
        return ExportedBase(
            base_digest=base.digest,
            task="text-generation",
            profile=profile,
            adapter_inputs=inputs,
            slots=inserted,
            max_rank=max_rank,
            onnxruntime=runtime,
            opset=opset,
            work=work,
            merged=base.merged,
            digests=digests,
            gradients=difference,
        )


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
    """Weight of each layer by its path, shape ``(out, in)``, read when it is asked for."""

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
