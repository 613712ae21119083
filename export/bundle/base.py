"""The base that a command names: its usual task, and its export for a task."""

from adapters import classifier, pretrained
from adapters.base import Base, find_base
from adapters.classifier import LoraSpec
from adapters.manifest import Task
from aggregation.errors import ConfigError
from export.causal import export_causal
from export.causal.base import check_decoder
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile

HEADS = ("ForSequenceClassification", "ForMaskedLM", "ForPreTraining")  # heads that can be removed from an encoder
ANY_LABELS = 2  # the graph's head takes as many rows as an adapter brings


def usual_task(base: Base) -> Task:
    """The task that the base's configuration states: text generation for a causal language model, else classification.

    Raises:
        ConfigError: The base cannot be opened, or states a task that devices do not run.
    """
    config = pretrained.configuration(base)
    architecture = str(next(iter(config.architectures or []), ""))
    if architecture.endswith("ForConditionalGeneration"):
        check_decoder(config)
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "text-generation"
    if "For" in architecture and not architecture.endswith(HEADS):
        raise ConfigError(
            f"the base is a {architecture[:60]}, a task that devices do not run; choose a task with --task",
            about="architectures",
            value=architecture,
        )
    return "text-classification"


def export_named(
    name: str, task: str, profile: str, targets: tuple[str, ...], *, max_rank: int, head: str | None = None
) -> ExportedBase:
    """Find, build and export a base.

    Args:
        name: A folder, or a package that carries the model.
        task: ``text-classification`` or ``text-generation``.
        profile: One of ``Profile``.
        targets: Names of the layers that get slots.
        max_rank: The highest rank that the base manifest allows an adapter.
        head: Of a classifier: ``own``, the base's; ``mean``, a linear layer over the mean of its tokens; None: ``own``
            if the base has one.

    Raises:
        ConfigError: No such base, task or profile, no layer of these names, or a head for a language model.
    """
    try:
        chosen = Profile(profile)
    except ValueError:
        raise ConfigError(
            f"there is no profile {profile!r}; choose one of {', '.join(Profile)}", about="--profile", value=profile
        ) from None
    base = find_base(name)
    if task != "text-classification":
        if head is not None:
            raise ConfigError(
                "--head is for a classifier; a language model has its own output layer: leave it out", about="--head"
            )
        return export_causal(base, targets, chosen, max_rank=max_rank)
    lora = LoraSpec(targets=targets)
    own = classifier.has_own_head(base) if head is None else head == "own"
    model = classifier.build_own(base, lora) if own else classifier.build(base, ANY_LABELS, lora)
    return export_classifier(model, base, chosen, max_rank)
