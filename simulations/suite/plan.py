"""What a suite computes: trials, of which each is one arm's settings on one seed, and the choice of an arm's constants.

A trial is named by the digest of all that it depends on, and so is a federation. Arms that need the same rounds share
them, a resumed suite finds what is finished, and a changed suite computes what is new.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adapters.settings import overridden, toml_value
from aggregation.errors import ConfigError
from simulations.scenario import Scenario
from simulations.suite.metric import metric_of
from simulations.suite.outcome import Outcome, TrialResult
from simulations.suite.settings import Kind, Overrides, SuiteSettings

AFTER_THE_ROUNDS = {"name", "personal", "local", "head", "export"}  # tables of a scenario that no round depends on
CLIENT_SECONDS = 2.0  # of scoring, in epochs of a client; for the estimate of the time that is left
DIGITS = 20  # hexadecimal, of a digest


@dataclass(frozen=True)
class Trial:
    """One arm's settings on one seed."""

    kind: Kind
    scenario: Scenario

    @cached_property
    def digest(self) -> str:
        """Of all that its result depends on; names its file."""
        table = json.loads(self.scenario.model_dump_json(exclude={"name"}))
        return digest_of({"kind": self.kind.value, **table})

    @cached_property
    def federation(self) -> str:
        """Of all that its rounds depend on; names their folder. Empty if it has no rounds."""
        return digest_of(json.loads(self.rounds.model_dump_json())) if self.kind.federated else ""

    @property
    def rounds(self) -> Scenario:
        """The scenario with the defaults for all that no round depends on."""
        kept = self.scenario.model_dump(mode="json", exclude=AFTER_THE_ROUNDS)
        if self.scenario.export.train_on_dequantized:
            kept["export"] = self.scenario.export.model_dump(mode="json")
        return Scenario.parse({**kept, "name": "federation"}, "a suite")

    @property
    def rounds_weight(self) -> float:
        """Training in the rounds, in epochs of a client."""
        return self._seen * self._round_epochs if self.kind.federated else 0.0

    @property
    def weight(self) -> float:
        """Work after the rounds, in epochs of a client."""
        clients = float(self._clients)
        fine = clients * self.scenario.personal.training_epochs
        trained = {
            Kind.LOCAL: clients * self._round_epochs + fine,
            Kind.PERSONAL: fine,
            Kind.CENTRAL: self._seen * self._round_epochs,
            Kind.CENTRAL_PERSONAL: self._seen * self._round_epochs + fine,
        }
        return trained.get(self.kind, 0.0) + CLIENT_SECONDS * clients

    @property
    def _round_epochs(self) -> int:
        return self.scenario.federation.training_rounds * self.scenario.federation.training.epochs

    @property
    def _clients(self) -> int:
        data = self.scenario.data
        return data.clients if data.given else self.scenario.population.households

    @property
    def _seen(self) -> float:
        data = self.scenario.data
        return (1 - (data.unseen if data.given else self.scenario.population.unseen)) * self._clients


@dataclass(frozen=True, slots=True)
class Suite:
    """The settings of a suite, and the scenario that they are about, without overrides."""

    settings: SuiteSettings
    scenario: Mapping[str, Any]
    folder: Path  # relative paths of data are taken from it

    def trial(self, name: str, seed: int, constants: Overrides, *, searched: bool = False) -> Trial:
        """A trial of an arm.

        Args:
            name: Of the arm.
            seed: Of population, training and network.
            constants: What the search chose, or a candidate of it.
            searched: Whether it is a part of the search.

        Raises:
            ConfigError: A key is unknown, a value is out of range, there are no texts, or a language model has no such
                arm.
        """
        arm, common = self.settings.arms[name], self.settings.search.set if searched else {}
        layers: tuple[Overrides, ...] = (self.settings.set, arm.set, common, constants, {"seed": seed})
        changes = [f"{key}={toml_value(value)}" for layer in layers for key, value in layer.items()]
        where = f"arm {name!r}"
        scenario = Scenario.parse(overridden(dict(self.scenario), changes), where).located(self.folder)
        scenario.data.require_texts()
        if scenario.data.for_language_model and arm.kind.of_embeddings:
            text = f"{where} fits a head to embeddings, and a language model has no head: leave the arm out with --arm"
            raise ConfigError(text, about="data.label")
        return Trial(arm.kind, scenario)

    def trials(self, name: str, constants: Overrides) -> Iterator[tuple[int, Trial]]:
        """The trials of an arm that are reported: seed and trial."""
        for seed in self.settings.seeds:
            yield seed, self.trial(name, seed, constants)

    def candidate(self, name: str, constants: Overrides) -> list[Trial]:
        """The trials of one candidate of a search, one for each of its seeds."""
        return [self.trial(name, seed, constants, searched=True) for seed in self.settings.search.seeds]

    def check(self) -> None:
        """Return if every trial can be made. Raises as ``trial``."""
        for name, arm in self.settings.arms.items():
            for constants in arm.candidates():
                self.candidate(name, constants)
                list(self.trials(name, constants))


@dataclass(frozen=True, slots=True)
class SearchOutcome:
    """What a search found.

    Attributes:
        constants: The best candidate.
        scores: Of each candidate, in order: the mean score on validation texts; None if a trial of it failed.
        cpu_seconds: Of all candidates together, as if each trained its rounds for itself.
    """

    constants: Overrides
    scores: tuple[tuple[Overrides, float | None], ...]
    cpu_seconds: float


Results = Callable[[Trial], Outcome | None]  # what is stored of a trial


def search(suite: Suite, name: str, results: Results) -> SearchOutcome | None:
    """The outcome of an arm's search; None as long as a trial of it is missing.

    The best candidate has the best mean score on the clients' validation texts, accuracy or bits per byte, over
    clients and then over seeds; among equals the least loss; among these it is the first.

    Raises:
        ConfigError: Every candidate failed, or no client has a validation text.
    """
    arm = suite.settings.arms[name]
    candidates = list(arm.candidates())
    if not arm.search:
        return SearchOutcome({}, (), 0.0)
    found = [[results(trial) for trial in suite.candidate(name, constants)] for constants in candidates]
    if any(outcome is None for row in found for outcome in row):
        return None
    scores = [_validation([o for o in row if isinstance(o, TrialResult)], len(row)) for row in found]
    if all(score is None for score in scores):
        failures = [outcome for row in found for outcome in row if isinstance(outcome, str)]
        raise ConfigError(f"every candidate of arm {name!r} failed, the first with: {failures[0]}", about=name)
    if any(score is not None and math.isnan(score[0]) for score in scores):
        raise ConfigError(
            f"arm {name!r} cannot be searched: no client has a validation text; set a validation share, or remove "
            "the search",
            about=name,
        )
    best = max((i for i, score in enumerate(scores) if score is not None), key=lambda i: (scores[i], -i))
    rows = zip(candidates, scores, strict=True)
    cpu = sum(o.cost.cpu_seconds for row in found for o in row if isinstance(o, TrialResult))
    return SearchOutcome(candidates[best], tuple((c, s and s[0]) for c, s in rows), cpu)


def _validation(results: Sequence[TrialResult], wanted: int) -> tuple[float, float] | None:
    """Score and negative loss on validation texts: means over seeds of means over clients that have some."""
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
    """A name for the content of a table, in ``DIGITS`` hexadecimal digits."""
    canonical = json.dumps(table, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:DIGITS]
