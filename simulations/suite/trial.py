"""Compute a trial: make each client's adapter or head as its arm does, and tally what it does on the client's texts.

An arm says whom a client trains with, and what it keeps, of a classifier or a language model. A loss of a language
model is in bits per byte of text: a byte is the same in every language and for every tokenizer, and a model that
predicts nothing needs about eight."""

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import accumulate, zip_longest
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock
from typing import Self

import numpy as np
import torch
from cachetools import LRUCache, cached
from numpy.typing import NDArray

from client.node.privateparts import PrivateParts
from client.node.statedir import DeviceStateDir
from client.training.control import TrainingControl
from client.training.engine import open_trainer, trainer_of
from client.training.examples import Example, Split, in_split, with_variants
from client.training.logistic import logistic_head, with_constant
from client.training.personal import Candidate, Choice, PersonalStep, personalize, rehearsal
from client.training.private import subject_of, with_private
from client.training.trainer import ClassifierTrainer, FrozenBase, Trainer
from edgeadapt.bases.base import Base
from edgeadapt.bases.tasks import Numbers, find_task
from edgeadapt.formats import files
from edgeadapt.formats.cores import ahead
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.formats.manifest import RoundRecord, VersionManifest
from edgeadapt.methods.lorasb import folded
from edgeadapt.methods.parts import PARTS, Part
from edgeadapt.rounds.task import Task
from simulations.data.population import Client, LabelledText, Population
from simulations.engine import provision
from simulations.engine.canaries import audited
from simulations.engine.grid import GridLog
from simulations.engine.groups import Group, fleet_folders, grouped, spent_on_finding
from simulations.engine.progress import RunProgress
from simulations.engine.provision import Matrix, ridge_head
from simulations.plan import Kind, Trial
from simulations.result import (
    ACCURACY,
    ClientScore,
    Cost,
    ReportedRound,
    RoundPoint,
    RoundTally,
    Tally,
    TrialResult,
    joined_rounds,
)
from simulations.scenario import Scenario
from simulations.suite.store import Store

MOST_KEPT = 100_000  # embeddings: 150 MB for MiniLM
CENTRAL = "/central"  # name of the pooled training, which orders its examples
A, B = ".lora_A.", ".lora_B."

Parts = Sequence[Sequence[LabelledText]]
Model = Callable[[Parts], list[Tally]]  # what a client has: parts of texts → a tally of each
FitHead = Callable[..., Matrix]  # ``provision.ridge_head`` or ``logistic_head``
MOST_PUBLIC = 200  # public texts that each client's classifier is asked
GRID_LOG = "grid.json"  # in the folder of a federation
LAST_ROUND = "/last round"  # name of a training, which orders its examples
# Of a kind: what fits its head, and the key of its penalty.
HEADS: dict[Kind, tuple[FitHead, str]] = {Kind.RIDGE: (ridge_head, "ridge"), Kind.LOGISTIC: (logistic_head, "logistic")}


# Each arm of a run begins with it.
_first_adapter = cached(
    LRUCache(maxsize=2),
    key=lambda scenario, people, base: (scenario.model_dump_json(), people.labels, tuple(people.public), base),
    lock=Lock(),
)(provision.first_adapter)


@dataclass(frozen=True, slots=True)
class ArmInputs:
    scenario: Scenario
    population: Population
    task: Task  # the federation's training settings, for all parts of the adapter
    seed_adapter: Tensors  # the vendor's adapter, version 0
    released: Sequence[Example]  # training examples that every device can have

    @classmethod
    def of(cls, scenario: Scenario, manifest: VersionManifest, seed_adapter: Tensors, population: Population) -> Self:
        """The manifest is that of any version."""
        task = replace(scenario.federation.task(manifest), trained=PARTS, proximal=0.0)
        released = provision.public_examples(provision.released_texts(population))
        return cls(scenario, population, task, seed_adapter, released)


@dataclass(frozen=True, slots=True)
class Kept:
    """Holds the adapter that a client keeps, which candidate it is, and that one before its validation texts were
    fitted, if they were."""

    choice: str
    adapter: Tensors
    judged: Tensors


@dataclass
class Arms(ABC):
    """Has what the arms share. Each client at work at the same time needs its own."""

    mine: Trainer
    inputs: ArmInputs
    step: Callable[[], object] = field(default=lambda: None)

    def local(self, client: Client) -> Kept:
        """Make what the client makes alone: as many epochs as others, two learning rates, and the same choice."""
        first, second = self.inputs.scenario.local_rates
        task, epochs = replace(self.inputs.task, learning_rate=first), self.inputs.scenario.round_epochs
        alone = self.train(self.inputs.seed_adapter, training_examples(client), task, epochs, client.name, "/local")
        return self.personal(client, alone, "/local/personal step", second)

    def personal(self, client: Client, start: Tensors, arm: str = "", rate: float = 0.0) -> Kept:
        """Make the personal step from ``start``. ``arm``, ``rate``: for another use than in the personal arm."""
        own = self.inputs.scenario.personal
        proximal = 0.0 if arm else own.proximal
        rate = rate or own.learning_rate
        task = replace(self.inputs.task, learning_rate=rate, proximal=proximal, variants=own.variants)
        return self._personal(client, start, task, arm)

    def after_the_rounds(self, state_dir: DeviceStateDir, global_adapter: Tensors) -> Tensors:
        """Return the global adapter with the parts of it that the device has trained and not shared."""
        subject = subject_of(self.mine.base.digest, self.inputs.task, self.mine.layout)
        parts = state_dir.load(PrivateParts)
        return with_private(global_adapter, parts.start(subject) if parts else None, self.inputs.task)

    def pooled(self) -> Tensors:
        """Train version 0 on the texts of all clients that are not unseen, for the epochs of all rounds."""
        inputs, examples = self.inputs, _trained_on(self.inputs.population)
        return self.train(inputs.seed_adapter, examples, inputs.task, inputs.scenario.round_epochs, "", CENTRAL)

    def train(
        self, start: Tensors, examples: Sequence[Example], task: Task, epochs: int, client: str, arm: str
    ) -> Tensors:
        """Train in the order that seed, client and arm give; for no epoch, return the start itself."""
        if not epochs:
            return start
        order = generator(self.inputs.scenario.seed, client, arm)
        return self.mine.train(start, examples, task, epochs=epochs, rng=order, control=TrainingControl(step=self.step))

    @abstractmethod
    def _personal(self, client: Client, start: Tensors, task: Task, arm: str) -> Kept: ...

    @abstractmethod
    def rehearsed(self, client: Client) -> int:
        """Count the examples that the client's personal step trains on."""

    @abstractmethod
    def model(self, adapter: Tensors) -> Model:
        """Return what tallies texts with an adapter."""


@dataclass
class ClassifierArms(Arms):
    mine: ClassifierTrainer
    # Digest of the last adapter, and what it made of texts.
    _embedded: tuple[str, dict[str, Floats]] = field(default_factory=lambda: ("", {}))
    _router: Matrix = field(default_factory=lambda: np.zeros((0, 0)))  # once it is made

    def _personal(self, client: Client, start: Tensors, task: Task, arm: str) -> Kept:
        own, examples = self.inputs.scenario.personal, provision.examples_of(client)
        scale = self.inputs.scenario.federation.analytic.scale
        how = PersonalStep(own.epochs, scale, own.method, own.share, Choice(own.choice), own.patience)
        public = rehearsal(self.mine, examples, self.inputs.released, own.public)
        if (digest := files.sha256(files.encode(start))) != self._embedded[0]:
            self._embedded = digest, {}
        kept = personalize(
            self.mine,
            {Candidate.BASE: self.inputs.seed_adapter, Candidate.GLOBAL: start},
            [*examples, *public.trained],
            task,
            how,
            rng=generator(self.inputs.scenario.seed, client.name, arm),
            plain=public.counted,
            control=TrainingControl(step=self.step),
            rows=self._embedded[1],
        )
        return Kept(kept.chosen.value, kept.adapter, kept.judged)

    def rehearsed(self, client: Client) -> int:
        own = self.inputs.scenario.personal.public
        public = rehearsal(self.mine, provision.examples_of(client), self.inputs.released, own)
        return len(client.train) + len(public.trained)

    def model(self, adapter: Tensors) -> Model:
        return partial(self._answered, partial(self.mine.logits, adapter))

    def head(self, client: Client, fit: FitHead, penalty: float) -> tuple[Model, Model, float]:
        """Fit a linear head to the client's own and the public texts. Returns the model for its validation texts, the
        one that is fitted to these as well, and the processor seconds of its embeddings that other heads have spent
        already."""
        own = self._own(client)
        texts = [*own, *provision.public_examples(self.inputs.population.public)]
        weights = np.where(np.arange(len(texts)) < len(own), self.inputs.scenario.head.own_weight, 1.0)
        return self._fitted(texts, weights, partial(fit, penalty=penalty))

    def summed(self, client: Client) -> tuple[Model, Model, float]:
        """Fit what one sum over all clients gives to the client's own texts, and return it as ``head`` does."""
        own = self._own(client)
        weights = np.full(len(own), self.inputs.scenario.head.own_weight)
        return self._fitted(own, weights, partial(ridge_head, penalty=1.0, prior=self._shared_head))

    @cached_property
    def _shared_head(self) -> Matrix:
        texts = [*_trained_on(self.inputs.population), *provision.public_examples(self.inputs.population.public)]
        rows, _ = self._features([text.text for text in texts])
        labels, penalty = np.array([text.label for text in texts], np.int64), self.inputs.scenario.head.ridge
        return ridge_head(rows, labels, np.ones(len(texts)), len(self.inputs.task.labels), penalty)

    def routed(self, groups: Sequence[Group], adapters: Sequence[Tensors]) -> Model:
        """Return what answers each text by the adapter of the group that a router names: a head over the groups, which
        one sum over all clients gives."""
        router = self._router if len(self._router) else self._routing(groups)

        def answers(texts: Sequence[str]) -> Floats:
            named = (self._features(texts)[0] @ router).argmax(axis=1)
            logits = np.zeros((len(texts), len(self.inputs.task.labels)), np.float32)
            for number in np.unique(named).tolist():
                own = np.flatnonzero(named == number).tolist()
                logits[own] = self.mine.logits(adapters[number], [texts[place] for place in own])
            return logits

        return partial(self._answered, answers)

    def _routing(self, groups: Sequence[Group]) -> Matrix:
        seen = [(number, text.text) for number, group in enumerate(groups) for text in _trained_on(group.population)]
        rows, _ = self._features([text for _, text in seen])
        numbers, penalty = np.array([number for number, _ in seen], np.int64), self.inputs.scenario.head.ridge
        self._router = ridge_head(rows, numbers, np.ones(len(seen)), len(groups), penalty)
        return self._router

    def _own(self, client: Client) -> Sequence[Example]:
        own = [example for example in provision.examples_of(client) if example.split is not Split.TEST]
        return with_variants(own, self.inputs.scenario.personal.variants)

    def _fitted(self, texts: Sequence[Example], weights: Matrix, fit: FitHead) -> tuple[Model, Model, float]:
        before = time.thread_time()
        rows, seconds = self._features([text.text for text in texts])
        saved = seconds - (time.thread_time() - before)
        labels = np.array([text.label for text in texts], np.int64)
        held_out = np.array([text.split is Split.VALIDATION for text in texts])

        def fitted(some: NDArray[np.bool_]) -> Model:
            head = fit(rows[some], labels[some], weights=weights[some], count=len(self.inputs.task.labels))
            return partial(self._answered, lambda asked: (self._features(asked)[0] @ head).astype(np.float32))

        return fitted(~held_out), fitted(np.ones_like(held_out)), saved

    def _answered(self, answers: Callable[[Sequence[str]], Floats], parts: Parts) -> list[Tally]:
        """Return the tallies of a classifier, which is asked all texts at once. ``answers``: texts → outputs."""
        texts = [text for part in parts for text in part]
        scores, losses = self.mine.rated(answers([text.text for text in texts]), texts)
        ends = list(accumulate(map(len, parts)))
        slices = [slice(end - len(part), end) for part, end in zip(parts, ends, strict=True)]
        return [self._tally(scores[place], losses[place]) for place in slices]

    def _tally(self, scores: Numbers, losses: Numbers) -> Tally:
        loss = float(losses.mean()) if len(losses) else 0.0
        if self.inputs.scenario.data.own_task:
            return Tally("", loss, scores=tuple(map(float, scores)))
        return Tally("".join("1" if one else "0" for one in scores), loss)

    def _features(self, texts: Sequence[str]) -> tuple[Matrix, float]:
        """Return what ``head.features`` names, with a constant, and the seconds of it when it was computed."""
        kind, before = self.inputs.scenario.head.features, time.thread_time()
        ngrams = provision.hashed_ngrams(texts) if kind != "embedding" else np.zeros((len(texts), 0))
        spent = time.thread_time() - before
        if kind == "ngrams":
            return with_constant(ngrams), spent
        rows, seconds = _embeddings(self.mine).of(texts)
        return with_constant(np.concatenate([rows, ngrams], axis=1)), seconds + spent


class LanguageArms(Arms):
    def _personal(self, client: Client, start: Tensors, task: Task, arm: str) -> Kept:
        """Return the best on the client's validation texts, base and start included; among equals the last one."""
        epochs = self.inputs.scenario.personal.epochs
        tuned = self.train(start, training_examples(client), task, epochs, client.name, arm)
        candidates = {"base": self.inputs.seed_adapter, "global": start, "personal": tuned}
        held_out = in_split(provision.examples_of(client), Split.VALIDATION)
        best = min(reversed(candidates), key=lambda name: self.mine.score(candidates[name], held_out).loss)
        return Kept(best, candidates[best], candidates[best])

    def rehearsed(self, client: Client) -> int:
        return len(client.train)

    def model(self, adapter: Tensors) -> Model:
        return lambda parts: [self._predicted(adapter, part) for part in parts]

    def _predicted(self, adapter: Tensors, part: Sequence[LabelledText]) -> Tally:
        examples = [Example(text.text, text.label, Split.TEST, text.prompt) for text in part]
        score = self.mine.score(adapter, examples)
        return Tally("", score.loss / score.count if score.count else 0.0, score.count)


def arms_of(base: FrozenBase, inputs: ArmInputs, count: int, step: Callable[[], object]) -> list[Arms]:
    """Make the arms of ``count`` clients at the same time: of a classifier, or without labels of a language model."""
    labels, config = len(inputs.task.labels), inputs.task.peft_config
    of_task: type[Arms] = ClassifierArms if labels else LanguageArms
    trainers = (trainer_of(base, labels, config), *(open_trainer(base, labels, config) for _ in range(count - 1)))
    return [of_task(trainer, inputs, step) for trainer in trainers]


def generator(seed: int, client: str, arm: str) -> np.random.Generator:
    """Return what orders the examples of one training: of a scenario's seed, a client and an arm."""
    name = int.from_bytes(hashlib.sha256(f"{client}{arm}".encode()).digest()[:8], "big")
    return np.random.default_rng([seed, name])


def _trained_on(population: Population) -> list[Example]:
    return [example for client in population.clients if not client.unseen for example in training_examples(client)]


def training_examples(client: Client) -> Sequence[Example]:
    return in_split(provision.examples_of(client), Split.TRAIN)


class _Embeddings:
    """Embeds by the frozen base, each text once for all candidates and arms."""

    def __init__(self, mine: ClassifierTrainer) -> None:
        self._mine = mine
        self._kept: dict[str, tuple[Floats, float]] = {}  # text → embedding, and the processor time that it took

    def of(self, texts: Sequence[str]) -> tuple[Floats, float]:
        """Return embeddings, shape ``(len(texts), hidden)``, and the processor seconds that they took when computed."""
        if len(self._kept) > MOST_KEPT:
            self._kept.clear()
        if missing := [text for text in dict.fromkeys(texts) if text not in self._kept]:
            before = time.thread_time()
            embedded = self._mine.embed(missing)
            each = (time.thread_time() - before) / len(missing)
            self._kept.update((text, (row, each)) for text, row in zip(missing, embedded, strict=True))
        rows = [self._kept[text] for text in texts]
        return np.stack([row for row, _ in rows]), sum(seconds for _, seconds in rows)


_embeddings = lru_cache(maxsize=1)(_Embeddings)


def aggregation_error(trained: Iterable[tuple[Mapping[str, NDArray[np.float32]], float]]) -> float:
    """Return ‖mean(B A) - mean(B) mean(A)‖ / ‖mean(B A)‖ over the devices of a round, Frobenius norms over all layers.

    The error of averaging LoRA's factors, which a coordinator, which knows sums only, cannot measure. It is 0 where all
    devices have the same A or the same B (Sun et al. 2024, section 3.2); NaN if the mean update is zero. ``trained``
    has each device's adapter, under peft's names, and its weight in the mean; they are read one after the other."""
    total, means, products = 0.0, dict[str, Matrix](), dict[str, Matrix]()
    for tensors, weight in trained:
        total += weight
        for name, b in tensors.items():
            if B not in name:
                continue
            a = tensors[name.replace(B, A)]
            for sums, key, value in ((means, name, b), (means, name.replace(B, A), a), (products, name, b @ a)):
                sums[key] = sums.get(key, 0.0) + weight * value.astype(np.float64)
    pairs = [
        (product / total, (means[name] / total) @ (means[name.replace(B, A)] / total))
        for name, product in products.items()
    ]
    size = math.sqrt(sum(float(np.square(exact).sum()) for exact, _ in pairs))
    off = math.sqrt(sum(float(np.square(exact - mean).sum()) for exact, mean in pairs))
    return off / size if size else math.nan


class _Stopped(Exception):  # noqa: N818  # no error: the run has ended
    """Ends the training of a client whose outcome nobody waits for any more."""


@dataclass(frozen=True, slots=True)
class Material:
    population: Population
    base: Base  # which the rounds train on
    trained: FrozenBase  # what devices train with: the base, or that of a bundle
    federation: Path  # the folder of the rounds, which are finished if the arm has any
    rounds_cpu: float = 0.0  # processor seconds of the rounds


@dataclass
class TrialRun:
    """Computes a trial. ``keep`` takes the adapter of each client's personal step."""

    trial: Trial
    material: Material
    store: Store
    at_once: int = 1  # clients that train at the same time, each on one thread, with a base in memory
    thorough: bool = True  # ask also the validation texts and the public ones, and measure the aggregation error
    keep: Callable[[Client, Tensors], object] = lambda client, adapter: None
    _stop: Event = field(default_factory=Event)
    _shared: dict[Path, Tensors] = field(default_factory=dict)  # folder of a federation → its last adapter

    def compute(self, progress: RunProgress, stage: str) -> TrialResult:
        """Compute the clients that are left, and keep the result. Raises EdgeAdaptError if a training diverged."""
        scenario, population = self.trial.scenario, self.material.population
        manifest, blob = _first_adapter(scenario, population, self.material.base)
        inputs = ArmInputs.of(scenario, manifest, files.decode(blob), population)
        arms = arms_of(self.material.trained, inputs, self.at_once, self._check)
        idle: SimpleQueue[Arms] = SimpleQueue()
        for free in arms:
            idle.put(free)
        before = time.thread_time()
        pooled = arms[0].pooled() if self.trial.kind.pooled else {}
        spent, scores = time.thread_time() - before, list[ClientScore]()
        clients = population.sampled(scenario.evaluation.clients, scenario.seed).clients

        def scored(client: Client) -> tuple[ClientScore, float]:
            mine = idle.get()
            try:
                return self.store.part(self.trial, client.name) or self._score(mine, client, pooled)
            finally:
                idle.put(mine)

        with progress.stage(stage, total=len(clients)) as advance, one_thread():
            for _, wait in ahead(scored, clients, self.at_once):
                try:
                    score, seconds = wait()
                except BaseException:
                    self._stop.set()  # or Ctrl-C waits until the clients under way are trained
                    raise
                scores.append(score)
                spent += seconds
                advance()
        result = self._result(arms[0], clients, scores, spent)
        self.store.put(self.trial, result)
        return result

    def _check(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _score(self, mine: Arms, client: Client, pooled: Tensors) -> tuple[ClientScore, float]:
        before = time.thread_time()
        kept, saved = "", 0.0
        if self.trial.kind in HEADS and isinstance(mine, ClassifierArms):
            fit, penalty = HEADS[self.trial.kind]
            judged, model, saved = mine.head(client, fit, getattr(self.trial.scenario.head, penalty))
        elif self.trial.kind is Kind.SUMMED and isinstance(mine, ClassifierArms):
            judged, model, saved = mine.summed(client)
        elif self.trial.kind is Kind.ROUTED and isinstance(mine, ClassifierArms):
            judged = model = mine.routed(self._groups, self._adapters)
        else:
            own = self._adapter(mine, client, pooled)
            model, kept = mine.model(own.adapter), own.choice
            judged = model if own.judged is own.adapter else mine.model(own.judged)
            if self.trial.kind is Kind.PERSONAL:
                self.keep(client, own.adapter)
        seconds = time.thread_time() - before + saved
        validation, test, public = self._tallies(judged, model, client)
        score = ClientScore(client.name, client.unseen, validation, test, public, kept)
        self.store.put_part(self.trial, score, seconds)
        return score, seconds

    def _adapter(self, mine: Arms, client: Client, pooled: Tensors) -> Kept:
        match self.trial.kind:
            case Kind.LOCAL:
                return mine.local(client)
            case Kind.GLOBAL:
                return _unjudged(self._global(client))
            case Kind.PERSONAL:
                return mine.personal(client, self._after_the_rounds(mine, client))
            case Kind.CENTRAL:
                return _unjudged(pooled)
            case Kind.CENTRAL_PERSONAL:
                return mine.personal(client, pooled, CENTRAL)
            case _:
                return _unjudged(mine.inputs.seed_adapter)

    def _tallies(self, judged: Model, model: Model, client: Client) -> Sequence[Tally]:
        """Tally validation, test and public texts; ``judged`` has not learned the validation texts."""
        if not self.thorough:
            return model(((), client.test, ()))
        rest = client.test, asked(self.material.population.public)
        if judged is model:
            return model((client.validation, *rest))
        return [*judged((client.validation,)), *model(rest)]

    @cached_property
    def _groups(self) -> tuple[Group, ...]:
        return grouped(self.material.population, self.trial.scenario.groups)

    @cached_property
    def _fleets(self) -> dict[str, Path]:
        return fleet_folders(self.material.federation, self._groups)

    @cached_property
    def _adapters(self) -> list[Tensors]:
        return [self._global(group.population.clients[0]) for group in self._groups]

    def _global(self, client: Client) -> Tensors:
        folder = self._fleets[client.name]
        if folder not in self._shared:
            registry = provision.registry(folder)
            last = registry.latest() or registry.version(0)
            self._shared[folder] = registry.tensors(last.manifest.version)
        return self._shared[folder]

    def _after_the_rounds(self, mine: Arms, client: Client) -> Tensors:
        folder = provision.device_folder(self._fleets[client.name], client.name)
        if not folder.exists():  # a device that no session asked has kept nothing
            return self._global(client)
        return mine.after_the_rounds(DeviceStateDir.open(folder), self._global(client))

    def _result(
        self, mine: Arms, clients: Sequence[Client], scores: Sequence[ClientScore], seconds: float
    ) -> TrialResult:
        epochs, steps = self._trained(mine, clients)
        cost, points, epsilon, tally = Cost(epochs, steps, seconds), list[RoundPoint](), None, RoundTally()
        data = self.trial.scenario.data
        metric = find_task(data.task).metric if data.own_task else ""
        if self.trial.kind.federated:
            for round_ in rounds_of(self.material.federation, self._groups):
                up, down = cost.bytes_up + round_.bytes_up, cost.bytes_down + round_.bytes_down
                cost = replace(cost, bytes_up=up, bytes_down=down)
                points.append(RoundPoint(round_.round, self._value(round_), up + down))
                epsilon = round_.epsilon
            if epsilon is not None and self.trial.scenario.groups.by == "discovered":
                epsilon += spent_on_finding(self.material.federation)[0]
            cost = replace(cost, cpu_seconds=seconds + self.material.rounds_cpu)
            tally = tally_of(self.material.federation, self._groups, self.trial.scenario)
            tally = replace(tally, retries=self.store.retries(self.trial))
        result = TrialResult(tuple(scores), cost, tuple(points), None, epsilon, metric=metric, round_tally=tally)
        if self.trial.kind is not Kind.GLOBAL or not self.thorough:
            return result
        fleets = [self.material.federation / group.folder for group in self._groups]
        scenario = self.trial.scenario
        canaries = audited(fleets, scenario.federation.privacy.delta, scenario.evaluation.canaries)
        return replace(result, aggregation_error=self._error(mine), canaries=canaries)

    def _value(self, round_: ReportedRound) -> float | None:
        if not self.trial.scenario.data.for_language_model:
            return round_.metrics.get(ACCURACY.key)
        return round_.metrics["loss"] / math.log(2) if "loss" in round_.metrics else None

    def _trained(self, mine: Arms, clients: Sequence[Client]) -> tuple[int, int]:
        """Return the epochs of a client that is not unseen, and optimizer steps of all, dropouts not subtracted. After
        the rounds, only the ``clients`` that are evaluated train."""
        scenario = self.trial.scenario
        trainings = self.trial.kind.training(scenario.round_epochs, scenario.personal.training_epochs)
        seen = [len(client.train) for client in self.material.population.clients if not client.unseen]
        sizes: dict[str, Callable[[], list[int]]] = {
            "seen": lambda: seen,
            "pooled": lambda: [sum(seen)],
            "everyone": lambda: [len(client.train) for client in clients],
            "step": lambda: [mine.rehearsed(client) for client in clients],
        }
        batch = scenario.federation.training.batch_size
        steps = sum(epochs * sum(-(-size // batch) for size in sizes[who]()) for who, epochs in trainings if epochs)
        return sum(epochs for _, epochs in trainings), steps

    def _error(self, mine: Arms) -> float | None:
        """Return the aggregation error of the last round of training, which all its clients repeat, without dropouts.
        None where there is no such mean: no round trained LoRA's factors, they stay on the devices, there are
        groups."""
        if self.trial.scenario.groups.by != "none":
            return None
        federation, registry = self.trial.scenario.federation, provision.registry(self.material.federation)
        last = registry.latest() or registry.version(0)
        begin = min(last.manifest.version, federation.training_rounds) - 1
        if begin < 0:
            return None
        task, start = federation.task(registry.version(begin).manifest), registry.tensors(begin)
        if task.private & {Part.A, Part.B}:
            return None

        def trained() -> Iterator[tuple[Tensors, float]]:
            for client in self.material.population.clients:
                if not client.unseen:
                    examples = training_examples(client)
                    tensors = mine.train(start, examples, task, task.epochs, client.name, LAST_ROUND)
                    yield folded(tensors), min(len(examples), federation.aggregation.weight_cap)

        error = aggregation_error(trained())
        return error if math.isfinite(error) else None


def _unjudged(adapter: Tensors) -> Kept:
    return Kept("", adapter, adapter)


def asked(public: Sequence[LabelledText]) -> Sequence[LabelledText]:
    return public[:: max(1, -(-len(public) // MOST_PUBLIC))]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread for each thread that calls it, while the block runs. Cores are busier than with
    one small batch spread over them, and any number of cores makes the same adapters."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def rounds_of(out: Path, groups: Sequence[Group]) -> tuple[ReportedRound, ...]:
    """A federation that repeated some has more rounds than another one."""
    rows = []
    for folder in (out / group.folder for group in groups):
        log = GridLog.open(folder / GRID_LOG)
        rows.append([_reported(record, log) for record in provision.registry(folder).rounds()])
    return tuple(joined_rounds([each for each in same if each is not None]) for same in zip_longest(*rows))


def _reported(record: RoundRecord, log: GridLog) -> ReportedRound:
    devices = log.devices.get(record.round) or len({*record.survivors, *record.dropped}) or 1
    return ReportedRound(
        round=record.round,
        survivors=record.survivors,
        dropped=record.dropped,
        aborted=record.aborted,
        bytes_up=round(max(record.bytes_up, log.sent[record.round]) / devices),
        bytes_down=round(record.bytes_down / devices),
        seconds=record.seconds,
        metrics=record.metrics,
        version=record.version,
        epsilon=record.epsilon,
    )


def tally_of(out: Path, groups: Sequence[Group], scenario: Scenario) -> RoundTally:
    total = RoundTally()
    for group in groups:
        folder = out / group.folder
        records = provision.registry(folder).rounds()
        fitting = analytic_rounds(scenario, records)
        missing = unfitted_rounds(scenario, records)
        aborted = sum(record.aborted is not None for record in fitting)
        total = RoundTally(
            rounds=total.rounds + len(records),
            aborted=total.aborted + sum(record.aborted is not None for record in records),
            repeated=total.repeated + (0 if missing else aborted),
            unfitted=total.unfitted or 0 < scenario.federation.analytic.rounds == missing,
            resumed=tuple(sorted({*total.resumed, *GridLog.open(folder / GRID_LOG).resumed})),
        )
    return total


def analytic_rounds(scenario: Scenario, records: Sequence[RoundRecord]) -> list[RoundRecord]:
    """Pick the rounds of the analytic head, with those that repeat one after all that were planned."""
    federation = scenario.federation
    first, planned = federation.training_rounds, federation.rounds
    return [*records[first : first + federation.analytic.rounds], *records[planned:]]


def unfitted_rounds(scenario: Scenario, records: Sequence[RoundRecord]) -> int:
    """Count the rounds of the analytic head that are planned and have no sum."""
    fitted = sum(record.aborted is None for record in analytic_rounds(scenario, records))
    return scenario.federation.analytic.rounds - fitted
