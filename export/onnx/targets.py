"""Where a base gets slots: the layers that targets name, and the vectors at them."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from torch import nn

from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.formats.graphinputs import (
    BOTTLENECK,
    ENDINGS,
    INPUT_SCALE,
    OFFSET,
    OUTPUT_SCALE,
    PREFIX,
    PROMPT,
    REPLACED,
    in_modules,
    layer_of,
    vector_site,
)
from edgeadapt.formats.peftconfig import layer_number
from edgeadapt.methods.peft.inputs import summary

ALL = "all-linear"  # peft's word for every linear layer except those that return the answer
NAME = re.compile(r"[\w.-]+")


class SlotKind(StrEnum):
    """What an adapter can bring for a layer; docs/reference/methods.md lists the methods that need each."""

    LOW_RANK = "low-rank"
    SCALE = "scale"
    INPUT_SCALE = "input-scale"
    OFFSET = "offset"
    NORMS = "norms"  # the parameters of every normalization
    BIASES = "biases"  # in every layer and normalization
    PROMPT = "prompt"  # the embeddings of virtual tokens before a text
    PREFIX = "prefix"  # the keys and values of virtual tokens, of a language model
    BOTTLENECK = "bottleneck"  # with swish
    BOTTLENECK_RELU = "bottleneck-relu"
    BOTTLENECK_GELU = "bottleneck-gelu"


AT_LAYERS: dict[SlotKind, tuple[str, ...]] = {  # kind → the endings of its graph inputs
    SlotKind.SCALE: (OUTPUT_SCALE,),
    SlotKind.INPUT_SCALE: (INPUT_SCALE,),
    SlotKind.OFFSET: (OFFSET,),
} | {SlotKind(method.replace("_", "-")): endings for method, endings in ENDINGS.items()}


NORMS = frozenset({SlotKind.NORMS})


@dataclass(frozen=True, slots=True)
class Slots:
    """The slots of a base: ``kinds`` at the layers that ``targets`` name, and those that one adapter needs."""

    targets: tuple[str, ...] = ()  # for ``linear_layers``
    kinds: frozenset[SlotKind] = frozenset({SlotKind.LOW_RANK})
    layers: tuple[str, ...] = ()  # the paths of the layers for which an adapter has LoRA matrices
    vectors: tuple[str, ...] = ()  # the graph inputs of an adapter's vectors
    adapter_virtual: tuple[str, ...] = ()  # the graph inputs of an adapter's virtual tokens
    first: int = 0  # number of the first layer with slots, or, if it is negative, how many of the last ones; 0: all

    def __post_init__(self) -> None:
        """Raises ConfigError: virtual tokens enter below the layers that have slots."""
        if self.first and self.virtual:
            raise ConfigError(
                "virtual tokens enter below all layers: leave out --layers, or the slots of virtual tokens",
                about="--layers",
            )

    @classmethod
    def of(cls, slots: Self | Sequence[str]) -> Self:
        return slots if isinstance(slots, cls) else cls(tuple(slots))  # type: ignore[arg-type]

    @property
    def virtual(self) -> tuple[str, ...]:
        kinds = {PROMPT: SlotKind.PROMPT, PREFIX: SlotKind.PREFIX}
        return tuple(name for name, kind in kinds.items() if kind in self.kinds or name in self.adapter_virtual)


def low_rank(model: nn.Module, slots: Slots, heads: Sequence[str] = ()) -> list[str]:
    """List the layers that get low-rank slots. ``model``, ``heads`` and errors are those of ``vectors``."""
    chosen = {*linear_layers(model, slots.layers)}
    if SlotKind.LOW_RANK in slots.kinds:
        chosen.update(_targeted(model, slots, heads))
    below = _below(model, slots)
    _refuse_below([path for path in slots.layers if below(path)], slots)
    return [path for path, _ in model.named_modules() if path in chosen]


def vectors(model: nn.Module, slots: Slots, heads: Sequence[str] = (), *, norms: bool = True) -> tuple[str, ...]:
    """List the graph inputs of all vectors, in the order of the module tree.

    ``model`` and errors are those of ``linear_layers``; ``heads`` are names of modules that adapters bring whole;
    ``norms``: bottleneck adapters may be at normalizations.
    Raises ConfigError: as ``linear_layers``, or the base lacks the layer or the parameter of a vector, or the first
    layer with slots, or an adapter's is below it."""
    at = [ending for kind, endings in AT_LAYERS.items() if kind in slots.kinds for ending in endings]
    below = _below(model, slots)
    _refuse_below([name for name in slots.vectors if below(layer_of(name))], slots)
    targeted = {of: _targeted(model, slots, heads, norms=of and norms) for of in {end in BOTTLENECK for end in at}}
    names = {path + ending for ending in at for path in targeted[ending in BOTTLENECK]}
    for path, module in model.named_modules():
        if below(path):
            continue
        replaced = [f"{path}.{name}{REPLACED}" for name in _replaceable(module, slots.kinds)]
        names.update(name for name in replaced if not in_modules(vector_site(name), heads))
    brought = [name for name in slots.vectors if not name.endswith(REPLACED)]
    linear_layers(model, [layer_of(name) for name in brought if not name.endswith(BOTTLENECK)])
    linear_layers(model, [layer_of(name) for name in brought if name.endswith(BOTTLENECK)], norms=norms)
    parameters = {name for name, value in model.named_parameters() if value.ndim == 1}
    sites = [vector_site(name) for name in slots.vectors if name.endswith(REPLACED)]
    if missing := [name for name in sites if name not in parameters]:
        raise ConfigError(f"the base has no vector among its parameters named {summary(missing)}", about="vectors")
    places = {path: number for number, (path, _) in enumerate(model.named_modules())}
    return tuple(sorted(names | set(slots.vectors), key=lambda name: (places[layer_of(name)], name)))


def _targeted(model: nn.Module, slots: Slots, heads: Sequence[str], *, norms: bool = False) -> list[str]:
    """List the layers that the targets name, without those below. Raises ConfigError: all of a target's are below."""
    below, paths = _below(model, slots), linear_layers(model, slots.targets, heads, norms=norms)
    if slots.first:
        found = {one: linear_layers(model, [one], heads, norms=norms) for one in slots.targets}
        _refuse_below([one for one, at in found.items() if all(map(below, at))], slots)
    return [path for path in paths if not below(path)]


def _below(model: nn.Module, slots: Slots) -> Callable[[str], bool]:
    """Make what tells whether a module is below the first layer with slots, or in none. Raises ConfigError: the base
    lacks this layer."""
    if not slots.first:
        return lambda _: False
    count = 1 + max(_number(path) for path, _ in model.named_modules())
    first = slots.first if slots.first > 0 else count + slots.first
    if not 0 <= first < count:
        raise ConfigError(
            f"the base has {count} layers with a number: choose at most so many with --layers", about="--layers"
        )
    return lambda path: _number(path) < first


def _refuse_below(names: Sequence[str], slots: Slots) -> None:
    if names:
        raise ConfigError(
            f"{summary(names)} is below the layers that get slots: choose more of them with --layers", about="--layers"
        )


def _number(path: str) -> int:
    """Return the number of the layer that a module is, or is in; -1 outside of layers."""
    number = layer_number(f"{path}.")
    return -1 if number is None else number


def _replaceable(module: nn.Module, kinds: frozenset[SlotKind]) -> Iterator[str]:
    own = {name: value.ndim for name, value in module.named_parameters(recurse=False)}
    norm = own.get("weight") == 1
    for name, dimensions in own.items():
        wanted = (SlotKind.NORMS in kinds and norm) or (SlotKind.BIASES in kinds and name == "bias")
        if dimensions == 1 and wanted and (norm or pretrained.is_linear(module)):
            yield name


def linear_layers(
    model: nn.Module, targets: Sequence[str], heads: Sequence[str] = (), *, norms: bool = False
) -> list[str]:
    """List the paths of the layers that ``targets`` name, with ``norms`` also normalizations, in the tree's order.

    A target means what it means to peft: ``all-linear``, which leaves out ``heads``, modules that return the answer; a
    name or path, for the end of a layer's path; or a regular expression, for a whole path. Raises ConfigError: targets
    that match no module, all of which are named, or modules that are not linear layers."""
    modules = dict(model.named_modules())
    linear = {path for path, module in modules.items() if path and pretrained.is_linear(module)}
    matched = {target: _matched(target, model, modules, linear, heads) for target in targets}
    if missing := [target for target, paths in matched.items() if not paths]:
        raise ConfigError(
            f"the base has no layer named {', '.join(missing)}: choose --targets among "
            f"{pretrained.layer_names(model)}, or use a base of another architecture",
            about="--targets",
        )
    chosen: set[str] = set().union(*matched.values())
    fitting = linear | {path for path in chosen if norms and any(_replaceable(modules[path], NORMS))}
    if odd := [path for path in modules if path in chosen - fitting]:
        kind = type(modules[odd[0]]).__name__
        reason = f"an adapter on {kind} cannot be exported, only on linear layers: {summary(odd)}"
        raise ConfigError(reason, about=kind)
    return [path for path in modules if path in chosen]


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
        raise ConfigError(f"{target!r} is no regular expression: {error}", about="--targets") from error
    return {path for path in linear if pattern.fullmatch(path)}
