"""A base as the model of a classifier whose layers have slots: its own head on top, or one over the mean of its tokens.
The modules and their names are those in which adapters are trained, by ``edgeadapt.methods.classifier`` or by peft."""

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import AutoModelForSequenceClassification

from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base
from edgeadapt.formats.graphinputs import PREFIX, in_modules, layer_of
from edgeadapt.methods.classifier import PhraseClassifier
from edgeadapt.methods.peft.inputs import AdapterInputs, LoraSlot, summary
from export.onnx.peftmodel import SlottedModel, saved_slot
from export.onnx.targets import Slots, low_rank, vectors

ANY_LABELS = 2  # rows of a head while it is traced; its slot takes as many as an adapter brings
USUAL_HEADS = ("classifier", "score")  # what peft puts into modules_to_save for SEQ_CLS


def has_own_head(base: Base) -> bool:
    """Whether the base was made to classify whole texts. Raises ConfigError if it cannot be opened."""
    stated = pretrained.configuration(base).architectures or [""]
    return str(stated[0]).endswith("ForSequenceClassification")


def with_mean_head(base: Base, slots: Slots | Sequence[str]) -> SlottedModel:
    """Build ``edgeadapt.methods.classifier.PhraseClassifier``, what federations train. Raises ConfigError: the base
    cannot be opened, or lacks a layer that ``slots`` names."""
    encoder = pretrained.encoder(base)
    if getattr(encoder.config, "hidden_size", None) is None:
        kind = type(encoder).__name__
        raise ConfigError(
            f"{kind} cannot be exported: its configuration states no hidden_size; use an encoder of texts", about=kind
        )
    wanted = Slots.of(slots)
    if wanted.virtual:
        reason = "a head over the mean of the tokens has no virtual tokens, in peft neither: choose --head own"
        raise ConfigError(reason, about="--head")
    return _slotted(PhraseClassifier(encoder, ANY_LABELS), wanted, ["classifier"])


def with_own_head(
    base: Base, slots: Slots | Sequence[str], brought: Mapping[str, tuple[int, ...]] | None = None
) -> SlottedModel:
    """Build ``AutoModelForSequenceClassification``, as peft does. The base may lack what adapters bring.

    ``brought``: the shapes of an adapter's ``modules_to_save``; None: any adapter's, with the modules that peft usually
    takes for a head. Raises ConfigError: as ``with_mean_head``; the model lacks a module that the adapter brings, or
    weights that it does not bring; the head is for several answers at a time, or for a number; or a prefix is wanted.
    """
    wanted = Slots.of(slots)
    if PREFIX in wanted.virtual:
        raise ConfigError(
            "prefix tuning cannot be exported for a classifier, and peft itself refuses it for encoders with "
            "transformers 5: train with prompt tuning",
            about="PREFIX_TUNING",
        )
    saved, labels = list(USUAL_HEADS), None
    if brought:
        saved, labels = sorted({name.rpartition(".")[0] for name in brought}), label_count(base, brought)
    model = pretrained.load(base, AutoModelForSequenceClassification, num_labels=labels, saved=saved)
    kind, rows = model.config.problem_type, model.config.num_labels
    if rows < ANY_LABELS or kind not in (None, "single_label_classification"):
        reason = f"the base's head has {rows} labels ({kind}); a device chooses one of at least two"
        raise ConfigError(reason, about="head")
    return _slotted(model, wanted, saved)


def label_count(base: Base, brought: Mapping[str, tuple[int, ...]]) -> int | None:
    """Count the rows of the head that the adapter brings: of the tensors whose size depends on the number of labels."""
    two, three = (pretrained.parameter_shapes(base, AutoModelForSequenceClassification, n) for n in (2, 3))
    if unknown := sorted(set(brought) - set(two)):
        raise ConfigError(
            f"the base in {base.folder}, as a classifier, has no tensor named {', '.join(unknown)}, "
            "which the adapter brings: name the base that it was trained on",
            about=unknown[0],
        )
    return next((shape[0] for name, shape in sorted(brought.items()) if two[name] != three[name]), None)


def _slotted(model: nn.Module, slots: Slots, saved: list[str]) -> SlottedModel:
    layers = low_rank(model, slots, saved)
    names = vectors(model, slots, saved)
    if whole := [path for path in (*layers, *map(layer_of, names)) if in_modules(f"{path}.weight", saved)]:
        reason = f"every adapter brings {summary(whole)} whole, in modules_to_save: leave it out of the targets"
        raise ConfigError(reason, about="--targets")
    brought = [path for path, _ in model.named_modules() if path.endswith(tuple(saved))]
    outermost = [path for path in brought if not any(path.startswith(f"{other}.") for other in brought)]
    modules = tuple(saved_slot(path, model.get_submodule(path)) for path in outermost)
    loras = tuple(LoraSlot(path, 1.0) for path in layers)
    return SlottedModel(model.eval(), AdapterInputs("default", loras, modules, names, slots.virtual), bool(slots.first))
