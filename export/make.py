"""The base that a command names, exported for its task."""

import json

from adapters import classifier
from adapters.base import Base, find_base
from adapters.classifier import LoraSpec
from adapters.manifest import Task
from aggregation.errors import ConfigError, DataError
from export.base import ExportedBase, export_base
from export.quantize import Profile

ANY_LABELS = 2  # the graph's head has as many rows as an adapter brings


def usual_task(base: Base) -> Task:
    """What the base's own configuration says that it was made for: to go on with a text, else to be given a head.

    Raises:
        DataError: ``config.json`` is not sound.
    """
    file = base.folder / "config.json"
    try:
        made_for = str((json.loads(file.read_bytes()).get("architectures") or [""])[0])
    except (ValueError, AttributeError, LookupError) as error:
        raise DataError(f"{file} is no configuration of a model: {error}") from error
    return "text-generation" if made_for.endswith(("ForCausalLM", "LMHeadModel")) else "text-classification"


def export_named(name: str, task: str, profile: str, targets: tuple[str, ...], max_rank: int) -> ExportedBase:
    """Find, build and export a base.

    Args:
        name: A folder, or a package that carries the model.
        task: ``text-classification`` or ``text-generation``.
        profile: One of ``Profile``.
        targets: Names of the layers that get slots.
        max_rank: What the card allows an adapter.

    Raises:
        ConfigError: No such base, task or profile, or no layer of these names.
    """
    try:
        chosen = Profile(profile)
    except ValueError:
        raise ConfigError(f"there is no profile {profile!r}; choose one of {', '.join(Profile)}") from None
    base = find_base(name)
    if task != "text-classification":
        from export.causal import export_causal

        return export_causal(base, targets, chosen, max_rank=max_rank)
    model = classifier.build(base, ANY_LABELS, LoraSpec(targets=targets))
    return export_base(model, base, chosen, max_rank)
