"""A suite file: a scenario, arms that are compared on it, seeds, and how each arm finds its constants."""

import itertools
import json
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Annotated, Any, Self

from pydantic import Field, JsonValue, model_validator

from adapters.settings import Settings, overridden
from aggregation.errors import ConfigError

Overrides = dict[str, JsonValue]  # dotted key of a scenario → value
Seed = Annotated[int, Field(ge=0, lt=2**32)]
NAME = r"^[a-z0-9][a-z0-9-]{0,39}$"


class Kind(Enum):
    """How an arm makes what a client answers or writes with."""

    BASE = "base"  # the frozen base, a classifier's with the vendor's head
    LOCAL = "local"  # each client by itself
    RIDGE = "ridge-head"  # a linear head on frozen embeddings: least squares with an L2 penalty
    LOGISTIC = "logistic-head"  # the same with the logistic loss
    GLOBAL = "global"  # the last adapter of the federation
    PERSONAL = "personal"  # that adapter after the personal step
    CENTRAL = "central"  # one adapter, trained on the pooled data of all clients that are not unseen
    CENTRAL_PERSONAL = "central-personal"  # that adapter after the personal step

    @property
    def federated(self) -> bool:
        """Whether the arm begins with the rounds of a federation."""
        return self in (Kind.GLOBAL, Kind.PERSONAL)

    @property
    def of_embeddings(self) -> bool:
        """Whether the arm is a head on the embeddings of a frozen encoder."""
        return self in (Kind.RIDGE, Kind.LOGISTIC)


class SearchSettings(Settings):
    """How arms find their constants: on seeds and with settings of their own, never on a seed that is reported."""

    seeds: tuple[Seed, ...] = Field(default=(1000,), min_length=1, description="seeds of the searches")
    set: Overrides = Field(default_factory=dict, description="overrides of the scenario in searches, for every arm")


class ArmSettings(Settings):
    """One arm of a suite."""

    kind: Kind = Field(description="how the arm makes a client's model")
    set: Overrides = Field(default_factory=dict, description="overrides of the scenario, for this arm")
    search: dict[str, Annotated[tuple[JsonValue, ...], Field(min_length=1)]] = Field(
        default_factory=dict, description="key of the scenario → values to choose from; all combinations are tried"
    )

    def candidates(self) -> Iterator[Overrides]:
        """Every combination of the values to choose from; one without a key if there is nothing to choose."""
        for values in itertools.product(*self.search.values()):
            yield dict(zip(self.search, values, strict=True))


class SuiteSettings(Settings):
    """A suite. Overrides of an arm come after those of the suite."""

    name: str = Field(default="suite", pattern=NAME, description="name of the suite")
    scenario: str = Field(description="a scenario file, relative to the suite file, or one that is shipped")
    seeds: tuple[Seed, ...] = Field(default=(0, 1, 2), min_length=1, description="seeds that the report is about")
    baseline: str = Field(default="", description="the arm that every other arm is compared with; none if empty")
    compare: tuple[tuple[str, str], ...] = Field(default=(), description="further pairs of arms to compare")
    target: float = Field(
        default=0.0,
        ge=0,
        description="accuracy, or bits per byte, to which rounds and bytes are counted; 0: none",
    )
    set: Overrides = Field(default_factory=dict, description="overrides of the scenario, for every arm")
    search: SearchSettings = SearchSettings()
    arms: dict[Annotated[str, Field(pattern=NAME)], ArmSettings] = Field(min_length=1, description="name → arm")

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for name in (*([self.baseline] if self.baseline else []), *(arm for pair in self.compare for arm in pair)):
            if name not in self.arms:
                raise ValueError(f"there is no arm {name!r} to compare with; the arms are {', '.join(self.arms)}")
        for seeds in (self.seeds, self.search.seeds):
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"a seed occurs twice in {list(seeds)}")
        if both := sorted({*self.seeds} & {*self.search.seeds}):
            raise ValueError(f"seed {both[0]} is reported and searched on: constants must come from other seeds")
        for name, arm in self.arms.items():
            if "seed" in {*self.set, *self.search.set, *arm.set, *arm.search}:
                raise ValueError(f"arm {name!r} sets seed: write seeds and search.seeds instead")
        return self

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The pairs of arms that are compared, each once: every arm with the baseline, then the further ones."""
        against = [(name, self.baseline) for name in self.arms if self.baseline and name != self.baseline]
        return tuple(dict.fromkeys([*against, *self.compare]))

    def with_overrides(self, changes: Sequence[str]) -> Self:
        """The suite with ``KEY=VALUE`` of the scenario for every arm, after its own overrides.

        Raises:
            ConfigError: A change has another form.
        """
        found = dict(self.set)
        for change in changes:
            key = change.partition("=")[0].strip()
            value: Any = overridden({}, [change])
            for name in key.split("."):
                value = value[name]
            found[key] = value
        return self.parse(json.loads(self.model_dump_json()) | {"set": found}, "--set")

    def with_arms(self, names: Sequence[str]) -> Self:
        """The suite with some of its arms only, and the comparisons among them.

        Raises:
            ConfigError: There is no arm of a name.
        """
        if odd := [name for name in names if name not in self.arms]:
            text = f"there is no arm {odd[0]!r}; the arms are {', '.join(self.arms)}"
            raise ConfigError(text, about="--arm", value=odd[0])
        table = json.loads(self.model_dump_json())
        return self.parse(
            table
            | {"arms": {name: arm for name, arm in table["arms"].items() if name in names}}
            | {"compare": [pair for pair in table["compare"] if {*pair} <= {*names}]}
            | {"baseline": self.baseline if self.baseline in names else ""},
            "--arm",
        )

    def with_seeds(self, count: int) -> Self:
        """The suite with ``count`` seeds, from 0 on.

        Raises:
            ConfigError: A search uses one of them.
        """
        table = json.loads(self.model_dump_json()) | {"seeds": list(range(count))}
        return self.parse(table, "--seeds")
