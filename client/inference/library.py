"""The adapters of a bundle: chosen, verified when they are used, composed into one, and kept in memory.

A composition is several adapters as one: ``y = base(x) + Σ wᵢ Δᵢ(x)``, where Δᵢ is what adapter i changes at a layer;
docs/explanation/export.md has what becomes of each part.

A module of ``modules_to_save`` replaces the base's module instead of updating it, so two of them have no sum. They are
averaged, if their shapes and, for a head, the labels agree (docs/decisions/0013-slots-and-composition.md)."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import RLock
from typing import Any, Self, TypeVar, Union

import numpy as np
import onnxruntime as ort
from cachetools import LRUCache

from aggregation.errors import ConfigError, DataError
from client.inference.bank import AdapterBank, Update
from client.inference.trust import Trust
from edgeadapt.formats.bundle import VerifiedAdapter, VerifiedBase, adapter_names, manifest_path
from edgeadapt.formats.graphinputs import (
    BY_COLUMN,
    BY_ROW,
    PREFIX,
    PROMPT,
    REPLACED,
    SCALES,
    VIRTUAL,
    vector_kind,
    vector_site,
    virtual_tokens,
)
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.formats.manifest import AdapterManifest, BaseManifest, Task, check_name
from edgeadapt.formats.policy import PRIVATE
from edgeadapt.formats.storage import File, restore

MAX_WEIGHT = 16.0  # a larger multiple of an adapter's update is noise
GLOBAL = "global"
OTHER_COMMAND: dict[Task, str] = {
    "text-classification": "it classifies phrases: use `edgeadapt device infer`",
    "text-generation": "it writes text: use `edgeadapt device chat`",
}
V = TypeVar("V")
# Inode, size and time of writing (ns) of each part's manifest; None: it is not there.
Files = tuple[tuple[int, int, int] | None, ...]
Named = Union[str, Sequence[str], "Composition"]  # how a call names an adapter: ``Composition.of`` reads it


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """One adapter of a composition, and the factor of its update; a negative one subtracts the adapter."""

    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_name(self.name)
        if not 0 < abs(self.weight) <= MAX_WEIGHT:  # false for NaN too
            reason = f"the weight {self.weight} of adapter {self.name!r} is 0, or not between ±{MAX_WEIGHT:g}"
            raise ConfigError(reason, about="composition.weight")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``NAME`` or ``NAME:WEIGHT``. Raises ConfigError."""
        name, colon, weight = text.partition(":")
        try:
            return cls(name.strip(), float(weight) if colon else 1.0)
        except ValueError as error:
            reason = f"weight {weight!r} is not a number; write NAME:NUMBER, as in global:0.5+anna:1"
            raise ConfigError(reason, about="composition.weight") from error

    def __str__(self) -> str:
        return self.name if self.weight == 1 else f"{self.name}:{float(self.weight)!r}".removesuffix(".0")


@dataclass(frozen=True, slots=True)
class Composition:
    """The adapters to use as one, at least one, sorted by name.

    The order changes only the last bits of an answer; sorting gives equal compositions one form. Raises ConfigError: no
    adapter is named, or one is named twice.

    >>> str(Composition.parse("global:0.5 + anna"))
    'anna+global:0.5'
    """

    parts: tuple[WeightedAdapter, ...]

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if not names:
            raise ConfigError("no adapter is named; name at least one", about="composition")
        if repeated := [name for name in names if names.count(name) > 1]:
            reason = f"adapter {repeated[0]!r} is named twice; name it once, with the sum of its weights"
            raise ConfigError(reason, about="composition")
        object.__setattr__(self, "parts", tuple(sorted(self.parts, key=lambda part: part.name)))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``global``, ``global+anna`` or ``global:0.5+anna:1``. Law: ``parse(str(c)) == c``. Raises ConfigError: a
        name or weight is not valid, or a name is repeated."""
        return cls(tuple(WeightedAdapter.parse(part.strip()) for part in text.split("+")))

    @classmethod
    def of(cls, names: Named) -> "Composition":
        """Make a composition, also in writing, or of several names, each with the weight 1. Raises as ``parse``."""
        if isinstance(names, Composition):
            return names
        return cls.parse(names) if isinstance(names, str) else cls(tuple(map(WeightedAdapter, names)))

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))


@dataclass(frozen=True, slots=True)
class Adapter:
    composition: Composition
    manifests: tuple[AdapterManifest, ...]  # one for each part, in order
    rank: int  # the greatest of any layer
    virtual_tokens: int  # before each text
    nbytes: int  # size of ``inputs``
    inputs: Tensors = field(repr=False)  # by graph input
    read: Files = field(default=(), repr=False, compare=False)  # what ``Library.load`` read

    @classmethod
    def of(cls, composition: Composition, manifests: tuple[AdapterManifest, ...], inputs: Tensors) -> Self:
        rank = max((value.shape[1] for name, value in inputs.items() if name.endswith(BY_COLUMN)), default=0)
        nbytes = sum(value.nbytes for value in inputs.values())
        return cls(composition, manifests, rank, virtual_tokens(inputs), nbytes, inputs)

    @property
    def name(self) -> str:
        return str(self.composition)

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the head's rows; empty without a head."""
        return self.manifests[0].labels

    @property
    def temperature(self) -> float:
        """Divisor of the logits: the mean of the parts' temperatures, weighted as their heads are."""
        weights = [max(part.weight, 0.0) for part in self.composition.parts]
        if not any(weights):  # the base's own head answers
            return 1.0
        return float(np.average([manifest.temperature for manifest in self.manifests], weights=weights))

    @property
    def version(self) -> int:
        return max(manifest.version for manifest in self.manifests)


def compose(composition: Composition, verified: Sequence[VerifiedAdapter], base: BaseManifest) -> Adapter:
    """Compose the adapters of ``composition`` into one.

    ``verified``: what ``Trust.adapter`` returned for each part, in the same order, all for this base.

    Returns:
        Inputs in float32: A of shape ``(in, Σ rankᵢ)``, B of shape ``(Σ rankᵢ, out)``, and everything else in the shape
        of one adapter's. Guarantee: what the composition changes at a layer is the weighted sum of what each adapter
        changes there, up to float32 rounding. A single adapter of weight 1 is returned unchanged, and equal modules
        keep their exact values.

    Raises ConfigError: the labels differ; the ranks add up to more than the base allows; the weights of adapters that
    replace parameters do not add up to 1; an adapter with virtual tokens has another weight than 1; a prompt meets a
    prefix; or no adapter with a weight above 0 brings a head."""
    manifests = tuple(one.manifest for one in verified)
    if len(verified) == 1 and composition.parts[0].weight == 1:
        return Adapter.of(composition, manifests, verified[0].inputs)
    if other := [one for one in manifests if one.labels != manifests[0].labels]:
        reason = (
            f"adapters {manifests[0].name!r} and {other[0].name!r} have different labels, so their heads have no mean"
        )
        raise ConfigError(f"{reason}; use one at a time", about="composition.labels")
    weights = [part.weight for part in composition.parts]
    inputs = {name: _composed(name, [one.inputs[name] for one in verified], weights) for name in verified[0].inputs}
    if all(name in inputs and len(inputs[name]) for name in (PROMPT, PREFIX)):
        reason = f"{composition} has the virtual tokens of a prompt and of a prefix, whose order is not defined"
        raise ConfigError(f"{reason}; leave one out", about="composition.virtual_tokens")
    composed = Adapter.of(composition, manifests, inputs)
    if composed.rank > base.max_rank:
        reason = f"{composed.name} has rank {composed.rank}, above the base's limit of {base.max_rank}; leave one out"
        raise ConfigError(reason, about="composition.rank")
    return composed


def _composed(name: str, values: Sequence[Floats], weights: Sequence[float]) -> Floats:
    if name.endswith(BY_COLUMN):
        return np.concatenate(values, axis=1)
    if name.endswith(BY_ROW):
        return np.concatenate([np.float32(weight) * value for weight, value in zip(weights, values, strict=True)])
    if kind := vector_kind(name):
        vectors = [(value, weight) for value, weight in zip(values, weights, strict=True) if len(value)]
        return _vector(name, kind, vectors) if vectors else values[0]
    if name in VIRTUAL:
        if odd := [weight for value, weight in zip(values, weights, strict=True) if len(value) and weight != 1]:
            reason = f"an adapter with virtual tokens has the weight {odd[0]:g}, but tokens have no multiple; give 1"
            raise ConfigError(reason, about="composition.weight")
        return np.concatenate(values)
    if not any(weight > 0 for weight in weights):
        reason = "a module that replaces the base's, such as a head, cannot be subtracted; give one weight above 0"
        raise ConfigError(reason, about="composition.weight")
    # numpy averages in float64 with these weights, so that the mean of equal modules is exact.
    return np.average(values, axis=0, weights=np.maximum(weights, 0)).astype(np.float32)


def _vector(name: str, kind: str, given: Sequence[tuple[Floats, float]]) -> Floats:
    if len(given) == 1 and given[0][1] == 1:
        return given[0][0]
    weights = [weight for _, weight in given]
    if kind == REPLACED and not math.isclose(sum(weights), 1):
        reason = (
            f"{vector_site(name)!r} is replaced with weights that add up to {sum(weights):g}, not to 1: how far "
            "that is from the base's own is not known; give shares, as in global:0.5+anna:0.5"
        )
        raise ConfigError(reason, about="composition.weight")
    neutral = 1.0 if kind in SCALES else 0.0
    stacked = np.stack([value.astype(np.float64) for value, _ in given])
    result: Floats = (neutral + np.tensordot(weights, stacked - neutral, 1)).astype(np.float32)
    return result


@dataclass(frozen=True, slots=True)
class Library:
    """A bundle with its verified base. It keeps no adapter."""

    bundle: Path
    trust: Trust
    base: VerifiedBase
    bank: AdapterBank = field(compare=False)

    @classmethod
    def open(cls, bundle: File, trust: File | None, task: Task | None = None, *, update: Update | None = None) -> Self:
        """Verify the base of ``bundle``, which must be for ``task``, unless that is None.

        ``update``: ``client.updates.update``, if adapters that its channel has and the bundle lacks shall be fetched.
        Raises TrustError: there are no pinned keys, or none signed this base; DataError: there is no bundle, or a file
        is missing; ConfigError: the base is for another task (the message names its command), or needs a newer ONNX
        Runtime."""
        bundle = Path(bundle)
        restore(bundle)
        if not bundle.is_dir():
            why = "it is not a folder" if bundle.exists() else "there is no such folder"
            raise DataError(f"{bundle} is not a bundle: {why}", about="bundle")
        pinned = Trust.open(bundle, None if trust is None else Path(trust))
        base = pinned.bundle.base()
        if task not in (None, base.manifest.task):
            reason = f"the base in {bundle} is for {base.manifest.task}; {OTHER_COMMAND[base.manifest.task]}"
            raise ConfigError(reason, about="base.task")
        _check_runtime(bundle, base.manifest)
        return cls(bundle, pinned, base, AdapterBank(bundle, pinned.pinned, update))

    @property
    def manifest(self) -> BaseManifest:
        return self.base.manifest

    def names(self) -> list[str]:
        restore(self.bundle)  # or wait while it is replaced
        return adapter_names(self.bundle)

    def default(self, without: str | None = None) -> str:
        """Choose the adapter to use if none is named: the personal one, else the global one, else the only one, as if
        ``without`` were not there. Raises ConfigError: the choice is not unique; DataError: the bundle does not have an
        adapter; TrustError: no pinned key signed a manifest."""
        names = [name for name in self.names() if name != without]
        personal = [name for name in names if self.trust.bundle.adapter_manifest(name).parent is not None]
        every = sorted({*names, *self.bank.versions()} - {without})
        for candidates in (personal, [name for name in names if name == GLOBAL], every):
            if len(candidates) == 1:
                return candidates[0]
            if candidates:
                listed = ", ".join(candidates[:20]) + ", …" * (len(candidates) > 20)
                reason = f"the bundle has several adapters; choose one with --adapter: {listed}"
                raise ConfigError(reason, about="adapter")
        raise DataError(f"the bundle {self.bundle} has no adapter", about="adapter")

    def load(self, composition: Composition) -> Adapter:
        """Verify each part of ``composition``, and compose them. Raises as ``AdapterBank.bring``, ``Trust.adapter``,
        ``Policy.check_combination`` and ``compose``."""
        try:
            return self._load(composition)
        except DataError:  # perhaps the bundle was replaced meanwhile
            return self._load(composition)

    def _load(self, composition: Composition) -> Adapter:
        for part in composition.parts:
            self.bank.bring(part.name)
        self.bank.note(part.name for part in composition.parts)
        read = self._files(composition)
        verified = [self.trust.adapter(part.name, self.base) for part in composition.parts]
        self.base.policy.check_combination([PRIVATE if one.manifest.parent else one.manifest.name for one in verified])
        return replace(compose(composition, verified, self.manifest), read=read)

    def is_current(self, adapter: Adapter) -> bool:
        """Whether the bundle has the files from which an adapter was loaded, or deleted them for others of the release;
        a lesson or an update replaces them. The adapter counts as used."""
        self.bank.note(manifest.name for manifest in adapter.manifests)
        # A bundle that is being replaced is not there for an instant.
        if (files := self._files(adapter.composition)) == adapter.read or not self.bundle.exists():
            return True
        versions, parts = self.bank.versions(), zip(files, adapter.read, adapter.manifests, strict=True)
        return all(now == was or (now is None and versions.get(one.name) == one.version) for now, was, one in parts)

    def _files(self, composition: Composition) -> Files:
        paths = [self.bundle / manifest_path(part.name) for part in composition.parts]
        stats = [path.stat() if path.exists() else None for path in paths]
        return tuple(one and (one.st_ino, one.st_size, one.st_mtime_ns) for one in stats)


def _check_runtime(bundle: Path, base: BaseManifest) -> None:
    """Check that the installed ONNX Runtime runs a base. Its own error names one of the base's operators."""
    installed, needed = (re.findall(r"\d+", text)[:2] for text in (ort.__version__, base.onnxruntime))
    if list(map(int, installed)) < list(map(int, needed)):
        raise ConfigError(
            f"the base in {bundle} needs ONNX Runtime {base.onnxruntime} or newer, and {ort.__version__} is installed: "
            "run pip install -U onnxruntime",
            about="onnxruntime",
        )


class AdapterCache(LRUCache[Composition, V]):
    """The adapters that were used last and are current, limited in number and in bytes. Threads may share it. An
    adapter of more than ``nbytes`` counts as ``nbytes``: it must run, so it is held, but alone."""

    def __init__(
        self,
        count: int,
        nbytes: int,
        sizeof: Callable[[V], int],
        is_current: Callable[[V], bool],
        evicted: Callable[[V], Any] = lambda _: None,
    ) -> None:
        """Start empty, for at most ``count`` adapters of ``nbytes``. Raises ConfigError: a limit is below 1.
        ``evicted`` is called with each adapter that is not held any more."""
        for about, limit in (("loaded", count), ("loaded_bytes", nbytes)):
            if limit < 1:
                raise ConfigError(f"{about} {limit} is below 1: no adapter could be held", about=about)
        super().__init__(nbytes, lambda value: min(sizeof(value), nbytes))
        self._count, self._is_current, self._evicted, self._lock = count, is_current, evicted, RLock()

    def get(self, key: Composition) -> V | None:  # type: ignore[override]
        """Find the adapter, which counts as used now; None if it is not held, or not current."""
        with self._lock:
            if (value := super().get(key)) is not None and not self._is_current(value):
                self._evicted(self.pop(key))
                return None
            return value

    def __setitem__(self, key: Composition, value: V) -> None:
        with self._lock:
            while key not in self and len(self) >= self._count:
                self.popitem()
            super().__setitem__(key, value)

    def popitem(self) -> tuple[Composition, V]:
        key, value = super().popitem()
        self._evicted(value)
        return key, value
