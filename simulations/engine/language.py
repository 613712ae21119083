"""One run of a scenario of a language model: the rounds, and what each client's arms make of its test texts.

The rounds are those of a classifier's run. A loss is in bits per byte of text: a byte is the same in every
language and for every tokenizer, and a model that predicts nothing needs about eight.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from adapters import files, storage
from adapters.base import Base, find_base
from adapters.layout import Tensors
from adapters.parts import PARTS
from adapters.task import Task
from client.node import statedir as device_files
from client.node.privateparts import PrivateParts
from client.training.engine import language_trainer
from client.training.examples import Example, Split, in_split
from client.training.private import subject_of, with_private
from client.training.trainer import LocalTrainer
from simulations.data.population import Client, Population
from simulations.engine import provision
from simulations.engine.bases import device_base
from simulations.engine.groups import grouped
from simulations.engine.personal import generator
from simulations.engine.progress import RunProgress
from simulations.engine.run import (
    HERE,
    RESULT,
    Engine,
    RunFolder,
    canary_bounds,
    evaluated_of,
    federate_groups,
    logged,
    prepare,
)
from simulations.report.authors import AuthorResult, LanguageResult
from simulations.scenario import Scenario

OUTCOME = "outcome.json"  # in a device's state directory


@dataclass(frozen=True, slots=True)
class LanguageArms:
    """What the arms of every client are made from.

    Attributes:
        trainer: Of the base.
        scenario: Of the run.
        task: The federation's training settings, for all parts of the adapter.
        seed_adapter: The vendor's adapter, version 0.
    """

    trainer: LocalTrainer
    scenario: Scenario
    task: Task
    seed_adapter: Tensors

    def local(self, client: Client) -> Tensors:
        """What a client makes by itself: the best on its validation texts, the base and the first part included."""
        epochs = self.scenario.federation.rounds * self.scenario.federation.training.epochs
        first, second = self.scenario.local_rates
        alone = self._trained(client, self.seed_adapter, first, epochs, "/local")
        tuned = self._trained(client, alone, second, self.scenario.personal.epochs, "/local/personal step")
        return self._best({"base": self.seed_adapter, "first": alone, "second": tuned}, client)[1]

    def personal(self, client: Client, start: Tensors, arm: str = "") -> tuple[str, Tensors]:
        """The personal step from ``start``: the name of what a client keeps, and its adapter.

        Args:
            client: With its texts.
            start: The global adapter, or what stands for it.
            arm: A name for this use of the step, if it is not the personal arm.
        """
        own = self.scenario.personal
        tuned = self._trained(client, start, own.learning_rate, own.epochs, arm, 0.0 if arm else own.proximal)
        return self._best({"base": self.seed_adapter, "global": start, "personal": tuned}, client)

    def _trained(
        self, client: Client, start: Tensors, rate: float, epochs: int, arm: str, proximal: float = 0.0
    ) -> Tensors:
        if not epochs:
            return start
        task = replace(self.task, learning_rate=rate, proximal=proximal)
        train, order = _part(client, Split.TRAIN), generator(self.scenario.seed, client.name, arm)
        return self.trainer.train(start, train, task, epochs=epochs, rng=order)

    def _best(self, candidates: dict[str, Tensors], client: Client) -> tuple[str, Tensors]:
        """The candidate with the least loss on the client's validation texts, among equals the last one."""
        held_out = _part(client, Split.VALIDATION)

        def loss(name: str) -> float:
            return self.trainer.score(candidates[name], held_out).loss

        best = min(reversed(candidates), key=loss)
        return best, candidates[best]


def _part(client: Client, split: Split) -> tuple[Example, ...]:
    return in_split(provision.examples_of(client), split)


def run_language_model(
    folder: RunFolder, population: Population, progress: RunProgress, engine: Engine = HERE
) -> LanguageResult:
    """Run the stages that are not finished, and return the result.

    Args:
        folder: Of the run.
        population: The scenario's, without labels.
        progress: Shows the stages.
        engine: Of the rounds.

    Raises:
        EdgeAdaptError: A stage failed; the outcomes of the stages before it stay in the folder.
    """
    scenario = folder.scenario
    with logged(folder.path), folder.timed("total"):
        with folder.timed("prepare"), progress.stage("prepare"):
            base = find_base(scenario.base.model)
            prepare(folder.path, scenario, population, base)
        groups = grouped(population, scenario.groups)
        federate_groups(folder, population, groups, base, progress, engine)
        with folder.timed("personal"):
            clients = _personal_steps(folder, population, base, progress)
        canaries = canary_bounds(folder, groups)
    registry, privacy = provision.registry(folder.path), scenario.federation.privacy
    rounds = registry.rounds()
    last = (registry.latest() or registry.version(0)).manifest
    result = LanguageResult(
        scenario=scenario.name,
        seed=scenario.seed,
        population=len(population.clients),
        clients=clients,
        rounds=len(rounds),
        epsilon=rounds[-1].epsilon if rounds else None,
        delta=privacy.delta if privacy.noisy else None,
        adapter={"version": last.version, "sha256": last.sha256, "bytes": last.size},
        base={"digest": base.digest, "bytes": base.weight_bytes},
        seconds=dict(folder.seconds),
        canaries=canaries,
    )
    storage.replace(folder.path / RESULT, json.dumps(result.to_json(), indent=2).encode())
    return result


def _personal_steps(
    folder: RunFolder, population: Population, base: Base, progress: RunProgress
) -> tuple[AuthorResult, ...]:
    scenario, registry = folder.scenario, provision.registry(folder.path)
    population = evaluated_of(
        folder.path, scenario, population, base, population.sampled(scenario.evaluation.clients, scenario.seed)
    )
    last = (registry.latest() or registry.version(0)).manifest
    task = replace(scenario.federation.task(last), trained=PARTS, proximal=0.0)
    trainer = language_trainer(device_base(folder.path, scenario, base, population), last.peft_config)
    arms, shared = LanguageArms(trainer, scenario, task, registry.tensors(0)), registry.tensors(last.version)
    state_dirs, found = provision.open_state_dirs(folder.path, population), []
    with progress.stage("personal step", total=len(population.clients)) as advance:
        for client in population.clients:
            path = state_dirs[client.name].folder / OUTCOME
            if path.exists():
                found.append(AuthorResult(**json.loads(path.read_bytes())))
            else:
                parts = state_dirs[client.name].load(PrivateParts)
                own = parts.start(subject_of(base.digest, task, trainer.layout)) if parts else None
                outcome, kept = _outcome(arms, client, shared, own)
                storage.replace(path.parent / device_files.PERSONAL, files.encode(kept))
                storage.replace(path, json.dumps(asdict(outcome)).encode())
                found.append(outcome)
            advance()
    return tuple(found)


def _outcome(arms: LanguageArms, client: Client, shared: Tensors, own: bytes | None) -> tuple[AuthorResult, Tensors]:
    """A client's result, and the adapter that it keeps. ``own``: its private parts, if it has some."""
    test = _part(client, Split.TEST)
    choice, kept = arms.personal(client, with_private(shared, own, arms.task))
    adapters = {"base": arms.seed_adapter, "local": arms.local(client), "global": shared, "personal": kept}
    loss = {arm: bits(arms.trainer, adapter, test) for arm, adapter in adapters.items()}
    return AuthorResult(client.name, client.unseen, len(client.train), len(test), loss, choice), kept


def bits(trainer: LocalTrainer, adapter: Tensors, examples: Sequence[Example]) -> float:
    """The mean loss of some texts, in bits per byte; NaN without texts."""
    score = trainer.score(adapter, examples)
    return score.loss / score.count / math.log(2) if score.count else math.nan
