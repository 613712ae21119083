"""A suite file, and what a suite computes: trials, of which each is one arm's settings on one seed.

A trial is named by the digest of all that it depends on, and so is a federation. Arms that need the same rounds share
them, a resumed suite finds what is finished, and a changed suite computes what is new. A run of a scenario is the
default arms on one seed."""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, JsonValue, model_validator

from aggregation.errors import ConfigError
from edgeadapt.formats.settings import Settings, overridden, toml_value
from simulations.result import ARMS, Outcome, TrialResult, metric_of
from simulations.scenario import Scenario

Overrides = dict[str, JsonValue]  # dotted key of a scenario → value
Seed = Annotated[int, Field(ge=0, lt=2**32)]
NAME = r"^[a-z0-9][a-z0-9-]{0,39}$"
AFTER_THE_ROUNDS = {"name", "personal", "local", "head", "export"}  # tables of a scenario that no round depends on
CLIENT_SECONDS = 2.0  # of scoring, in epochs of a client; for the estimate of the time that is left
DIGITS = 20  # hexadecimal, of a digest


class Kind(Enum):
    BASE = "base"  # the frozen base, a classifier's with the vendor's head
    LOCAL = "local"  # each client by itself
    RIDGE = "ridge-head"  # a linear head on frozen embeddings: least squares with an L2 penalty
    LOGISTIC = "logistic-head"  # the same with the logistic loss
    SUMMED = "summed-head"  # least squares over all clients that are not unseen, fitted to the client's own texts
    GLOBAL = "global"  # the last adapter of the federation
    ROUTED = "routed"  # for each text, that of the group which a router names
    PERSONAL = "personal"  # the last adapter after the personal step
    CENTRAL = "central"  # one adapter, trained on the pooled data of all clients that are not unseen
    CENTRAL_PERSONAL = "central-personal"  # that adapter after the personal step

    @property
    def federated(self) -> bool:
        return self in (Kind.GLOBAL, Kind.ROUTED, Kind.PERSONAL)

    @property
    def pooled(self) -> bool:
        return self in (Kind.CENTRAL, Kind.CENTRAL_PERSONAL)

    @property
    def of_embeddings(self) -> bool:
        """Check whether the arm is a linear head on what a frozen encoder or n-grams say of a text."""
        return self in (Kind.RIDGE, Kind.LOGISTIC, Kind.SUMMED)

    def training(self, rounds: int, personal: int) -> tuple[tuple[str, int], ...]:
        """Return the arm's trainings: who trains (``seen``, ``pooled``, ``everyone`` or the personal step), how long.
        ``rounds`` and ``personal`` are the epochs of all rounds together, and of the personal step."""
        step = ("step", personal)
        return {
            Kind.LOCAL: (("everyone", rounds), step),
            Kind.GLOBAL: (("seen", rounds),),
            Kind.ROUTED: (("seen", rounds),),
            Kind.PERSONAL: (("seen", rounds), step),
            Kind.CENTRAL: (("pooled", rounds),),
            Kind.CENTRAL_PERSONAL: (("pooled", rounds), step),
        }.get(self, ())


class SearchSettings(Settings):
    """How arms find their constants: on seeds and with settings of their own, never on a seed that is reported."""

    seeds: tuple[Seed, ...] = Field(default=(1000,), min_length=1, description="seeds of the searches")
    set: Overrides = Field(default_factory=dict, description="overrides of the scenario in searches, for every arm")


class ArmSettings(Settings):
    kind: Kind = Field(description="how the arm makes a client's model")
    set: Overrides = Field(default_factory=dict, description="overrides of the scenario, for this arm")
    search: dict[str, Annotated[tuple[JsonValue, ...], Field(min_length=1)]] = Field(
        default_factory=dict, description="key of the scenario → values to choose from; all combinations are tried"
    )

    def candidates(self) -> Iterator[Overrides]:
        """Yield every combination of the values to choose from; one without a key if there is nothing to choose."""
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
        default=0.0, ge=0, description="accuracy, or bits per byte, to which rounds and bytes are counted; 0: none"
    )
    set: Overrides = Field(default_factory=dict, description="overrides of the scenario, for every arm")
    vary: dict[str, Annotated[dict[str, Overrides], Field(min_length=1)]] = Field(
        default_factory=dict,
        max_length=3,
        description="axes of a map, each with its places and their overrides: the suite is run at every combination",
    )
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
        if self.vary and not self.compare:
            raise ValueError("vary needs compare: the first arm of its first pair is the one that the map is about")
        return self

    @property
    def cells(self) -> dict[tuple[str, ...], Self]:
        """Return the suite at each place of its map, by a label of each axis; without a map only itself, under ()."""
        table, cells = self.model_dump(mode="json"), dict[tuple[str, ...], Self]()
        for place in itertools.product(*self.vary.values()):
            overrides = dict(self.set)
            for axis, label in zip(self.vary.values(), place, strict=True):
                overrides |= axis[label]
            cells[place] = self.parse(table | {"vary": {}, "set": overrides}, "vary")
        return cells

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Return the pairs of arms to compare, each once: every arm with the baseline, then the further ones."""
        against = [(name, self.baseline) for name in self.arms if self.baseline and name != self.baseline]
        return tuple(dict.fromkeys([*against, *self.compare]))

    def with_overrides(self, changes: Sequence[str]) -> Self:
        """Return the suite with ``KEY=VALUE`` of the scenario for every arm, after its own. Raises ConfigError."""
        overrides = dict(self.set)
        for change in changes:
            key = change.partition("=")[0].strip()
            value: Any = overridden({}, [change])
            for name in key.split("."):
                value = value[name]
            overrides[key] = value
        return self.parse(self.model_dump(mode="json") | {"set": overrides}, "--set")

    def with_arms(self, names: Sequence[str]) -> Self:
        """Return the suite with some of its arms, and their comparisons. Raises ConfigError if one is missing."""
        if odd := [name for name in names if name not in self.arms]:
            raise ConfigError(f"there is no arm {odd[0]!r}; the arms are {', '.join(self.arms)}", about="--arm")
        table = self.model_dump(mode="json")
        return self.parse(
            table
            | {"arms": {name: arm for name, arm in table["arms"].items() if name in names}}
            | {"compare": [pair for pair in table["compare"] if {*pair} <= {*names}]}
            | {"baseline": self.baseline if self.baseline in names else ""},
            "--arm",
        )

    def with_seeds(self, count: int) -> Self:
        """Return the suite with ``count`` seeds, from 0 on. Raises ConfigError: a search uses one of them."""
        return self.parse(self.model_dump(mode="json") | {"seeds": list(range(count))}, "--seeds")


@dataclass(frozen=True)
class Trial:
    kind: Kind
    scenario: Scenario

    @cached_property
    def digest(self) -> str:
        """Name all that its result depends on; the name of its file."""
        table = json.loads(self.scenario.model_dump_json(exclude={"name"}))
        return digest_of({"kind": self.kind.value, **table})

    @cached_property
    def federation(self) -> str:
        """Name all that its rounds depend on, the name of their folder; empty if it has none."""
        return digest_of(json.loads(self.rounds.model_dump_json())) if self.kind.federated else ""

    @property
    def rounds(self) -> Scenario:
        """Return the scenario with the defaults for all that no round depends on."""
        kept = self.scenario.model_dump(mode="json", exclude=AFTER_THE_ROUNDS)
        return Scenario.parse({**kept, "name": "federation"}, "a suite")

    @property
    def rounds_weight(self) -> float:
        return self._seen * self.scenario.round_epochs if self.kind.federated else 0.0

    @property
    def weight(self) -> float:
        """Return the work after the rounds, in epochs of a client."""
        clients, fine = float(self._clients), self.scenario.personal.training_epochs
        who = {"seen": 0.0, "pooled": self._seen, "everyone": clients, "step": clients}
        trained = sum(who[name] * epochs for name, epochs in self.kind.training(self.scenario.round_epochs, fine))
        return trained + CLIENT_SECONDS * clients

    @property
    def _clients(self) -> int:
        data = self.scenario.data
        return data.clients if data.given else self.scenario.population.households

    @property
    def _seen(self) -> float:
        data = self.scenario.data
        return (1 - (data.unseen if data.given else self.scenario.population.unseen)) * self._clients


def default_trials(scenario: Scenario) -> dict[str, Trial]:
    return {name: Trial(Kind(name), scenario) for name in ARMS}


@dataclass(frozen=True)
class Suite:
    settings: SuiteSettings
    scenario: Mapping[str, Any]
    folder: Path  # relative paths of data are taken from it

    def trial(self, name: str, seed: int, constants: Overrides, *, searched: bool = False) -> Trial:
        """Return the trial of an arm with the constants that the search chose, or with a candidate of it."""
        key = name, seed, json.dumps(constants), searched
        if key not in self._made:
            self._made[key] = self._trial(name, seed, constants, searched)
        return self._made[key]

    @cached_property
    def _made(self) -> dict[tuple[str, int, str, bool], Trial]:
        return {}

    def _trial(self, name: str, seed: int, constants: Overrides, searched: bool) -> Trial:
        arm, common = self.settings.arms[name], self.settings.search.set if searched else {}
        layers: tuple[Overrides, ...] = (self.settings.set, arm.set, common, constants, {"seed": seed})
        changes = [f"{key}={toml_value(value)}" for layer in layers for key, value in layer.items()]
        where = f"arm {name!r}"
        scenario = Scenario.parse(overridden(dict(self.scenario), changes), where).located(self.folder)
        scenario.data.require_texts()
        if scenario.data.for_language_model and arm.kind.of_embeddings:
            text = f"{where} fits a head to embeddings, and a language model has no head: leave the arm out with --arm"
            raise ConfigError(text, about="data.label")
        if scenario.data.own_task and arm.kind.of_embeddings:
            text = f"{where} fits a head to classes, which the task {scenario.data.task!r} does not have: leave it out"
            raise ConfigError(f"{text} with --arm", about="data.task")
        if arm.kind is Kind.ROUTED and (scenario.groups.by == "none" or scenario.data.own_task):
            reason = f"{where} routes texts to classifiers of groups: set groups.by to discovered or language"
            raise ConfigError(f"{reason}, or leave it out with --arm", about="groups.by")
        return Trial(arm.kind, scenario)

    def trials(self, name: str, constants: Overrides) -> Iterator[tuple[int, Trial]]:
        for seed in self.settings.seeds:
            yield seed, self.trial(name, seed, constants)

    @cached_property
    def cells(self) -> "dict[tuple[str, ...], Suite]":
        """As ``SuiteSettings.cells``."""
        return {place: replace(self, settings=settings) for place, settings in self.settings.cells.items()}

    def reported(self) -> Iterator[Trial]:
        """Yield the trials of every cell and arm that are reported, whatever candidate its search may choose."""
        for cell in self.cells.values():
            for name, arm in cell.settings.arms.items():
                for constants in arm.candidates():
                    yield from (trial for _, trial in cell.trials(name, constants))

    def candidate(self, name: str, constants: Overrides) -> list[Trial]:
        """Return the trials of one candidate of a search, one for each of its seeds."""
        return [self.trial(name, seed, constants, searched=True) for seed in self.settings.search.seeds]

    def check(self) -> None:
        """Check that every trial can be made. Raises as ``trial``."""
        for cell in self.cells.values():
            for name, arm in cell.settings.arms.items():
                for constants in arm.candidates():
                    cell.candidate(name, constants)
        list(self.reported())


@dataclass(frozen=True, slots=True)
class SearchOutcome:
    constants: Overrides  # the best candidate
    scores: tuple[tuple[Overrides, float | None], ...]
    cpu_seconds: float  # of all candidates together, as if each trained its rounds for itself


Results = Callable[[Trial], Outcome | None]  # what is stored of a trial


def search(suite: Suite, name: str, results: Results) -> SearchOutcome | None:
    """Return the outcome of an arm's search; None as long as a trial of it is missing. The best candidate has the best
    mean score on the clients' validation texts, accuracy or bits per byte, over clients and then over seeds; among
    equals the least loss; among these it is the first."""
    arm = suite.settings.arms[name]
    candidates = list(arm.candidates())
    if not arm.search:
        return SearchOutcome({}, (), 0.0)
    outcomes = [[results(trial) for trial in suite.candidate(name, constants)] for constants in candidates]
    if any(outcome is None for row in outcomes for outcome in row):
        return None
    scores = [_validation([o for o in row if isinstance(o, TrialResult)], len(row)) for row in outcomes]
    if all(score is None for score in scores):
        failures = [outcome for row in outcomes for outcome in row if isinstance(outcome, str)]
        raise ConfigError(f"every candidate of arm {name!r} failed, the first with: {failures[0]}", about=name)
    if any(score is not None and math.isnan(score[0]) for score in scores):
        raise ConfigError(
            f"arm {name!r} cannot be searched: no client has a validation text; set a validation share, or remove "
            "the search",
            about=name,
        )
    best = max((i for i, score in enumerate(scores) if score is not None), key=lambda i: (scores[i], -i))
    rows = zip(candidates, scores, strict=True)
    cpu = sum(o.cost.cpu_seconds for row in outcomes for o in row if isinstance(o, TrialResult))
    return SearchOutcome(candidates[best], tuple((c, s and s[0]) for c, s in rows), cpu)


def _validation(results: Sequence[TrialResult], wanted: int) -> tuple[float, float] | None:
    """Return score and negative loss on validation texts: means over seeds of means over clients that have some."""
    if len(results) < wanted:
        return None
    tallies = [[client.validation for client in result.clients if client.validation.count] for result in results]
    if not all(tallies):
        return math.nan, math.nan
    metric = metric_of(results)
    score = [sum(metric.score(tally) for tally in row) / len(row) for row in tallies]
    loss = [sum(tally.loss for tally in row) / len(row) for row in tallies]
    return sum(score) / wanted, -sum(loss) / wanted


def digest_of(table: Mapping[str, Any]) -> str:
    canonical = json.dumps(table, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:DIGITS]
