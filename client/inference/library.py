"""The bundle behind a session or a generator: its verified base, and its adapters, verified when they are asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from adapters.manifest import BaseManifest, Task
from aggregation.errors import ConfigError, DataError
from client.inference.compose import Adapter, Choice, WeightedAdapter, choose, compose, parse
from client.inference.trust import Trust, VerifiedBase, adapter_names

SHARED = "global"
INSTEAD: dict[Task, str] = {
    "text-classification": "it answers phrases with intents: use `edgeadapt device infer`",
    "text-generation": "it writes text: use `edgeadapt device chat`",
}


@dataclass(frozen=True, slots=True)
class Library:
    """A bundle with its verified base; holds no adapter."""

    bundle: Path
    trust: Trust
    base: VerifiedBase

    @classmethod
    def open(cls, bundle: Path, trust: Path | None, task: Task | None = None) -> Self:
        """Verify the base of ``bundle``, which has to be for ``task`` if one is named.

        Raises:
            TrustError: No pinned keys, or the base is not what one of them signed.
            DataError: There is no bundle, or a file is missing.
            ConfigError: The base is for another task; the message names what to use instead.
        """
        if not bundle.is_dir():
            raise DataError(f"there is no bundle at {bundle}")
        pinned = Trust.open(bundle, trust)
        base = pinned.base(bundle)
        if task not in (None, base.card.task):
            raise ConfigError(f"the base in {bundle} is for {base.card.task}; {INSTEAD[base.card.task]}")
        return cls(bundle, pinned, base)

    @property
    def card(self) -> BaseManifest:
        """The base's."""
        return self.base.card

    def names(self) -> list[str]:
        """The adapters that the bundle seems to have; nothing of them is verified."""
        return adapter_names(self.bundle)

    def default(self) -> str:
        """The adapter for someone who names none: the private one, else the shared one, else the only one.

        Raises:
            ConfigError: There is no such one; the message lists what there is.
            DataError: There is no adapter at all.
            TrustError: A sidecar is not what a pinned key signed.
        """
        names = self.names()
        private = [name for name in names if self.trust.sidecar(self.bundle, name).parent is not None]
        for choice in (private, [name for name in names if name == SHARED], names):
            if len(choice) == 1:
                return choice[0]
            if choice:
                raise ConfigError(f"several adapters could be meant; choose with --adapter: {', '.join(choice)}")
        raise DataError(f"the bundle {self.bundle} has no adapter")

    def load(self, choice: Choice) -> Adapter:
        """Verify each part of ``choice`` and make one adapter of them.

        Raises:
            TrustError, DataError, ConfigError: As ``Trust.adapter`` and ``compose``.
        """
        return compose(choice, [self.trust.adapter(self.bundle, self.base, part.name) for part in choice], self.card)


def chosen(names: str | Sequence[str], weights: Sequence[float] | None = None) -> Choice:
    """What was asked for: a choice in writing (``global:0.5+anna``), or names with or without weights.

    Raises:
        ConfigError: As ``compose.parse``, or there are not as many weights as names.
    """
    if isinstance(names, str) and weights is None:
        return parse(names)
    listed = [names] if isinstance(names, str) else list(names)
    given = [1.0] * len(listed) if weights is None else list(weights)
    if len(given) != len(listed):
        raise ConfigError(f"{len(listed)} adapters were named and {len(given)} weights given; give one for each")
    return choose([WeightedAdapter(name, weight) for name, weight in zip(listed, given, strict=True)])
