"""The training graph of a base: the loss of a batch, and its gradient by every slot.

It is made by ``differentiate``, of a classifier's answering graph or of that which ``export.causal.training`` traces.
It reads the weights that the device answers with, of a quantized base as bytes which it turns into floats block by
block. So it adds little more than its nodes to a bundle, and an adapter is trained on the base that it will run on (as
QLoRA does; Dettmers et al. 2023)."""

import copy
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from aggregation.errors import ConfigError
from edgeadapt.bases.traininggraph import HITS, LOG_LIKELIHOOD, LOSS, OWN_BIAS, POSITIONS, SHARES, TARGETS, WEIGHT_NORM
from edgeadapt.formats.bundle import LOWER, TRAINING, UPPER
from edgeadapt.formats.graphinputs import LORA_A, LORA_B, OUTPUT_SCALE
from edgeadapt.formats.layout import Floats
from edgeadapt.methods.peft.inputs import is_saved
from export.onnx import cut
from export.onnx import graph as tracing
from export.onnx.derivatives import differentiate
from export.onnx.exported import Profile
from export.onnx.matmuls import embedding_of, equal, replace_nodes
from export.onnx.peftmodel import SlottedModel, layer_weight, weight_shape
from export.onnx.quantize import FLOAT, in_blocks, quantize
from export.onnx.storedweights import FormOf, forms_of, read_stored
from export.onnx.tensorstore import MEMORY, TensorStore


def training_graphs(
    traced: onnx.ModelProto,
    slotted: SlottedModel,
    answering: onnx.ModelProto,
    profile: Profile,
    ids: Sequence[int],
    store: TensorStore = MEMORY,
) -> dict[str, onnx.ModelProto]:
    """Make the training graph of a traced base by the name of its file and, if it is cut, the part below as well; of a
    classifier also the part of the answering graph above. ``ids`` are tokens of a plain text, as for ``quantize``.
    Raises as ``training_graph`` and ``cut.states_of``."""
    if not slotted.cut:
        return {TRAINING: training_graph(traced, slotted, answering, profile, store)}
    states = _states(traced)
    above = training_graph(cut.upper(traced, states), slotted, answering, profile, store, whole=traced)
    if POSITIONS in {value.name for value in traced.graph.input}:  # the answering graph has a cache, and other names
        return {TRAINING: above, LOWER: quantize(cut.lower(traced, states), profile, ids, store)}
    return {TRAINING: above, **_parts(answering, states)}


def answering_parts(traced: onnx.ModelProto, answering: onnx.ModelProto) -> dict[str, onnx.ModelProto]:
    """Cut the answering graph of a classifier below all slots. Raises ConfigError as ``cut.states_of``."""
    return _parts(answering, _states(traced))


def _states(traced: onnx.ModelProto) -> tuple[str, int]:
    return cut.states_of(traced, [name for name in tracing.slots(traced) if not is_saved(name)])


def _parts(answering: onnx.ModelProto, states: tuple[str, int]) -> dict[str, onnx.ModelProto]:
    return {LOWER: cut.lower(answering, states), UPPER: cut.upper(answering, states)}


def training_graph(
    traced: onnx.ModelProto,
    slotted: SlottedModel,
    answering: onnx.ModelProto,
    profile: Profile,
    store: TensorStore = MEMORY,
    whole: onnx.ModelProto | None = None,
) -> onnx.ModelProto:
    """Make the training graph of a traced base, with its weights as ``profile`` stores them for ``answering``.

    ``whole`` is the graph of which ``traced`` is the part above the states, if it is one.

    Returns a graph with the inputs of ``traced``, ``TARGETS`` and ``SHARES``, and the outputs ``LOSS`` and the
    gradients; of a language model also ``LOG_LIKELIHOOD`` and ``HITS``, and of layers with slots for DoRA
    ``WEIGHT_NORM`` and ``OWN_BIAS``. Its weights are byte for byte those of ``answering``, which ``headers.split``
    stores once. Raises ConfigError: the graph lacks the weight of a layer, or as ``differentiate``."""
    result = differentiate(_with_loss(traced), LOSS, tuple(tracing.slots(traced)))
    language = POSITIONS in {value.name for value in result.graph.input}
    if language:
        result.graph.output.extend(
            helper.make_tensor_value_info(name, kind, ["learned"])
            for name, kind in ((LOG_LIKELIHOOD, TensorProto.FLOAT), (HITS, TensorProto.BOOL))
        )
    _add_norms(result, slotted, store)
    form_of = forms_of(whole or result, answering, profile, store)
    _read_embedding(result, form_of, store)
    if profile is Profile.FP32:
        return result
    result = in_blocks(result, FLOAT, {}, store)  # the embeddings alone
    read_stored(result, form_of, store, {tracing.ANSWER} if language else None)
    return result


def _with_loss(traced: onnx.ModelProto) -> onnx.ModelProto:
    """Copy the graph, and compute the loss in the copy: Σ shares · cross-entropy."""
    result, logits = copy.deepcopy(traced), tracing.ANSWER
    graph, node = result.graph, helper.make_node
    constants = {"last_axis": np.array([-1])}
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    graph.node.extend(
        [
            node("LogSoftmax", [logits], ["log_probabilities"], axis=-1),
            node("Unsqueeze", [TARGETS, "last_axis"], ["target_columns"]),
            node("GatherElements", ["log_probabilities", "target_columns"], ["log_likelihoods"], axis=-1),
            node("Squeeze", ["log_likelihoods", "last_axis"], ["log_likelihood"]),
            node("Mul", ["log_likelihood", SHARES], ["shared_out"]),
            node("ReduceSum", ["shared_out"], ["total"], keepdims=0),
            node("Neg", ["total"], [LOSS]),
        ]
    )
    inputs = {value.name: value for value in graph.input}
    if POSITIONS in inputs:
        graph.node.append(node("ArgMax", [logits], ["most_likely"], axis=-1, keepdims=0))
        graph.node.append(node("Equal", ["most_likely", TARGETS], [HITS]))
    rows = inputs.get(POSITIONS, graph.input[0]).type.tensor_type.shape.dim[0].dim_param
    for name, kind in ((TARGETS, TensorProto.INT64), (SHARES, TensorProto.FLOAT)):
        graph.input.append(helper.make_tensor_value_info(name, kind, [rows]))
    return result


def _add_norms(graph: onnx.ModelProto, slotted: SlottedModel, store: TensorStore) -> None:
    """Add what DoRA needs of the weights (``edgeadapt.methods.peft.dora``), in place: their norms and the biases."""
    inner, node = graph.graph, helper.make_node
    names = {value.name for value in inner.input}
    layers = [
        path for name in names if name.endswith(LORA_A) and (path := name.removesuffix(LORA_A)) + OUTPUT_SCALE in names
    ]
    if layers:
        inner.initializer.append(numpy_helper.from_array(np.array([1]), "norm_axes"))
    for path in sorted(layers):
        layer = slotted.model.get_submodule(path)
        weight, out = layer_weight(layer), weight_shape(layer)[0]
        stored, transposed = _stored_weight(inner, path, weight, store)
        rows, update, norm = stored, f"{path}.update", path + WEIGHT_NORM
        if transposed:
            rows = f"{path}.rows"
            inner.node.append(node("Transpose", [stored], [rows], rows, perm=[1, 0]))
        inner.node.extend(
            [
                node("MatMul", [path + LORA_A, path + LORA_B], [f"{update}_columns"], f"{update}_columns"),
                node("Transpose", [f"{update}_columns"], [update], update, perm=[1, 0]),
                node("Add", [rows, update], [f"{path}.updated"], f"{path}.updated"),
                node("ReduceL2", [f"{path}.updated", "norm_axes"], [norm], norm, keepdims=0),
            ]
        )
        inner.output.append(helper.make_tensor_value_info(norm, TensorProto.FLOAT, [out]))
        if (bias := getattr(layer, "bias", None)) is not None:
            name = path + OWN_BIAS
            inner.initializer.append(store.tensor(bias.detach().numpy(), f"{name}.stored"))
            inner.node.append(node("Identity", [f"{name}.stored"], [name], name))
            inner.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [out]))


def _stored_weight(graph: onnx.GraphProto, path: str, weight: Floats, store: TensorStore) -> tuple[str, bool]:
    """Find the initializer of a layer's weight, ``(out, in)``, and whether it is transposed. Raises ConfigError."""
    # A MatMul's own weight first: the embedding of a tied output layer has the same values, not the stored bytes.
    for values, transposed in ((weight.T, True), (weight, False)):
        for tensor in graph.initializer:
            fits = tensor.data_type == TensorProto.FLOAT and tuple(tensor.dims) == values.shape
            if fits and equal(store.array(tensor), values):
                return tensor.name, transposed
    raise ConfigError(f"{path}: the training graph does not have its weight: export without --training", about=path)


def _read_embedding(graph: onnx.ModelProto, form_of: FormOf, store: TensorStore) -> None:
    """Let an output layer in float whose weight is the embedding, transposed, read the embedding, in place."""
    inner, tied = graph.graph, list[onnx.NodeProto]()
    values = {tensor.name: tensor for tensor in inner.initializer}
    for node in inner.node:
        if node.op_type != "MatMul" or (name := embedding_of(inner, node.input[1], store)) is None:
            continue
        if form_of(node.input[1], store.array(values[node.input[1]])) is None:
            tied.append(helper.make_node("Transpose", [name], [node.input[1]], node.input[1], perm=[1, 0]))
    names = {node.output[0] for node in tied}
    kept = [tensor for tensor in inner.initializer if tensor.name not in names]
    del inner.initializer[:]
    inner.initializer.extend(kept)
    replace_nodes(inner, [*tied, *inner.node])
