"""The base that a command names, exported for its task."""

from adapters import classifier, pretrained
from adapters.base import Base, find_base
from adapters.classifier import LoraSpec
from adapters.manifest import Task
from aggregation.errors import ConfigError
from export.bundle.base import ExportedBase, export_base
from export.onnx.quantize import Profile

HEADS = ("ForSequenceClassification", "ForMaskedLM", "ForPreTraining")  # which leave an encoder when they are taken off
ANY_LABELS = 2  # the graph's head has as many rows as an adapter brings


def usual_task(base: Base) -> Task:
    """What the base's own configuration says that it was made for: to go on with a text, else to be given a head.

    Raises:
        ConfigError: It cannot be opened, or was made for something that no device asks.
    """
    made_for = str(next(iter(pretrained.configuration(base).architectures or []), ""))
    if made_for.endswith(("ForCausalLM", "LMHeadModel")):
        return "text-generation"
    if "For" in made_for and not made_for.endswith(HEADS):
        raise ConfigError(f"the base is a {made_for[:60]}, which no device asks; say with --task what it is for")
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
        max_rank: What the card allows an adapter.
        head: Of a classifier: ``own``, the base's; ``mean``, a linear layer over the mean of its tokens; None: ``own``
            if the base has one.

    Raises:
        ConfigError: No such base, task or profile, no layer of these names, or a head for a language model.
    """
    try:
        chosen = Profile(profile)
    except ValueError:
        raise ConfigError(f"there is no profile {profile!r}; choose one of {', '.join(Profile)}") from None
    base = find_base(name)
    if task != "text-classification":
        if head is not None:
            raise ConfigError("--head is for a classifier; a language model has its own output layer: leave it out")
        from export.causal import export_causal

        return export_causal(base, targets, chosen, max_rank=max_rank)
    lora = LoraSpec(targets=targets)
    own = classifier.has_own_head(base) if head is None else head == "own"
    model = classifier.build_own(base, lora) if own else classifier.build(base, ANY_LABELS, lora)
    return export_base(model, base, chosen, max_rank)
