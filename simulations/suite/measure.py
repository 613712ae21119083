"""Compute a trial: make each client's adapter or head as its arm does, and tally what it does on the client's texts.

The rounds are those of a run (``simulations/engine``), without an export. The other arms need no fleet: they train from
version 0, which the population's public texts and the scenario's seed give.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from adapters import files, storage
from adapters.base import Base
from adapters.layout import Floats, Tensors
from adapters.lorasb import folded
from adapters.parts import Part
from adapters.task import MAX_LOSS
from client.node.statedir import DeviceStateDir
from client.training.engine import classifier_trainer, language_trainer
from client.training.examples import Example, Split, in_split
from client.training.personal import rehearsal
from client.training.trainer import ClassifierTrainer, FrozenBase, LocalTrainer
from simulations.data import populate
from simulations.data.population import Client, LabelledText, Population
from simulations.engine import provision
from simulations.engine.bases import device_base, training_base
from simulations.engine.groups import fleet_folders, grouped
from simulations.engine.heads import logistic_head, ridge_head, with_bias
from simulations.engine.language import LanguageArms
from simulations.engine.personal import (
    ArmInputs,
    after_the_rounds,
    generator,
    local_arm,
    personal_step,
)
from simulations.engine.progress import RunProgress
from simulations.engine.run import RunFolder, federate_groups, prepare, reported
from simulations.report.result import joined_rounds
from simulations.scenario import Scenario
from simulations.suite.aggregationerror import aggregation_error
from simulations.suite.outcome import ClientScore, Cost, RoundPoint, Tally, TrialResult
from simulations.suite.plan import Trial, digest_of
from simulations.suite.settings import Kind
from simulations.suite.store import BASES, FINISHED, Store

MOST_PUBLIC = 200  # public texts that each client's classifier is asked
MOST_KEPT = 100_000  # embeddings: 150 MB for MiniLM
CENTRAL, LAST_ROUND = "/central", "/last round"  # names of trainings, which order their examples

Parts = Sequence[Sequence[LabelledText]]
Answers = Callable[[Sequence[str]], Floats]  # texts → logits, shape (texts, labels)
Model = Callable[[Parts], list[Tally]]  # what a client has: parts of texts → a tally of each
Notify = Callable[[str], None]  # takes what is done at the moment, in a few words


def compute_rounds(trial: Trial, store: Store, notify: Notify) -> None:
    """Run the rounds of a trial in their folder, from where they were interrupted, and keep what they cost."""
    path, scenario = store.federation(trial), trial.rounds
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        started = (path / "scenario.json").exists()
        folder = RunFolder.resume(path, scenario) if started else RunFolder.start(path, scenario)
        population, base = _population(scenario), _base(store, scenario)
        before = _cpu()
        try:
            with RunProgress(quiet=True, notify=notify) as progress:
                groups = grouped(population, scenario.groups)
                for group in groups:
                    prepare(folder.of(group).path, scenario, group.population, base)
                federate_groups(folder, population, groups, base, progress)
        finally:  # an interrupted run has spent it as well
            folder.add("cpu", _cpu() - before)
        storage.replace(path / FINISHED, json.dumps({"cpu_seconds": folder.seconds["cpu"]}).encode())


def compute(trial: Trial, store: Store, notify: Notify) -> TrialResult:
    """Compute a trial, whose rounds are finished.

    Raises:
        EdgeAdaptError: A training diverged, or the scenario does not fit the base or the population.
    """
    scenario = trial.scenario
    population, base = _population(scenario), _base(store, scenario)
    manifest, blob = provision.first_adapter(scenario, population, base)
    inputs = ArmInputs.of(scenario, manifest, files.decode(blob), population)
    of_task: type[_Classifier | _Language] = _Language if scenario.data.for_language_model else _Classifier
    trained = _device_base(store, scenario, population, base)
    task, spent = of_task(trained, scenario, population, inputs), _Spent()
    if isinstance(task, _Classifier) and trial.kind.of_embeddings:
        models = _heads(trial, _embeddings(task.mine), population, spent)
    else:
        models = _models(trial, task, population, store, spent)
    scores, evaluated = [], _evaluated(trial, population)
    asked = _asked(population.public)
    for number, client in enumerate(evaluated, 1):
        notify(f"client {number} of {len(evaluated)}")
        with spent.training():
            model = models(client)
        scores.append(ClientScore(client.name, client.unseen, *model((client.validation, client.test, asked))))
    error = _error(trial, task.mine, population, store) if trial.kind is Kind.GLOBAL else None
    return replace(_result(trial, population, task, scores, store, spent), aggregation_error=error)


class _Classifier:
    """What a client makes of a classifier's adapter."""

    def __init__(self, base: FrozenBase, scenario: Scenario, population: Population, inputs: ArmInputs) -> None:
        self.inputs = inputs
        self.mine = classifier_trainer(base, len(population.labels), inputs.task.peft_config)

    def local(self, client: Client) -> Tensors:
        """The adapter that the client trains by itself."""
        return local_arm(self.mine, client.name, provision.examples_of(client), self.inputs).adapter

    def personal(self, client: Client, start: Tensors, arm: str = "") -> Tensors:
        """``start`` after the personal step; ``arm`` names this use of the step if it is not the personal arm."""
        examples = provision.examples_of(client)
        return personal_step(self.mine, client.name, examples, start, self.inputs, arm=arm).adapter

    def trained(self, client: Client) -> int:
        """The examples that the client's personal step trains on."""
        public = rehearsal(self.mine, provision.examples_of(client), self.inputs.public, self.inputs.personal.public)
        return len(client.train) + len(public.trained)

    def model(self, adapter: Tensors) -> Model:
        return partial(_answered, partial(self.mine.logits, adapter))


class _Language:
    """What a client makes of a language model's adapter; as ``_Classifier``."""

    def __init__(self, base: FrozenBase, scenario: Scenario, population: Population, inputs: ArmInputs) -> None:
        self.inputs, self.mine = inputs, language_trainer(base, inputs.task.peft_config)
        self._arms = LanguageArms(self.mine, scenario, inputs.task, inputs.seed_adapter)

    def local(self, client: Client) -> Tensors:
        return self._arms.local(client)

    def personal(self, client: Client, start: Tensors, arm: str = "") -> Tensors:
        return self._arms.personal(client, start, arm)[1]

    def trained(self, client: Client) -> int:
        return len(client.train)

    def model(self, adapter: Tensors) -> Model:
        return lambda parts: [_predicted(self.mine, adapter, part) for part in parts]


class _Spent:
    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def training(self) -> Iterator[None]:
        """Add the time of the block."""
        before = _cpu()
        yield
        self.seconds += _cpu() - before


def _models(
    trial: Trial, task: _Classifier | _Language, population: Population, store: Store, spent: _Spent
) -> Callable[[Client], Model]:
    """What makes a client's model, in the way of the trial's arm."""
    mine, inputs = task.mine, task.inputs
    folders = (
        fleet_folders(store.federation(trial), grouped(population, trial.scenario.groups)) if trial.federation else {}
    )

    def shared(client: Client) -> Tensors:
        return _global(folders[client.name])

    def federated(client: Client) -> Tensors:
        folder = provision.device_folder(folders[client.name], client.name)
        if not folder.exists():  # a device that no session asked has kept nothing
            return shared(client)
        return after_the_rounds(DeviceStateDir.open(folder), mine, inputs, shared(client))

    match trial.kind:
        case Kind.BASE:
            return lambda _: task.model(inputs.seed_adapter)
        case Kind.LOCAL:
            return lambda client: task.model(task.local(client))
        case Kind.GLOBAL:
            return lambda client: task.model(shared(client))
        case Kind.PERSONAL:
            return lambda client: task.model(task.personal(client, federated(client)))
        case _:
            with spent.training():
                pooled = _pooled(mine, population, inputs)
            if trial.kind is Kind.CENTRAL:
                return lambda _: task.model(pooled)
            return lambda client: task.model(task.personal(client, pooled, CENTRAL))


def _pooled(mine: LocalTrainer, population: Population, inputs: ArmInputs) -> Tensors:
    """Version 0, trained on the training texts of all clients that are not unseen, for the epochs of all rounds."""
    examples = [e for client in population.clients if not client.unseen for e in _train(client)]
    order = generator(inputs.seed, "", CENTRAL)
    return mine.train(inputs.seed_adapter, examples, inputs.task, epochs=inputs.federation_epochs, rng=order)


class _Embeddings:
    """Embeddings by the frozen base, each computed once for all candidates and arms."""

    def __init__(self, mine: ClassifierTrainer) -> None:
        self._mine = mine
        self._kept: dict[str, tuple[Floats, float]] = {}  # text → embedding, and the processor time that it took

    def of(self, texts: Sequence[str]) -> tuple[Floats, float]:
        """The embeddings, shape ``(len(texts), hidden)``, and the processor seconds that they took when computed."""
        if len(self._kept) > MOST_KEPT:
            self._kept.clear()
        if missing := [text for text in dict.fromkeys(texts) if text not in self._kept]:
            before = _cpu()
            found = self._mine.embed(missing)
            each = (_cpu() - before) / len(missing)
            self._kept.update((text, (row, each)) for text, row in zip(missing, found, strict=True))
        rows = [self._kept[text] for text in texts]
        return np.stack([row for row, _ in rows]), sum(seconds for _, seconds in rows)


@lru_cache(maxsize=1)
def _embeddings(mine: ClassifierTrainer) -> _Embeddings:
    return _Embeddings(mine)


def _heads(trial: Trial, kept: _Embeddings, population: Population, spent: _Spent) -> Callable[[Client], Model]:
    """What makes a client's linear head on frozen embeddings."""
    return lambda client: partial(_answered, _head(trial, kept, population, spent, client))


def _head(trial: Trial, embeddings: _Embeddings, population: Population, spent: "_Spent", client: Client) -> Answers:
    """A head that is fitted to the client's training texts and the public texts."""
    settings, train = trial.scenario.head, _train(client)
    texts = [*train, *provision.public_examples(population.public)]
    before = _cpu()
    found, took = embeddings.of([text.text for text in texts])
    spent.seconds += took - (_cpu() - before)  # as if nothing had been kept
    x = with_bias(found)
    labels = np.array([text.label for text in texts], np.int64)
    weights = np.where(np.arange(len(texts)) < len(train), settings.own_weight, 1.0)
    fit, penalty = (ridge_head, settings.ridge) if trial.kind is Kind.RIDGE else (logistic_head, settings.logistic)
    head = fit(x, labels, weights, len(population.labels), penalty)
    return lambda asked: (with_bias(embeddings.of(asked)[0]) @ head).astype(np.float32)


def _evaluated(trial: Trial, population: Population) -> Sequence[Client]:
    return population.sampled(trial.scenario.evaluation.clients, trial.scenario.seed).clients


def _asked(public: Sequence[LabelledText]) -> Sequence[LabelledText]:
    return public[:: max(1, -(-len(public) // MOST_PUBLIC))]


def _train(client: Client) -> Sequence[Example]:
    return in_split(provision.examples_of(client), Split.TRAIN)


def _answered(answers: Answers, parts: Parts) -> list[Tally]:
    """The tallies of a classifier, which is asked all texts at once."""
    texts = [text for part in parts for text in part]
    logits, labels = answers([text.text for text in texts]), np.array([text.label for text in texts], np.int64)
    ends = list(accumulate(map(len, parts)))
    return [
        _tally(logits[end - len(part) : end], labels[end - len(part) : end])
        for part, end in zip(parts, ends, strict=True)
    ]


def _predicted(mine: LocalTrainer, adapter: Tensors, part: Sequence[LabelledText]) -> Tally:
    found = mine.score(adapter, [Example(text.text, text.label, Split.TEST, text.prompt) for text in part])
    return Tally("", found.loss / found.count if found.count else 0.0, found.count)


def _tally(logits: Floats, labels: NDArray[np.int64]) -> Tally:
    if not len(labels):
        return Tally("", 0.0)
    losses = cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels), reduction="none").clamp(max=MAX_LOSS)
    right = logits.argmax(axis=1) == labels
    return Tally("".join("1" if one else "0" for one in right), float(losses.mean()))


def _result(
    trial: Trial,
    population: Population,
    task: _Classifier | _Language,
    scores: Sequence[ClientScore],
    store: Store,
    spent: _Spent,
) -> TrialResult:
    epochs, steps = _trained(trial, population, task)
    points: tuple[RoundPoint, ...] = ()
    down, up, cpu = 0.0, 0.0, spent.seconds
    if trial.kind.federated:
        folder = store.federation(trial)
        cpu += json.loads((folder / FINISHED).read_bytes())["cpu_seconds"]
        groups = grouped(population, trial.scenario.groups)
        records = [provision.registry(folder / group.folder).rounds() for group in groups]
        found = []
        for same in zip(*records, strict=True):
            one = joined_rounds([reported(record) for record in same])
            up, down = up + one.bytes_up, down + one.bytes_down
            found.append(RoundPoint(one.round, _value(one.metrics, trial.scenario), up + down))
        points = tuple(found)
    return TrialResult(tuple(scores), Cost(epochs, steps, cpu, up, down), points)


def _value(metrics: Mapping[str, float], scenario: Scenario) -> float | None:
    if not scenario.data.for_language_model:
        return metrics.get("accuracy")
    return metrics["loss"] / math.log(2) if "loss" in metrics else None


def _trained(trial: Trial, population: Population, task: _Classifier | _Language) -> tuple[int, int]:
    """Epochs of a client that is not unseen, and optimizer steps of all clients, dropouts not subtracted.

    After the rounds, only the clients that are evaluated train.
    """
    federation = trial.scenario.federation
    rounds, size = federation.training_rounds * federation.training.epochs, federation.training.batch_size
    fine = trial.scenario.personal.training_epochs
    seen = [len(client.train) for client in population.clients if not client.unseen]
    evaluated = _evaluated(trial, population)
    everyone = [len(client.train) for client in evaluated]
    read = [task.trained(client) for client in evaluated]

    def steps(counts: Sequence[int], epochs: int) -> int:
        return epochs * sum(-(-count // size) for count in counts)

    match trial.kind:
        case Kind.LOCAL:
            return rounds + fine, steps(everyone, rounds) + steps(read, fine)
        case Kind.GLOBAL:
            return rounds, steps(seen, rounds)
        case Kind.PERSONAL:
            return rounds + fine, steps(seen, rounds) + steps(read, fine)
        case Kind.CENTRAL:
            return rounds, steps([sum(seen)], rounds)
        case Kind.CENTRAL_PERSONAL:
            return rounds + fine, steps([sum(seen)], rounds) + steps(read, fine)
        case _:
            return 0, 0


def _error(trial: Trial, mine: LocalTrainer, population: Population, store: Store) -> float | None:
    """The aggregation error of the last round of training, which all its clients train once more, without dropouts.

    None where there is no such mean: no round trained LoRA's factors, they stay on the devices, or there are groups.
    """
    if trial.scenario.groups.by != "none":
        return None
    federation, registry = trial.scenario.federation, provision.registry(store.federation(trial))
    last = registry.latest() or registry.version(0)
    begin = min(last.manifest.version, federation.training_rounds) - 1
    if begin < 0:
        return None
    task, start = federation.task(registry.version(begin).manifest), registry.tensors(begin)
    if task.private & {Part.A, Part.B}:
        return None

    def trained() -> Iterator[tuple[Tensors, float]]:
        for client in population.clients:
            if not client.unseen:
                examples, order = _train(client), generator(trial.scenario.seed, client.name, LAST_ROUND)
                tensors = folded(mine.train(start, examples, task, epochs=task.epochs, rng=order))
                yield tensors, min(len(examples), federation.aggregation.weight_cap)

    found = aggregation_error(trained())
    return found if math.isfinite(found) else None


def _global(folder: Path) -> Tensors:
    registry = provision.registry(folder)
    last = registry.latest() or registry.version(0)
    return registry.tensors(last.manifest.version)


def _population(scenario: Scenario) -> Population:
    return _populated(scenario.model_dump_json(include={"seed", "population", "data"}))


@lru_cache(maxsize=2)
def _populated(tables: str) -> Population:
    """The population that these tables of a scenario, in JSON, describe; kept for the next trial."""
    scenario = Scenario.parse(json.loads(tables), "scenario")
    return populate(scenario.data, scenario.population, scenario.seed).population


def _base(store: Store, scenario: Scenario) -> Base:
    """The base of a trial; one that has to be made is shared by all trials that need the same."""
    if not scenario.base_is_made:
        return training_base(store.path, scenario, _population(scenario))
    needs = scenario.model_dump(mode="json", include={"seed", "population", "data", "base", "export"})
    folder = store.path / BASES / digest_of(needs)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        return training_base(folder, scenario, _population(scenario))


def _device_base(store: Store, scenario: Scenario, population: Population, base: Base) -> FrozenBase:
    """What the clients of a trial train on; a bundle is shared by all trials that need the same."""
    if scenario.base.engine == "torch":
        return base
    needs = scenario.model_dump(mode="json", include={"seed", "population", "data", "base", "export", "adapter"})
    folder = store.path / BASES / digest_of(needs)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        return device_base(folder, scenario, base, population)


def _cpu() -> float:
    """Processor seconds of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])
