"""The linear layers that targets name: names, paths, patterns, or all of them."""

import re
from collections.abc import Sequence

from torch import nn

from adapters import pretrained
from adapters.peft.inputs import in_modules, summary
from aggregation.errors import ConfigError

ALL = "all-linear"  # peft's word for every linear layer except those that return the answer
NAME = re.compile(r"[\w.-]+")


def linear_layers(model: nn.Module, targets: Sequence[str], heads: Sequence[str] = ()) -> list[str]:
    """The paths of the layers that ``targets`` name, in the order of the module tree.

    A target means what it means to peft: ``all-linear``; a name or path, for the end of a layer's path; or a regular
    expression, for a whole path.

    Args:
        model: Of transformers, or one that holds such a model.
        targets: The targets.
        heads: Names of modules that return the answer, which ``all-linear`` leaves out.

    Raises:
        ConfigError: Targets that match no module, all of which are named, or modules that are not linear layers.
    """
    modules = dict(model.named_modules())
    linear = {path for path, module in modules.items() if path and pretrained.is_linear(module)}
    matched = {target: _matched(target, model, modules, linear, heads) for target in targets}
    if missing := [target for target, paths in matched.items() if not paths]:
        raise ConfigError(
            f"the base has no layer named {summary(missing)}; it has {pretrained.layer_names(model)}",
            about="--targets",
            value=missing,
        )
    found: set[str] = set().union(*matched.values())
    if odd := [path for path in modules if path in found - linear]:
        kind = type(modules[odd[0]]).__name__
        raise ConfigError(
            f"an adapter on {kind} cannot be exported, only on linear layers: {summary(odd)}",
            about=kind,
            value=odd[0],
        )
    return [path for path in modules if path in found]


def _matched(
    target: str, model: nn.Module, modules: dict[str, nn.Module], linear: set[str], heads: Sequence[str]
) -> set[str]:
    if target == ALL:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        return {path for path in linear if modules[path] is not output and not in_modules(f"{path}.weight", heads)}
    if NAME.fullmatch(target):
        return {path for path in modules if path == target or path.endswith(f".{target}")}
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise ConfigError(f"{target!r} is no regular expression: {error}", about="--targets", value=target) from error
    return {path for path in linear if pattern.fullmatch(path)}
