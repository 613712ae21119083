"""The base that a command names: its usual task, its model in torch, what an adapter needs of it, and its export."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base, find_base
from edgeadapt.bases.classifiergraph import ENCODER
from edgeadapt.formats.graphinputs import DOWN, LORA_A, VIRTUAL, input_name, layer_of, vector_kind
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.formats.manifest import Task
from edgeadapt.formats.peftconfig import PeftConfig, layer_number
from edgeadapt.methods.classifier import PhraseClassifier
from edgeadapt.methods.peft.dora import magnitudes, scaled_layers, weight_norms, with_magnitudes, with_scales
from edgeadapt.methods.peft.inputs import is_saved, lora_paths
from export.bundle.sources import Origin, as_slots
from export.causal import export_causal
from export.causal.base import check_decoder
from export.onnx import slotted
from export.onnx.classifier import export_classifier
from export.onnx.exported import MAX_RANK, ExportedBase, Profile, Report
from export.onnx.targets import Slots

Head = Literal["own", "mean"]
HEADS = ("ForSequenceClassification", "ForMaskedLM", "ForPreTraining")  # heads that can be removed from an encoder
DEFAULT_TARGETS: dict[Task, tuple[str, ...]] = {
    "text-classification": ("query", "value"),
    "text-generation": ("q_proj", "v_proj"),
}


@dataclass(frozen=True, slots=True)
class Wanted:
    task: Task
    slots: Slots
    max_rank: int  # highest rank of an adapter
    head: Head | None = None  # a classifier's; None: its own, if it has one
    # The shapes of an adapter's modules_to_save; None: as any adapter has them.
    brought: Mapping[str, tuple[int, ...]] | None = field(default=None, repr=False)


def usual_task(base: Base) -> Task:
    """Read the task that the base states: text generation for a causal language model, else classification. Raises
    ConfigError: the base cannot be opened, or states a task that devices do not run."""
    config = pretrained.configuration(base)
    architecture = str(next(iter(config.architectures or []), ""))
    if architecture.endswith("ForConditionalGeneration"):
        check_decoder(config)
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "text-generation"
    if "For" in architecture and not architecture.endswith(HEADS):
        reason = f"the base is a {architecture[:60]}, a task that devices do not run; choose a task with --task"
        raise ConfigError(reason, about="architectures")
    return "text-classification"


def wanted(
    base: Base,
    origin: Origin | None = None,
    *,
    task: Task | None = None,
    slots: Slots | None = None,
    head: Head | None = None,
    max_rank: int | None = None,
) -> Wanted:
    """Decide what to export ``base`` for. What is None follows from the adapter ``origin``, or else from the base.

    The layers of ``origin`` get slots in addition to those of ``slots``. Raises ConfigError: the adapter does not fit
    the task, head, ``max_rank`` or the last layers, brings modules of a language model, or brings no head for a
    classifier."""
    slots = slots or Slots()
    if origin is None:
        task = task or usual_task(base)
        slots = replace(slots, targets=slots.targets or DEFAULT_TARGETS[task])
        return Wanted(task, slots, max_rank or MAX_RANK, head)
    shapes = {input_name(name): value.shape for name, value in origin.tensors.items()}
    layers = sorted(lora_paths(shapes))
    vectors = tuple(name for name in sorted(shapes) if vector_kind(name))
    virtual = tuple(name for name in VIRTUAL if name in shapes)
    brought = {name: shape for name, shape in shapes.items() if is_saved(name)}
    mean = any(name.startswith(ENCODER) for name in (*layers, *vectors))
    needed: Task = origin.task or ("text-classification" if mean else usual_task(base))
    _agree("--task", task, needed)
    own: Head | None = None
    ranks = [*(shapes[path + LORA_A][0] for path in layers), *(shapes[n][1] for n in vectors if n.endswith(DOWN))]
    rank = max(ranks, default=1)
    if max_rank is not None and rank > max_rank:
        raise ConfigError(f"the adapter has rank {rank}, --max-rank is {max_rank}", about="--max-rank")
    if needed == "text-generation":
        if brought:
            raise ConfigError(
                f"the adapter brings {', '.join(sorted(brought))[:200]}, for which a language model has no slot: merge "
                "it into its base with 'edgeadapt base merge'",
                about="modules_to_save",
            )
    else:
        if not brought:
            raise ConfigError(
                'the adapter brings no head: train its module in modules_to_save (task_type="SEQ_CLS" does)',
                about="modules_to_save",
            )
        own = "mean" if mean else "own"
        _agree("--head", head, own)
    if slots == Slots() and not virtual:  # what is below the adapter stays as it is
        numbers = [layer_number(path) or 0 for path in (*layers, *map(layer_of, vectors))]
        slots = replace(slots, first=min(numbers, default=0))
    slots = replace(slots, layers=tuple(layers), vectors=vectors, adapter_virtual=virtual)
    return Wanted(needed, slots, max_rank or max(MAX_RANK, rank), head or own, brought)


def export_named(
    name: str,
    profile: str,
    want: Wanted,
    where: Path | None = None,
    report: Report = lambda *_: None,
    *,
    training: bool | None = None,
) -> ExportedBase:
    """Find, build and export a base: a folder, or a package that carries the model.

    ``where`` and ``report`` are those of ``export_causal`` (a classifier takes too short for reports), ``training`` is
    that of ``export_classifier``; None makes none for a language model. Raises ConfigError: no such base or profile, no
    layer of a target's name, a head for a language model, or as ``export_classifier`` and ``export_causal``."""
    try:
        chosen = Profile(profile)
    except ValueError:
        raise ConfigError(
            f"there is no profile {profile!r}; choose one of {', '.join(Profile)}", about="--profile"
        ) from None
    base = find_base(name)
    if want.task == "text-generation":
        if want.head is not None:
            raise ConfigError(
                "--head is for a classifier; a language model has its own output layer: leave it out", about="--head"
            )
        return export_causal(base, want.slots, chosen, want.max_rank, where, report, training=bool(training))
    if want.head == "own" or (want.head is None and slotted.has_own_head(base)):
        model = slotted.with_own_head(base, want.slots, want.brought)
    else:
        model = slotted.with_mean_head(base, want.slots)
    return export_classifier(model, base, chosen, want.max_rank, where, training=training)


def _agree(option: str, given: str | None, needed: str) -> None:
    if given not in (None, needed):
        raise ConfigError(f"{option} is {given}, but the adapter is for {needed}", about=option)


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
    """Invert ``resolved``, for the tensors of an adapter that was exported. Raises ConfigError, DataError as
    ``resolved``."""
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
            reason = f"the base in {base.folder} has no layer {path!r}: name the base that the adapter was trained on"
            raise ConfigError(reason, about="--base") from error
        weight = layer.weight.detach().numpy()
        weights[path] = weight.T if type(layer) is Conv1D else weight
        if layer.bias is not None:
            biases[path] = layer.bias.detach().numpy()
    return weights, biases


def bare_model(base: Base, task: Task, tensors: Tensors, labels: int) -> Any:
    names = [input_name(name) for name in tensors]
    brought = sorted({name.rpartition(".")[0] for name in names if is_saved(name)})
    mean = any(name.startswith(ENCODER) for name in names)
    return model_of(base, task, mean=mean, saved=brought, labels=labels)


def model_of(base: Base, task: Task, *, mean: bool, saved: Sequence[str], labels: int | None) -> Any:
    """Open the model for a task. A classifier has a head over the mean of the tokens, or its own one with ``labels``
    rows (None: as the base has it). ``saved``: modules that the adapter brings."""
    if task == "text-generation":
        return pretrained.load(base, AutoModelForCausalLM)
    if not mean:
        return pretrained.load(base, AutoModelForSequenceClassification, num_labels=labels, saved=saved)
    return PhraseClassifier(pretrained.encoder(base), labels or 2)
