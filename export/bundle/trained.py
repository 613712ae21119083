"""The model in torch that an adapter was trained in, and what an adapter needs of its weights."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base
from edgeadapt.bases.classifiergraph import ENCODER
from edgeadapt.formats.graphinputs import input_name
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.formats.manifest import Task
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.classifier import PhraseClassifier
from edgeadapt.methods.peft.dora import magnitudes, scaled_layers, weight_norms, with_magnitudes, with_scales
from edgeadapt.methods.peft.inputs import is_saved
from export.bundle.base import usual_task
from export.bundle.sources import Origin, as_slots


def resolved(origin: Origin, base: Base) -> Origin:
    """Turn ``origin`` into what slots take, with the scales of DoRA that the base's weights give."""
    origin = as_slots(origin)
    if not (layers := magnitudes(origin.tensors)):
        return origin
    task = origin.task or usual_task(base)
    weights, biases = _layers(base, task, origin.tensors, max(2, len(origin.labels)), layers)
    norms_of = partial(weight_norms, config=origin.peft_config, weights=weights)
    return replace(origin, tensors=with_scales(origin.tensors, norms_of, biases))


def as_trained(tensors: Tensors, config: PeftConfig, base: Base, task: Task, labels: int) -> Tensors:
    """Invert ``resolved``, for the tensors of an adapter that was exported.

    Raises ConfigError, DataError as ``resolved``.
    """
    weights, _ = _layers(base, task, tensors, labels, scaled_layers(tensors, config))
    return with_magnitudes(tensors, config, partial(weight_norms, config=config, weights=weights))


def _layers(
    base: Base, task: Task, tensors: Tensors, labels: int, paths: Sequence[str]
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Read the weights, ``(out, in)``, and the biases of some layers, by path."""
    model = bare_model(base, task, tensors, labels)
    weights, biases = {}, {}
    for path in paths:
        try:
            layer = model.get_submodule(path)
        except AttributeError as error:
            raise ConfigError(
                f"the base in {base.folder} has no layer {path!r}: name the base that the adapter was trained on",
                about="--base",
                value=path,
            ) from error
        weight = layer.weight.detach().numpy()
        weights[path] = weight.T if type(layer) is Conv1D else weight
        if layer.bias is not None:
            biases[path] = layer.bias.detach().numpy()
    return weights, biases


def bare_model(base: Base, task: Task, tensors: Tensors, labels: int) -> Any:
    """Open the model whose module names the adapter's tensors use."""
    names = [input_name(name) for name in tensors]
    brought = sorted({name.rpartition(".")[0] for name in names if is_saved(name)})
    mean = any(name.startswith(ENCODER) for name in names)
    return model_of(base, task, mean=mean, saved=brought, labels=labels)


def model_of(base: Base, task: Task, *, mean: bool, saved: Sequence[str], labels: int | None) -> Any:
    """Open the model for a task.

    A classifier has a head over the mean of the tokens, or its own one with ``labels`` rows (None: as the base has it).
    ``saved``: modules that the adapter brings.
    """
    if task == "text-generation":
        return pretrained.load(base, AutoModelForCausalLM)
    if not mean:
        return pretrained.load(base, AutoModelForSequenceClassification, num_labels=labels, saved=saved)
    encoder = pretrained.load(base, AutoModel)
    return PhraseClassifier(encoder, encoder.config.hidden_size, labels or 2)
