"""After the last round: each client's four arms, trained where they need training, and scored on its test phrases.

A client's outcome is one file in its device's state directory, so a resumed run continues with the next client.
Clients train next to each other, each on one core, which keeps the cores busier than one small batch that is spread
over them, and makes the same adapters on any number of cores.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Self

import numpy as np
import torch

from adapters import files, storage
from adapters.bundle import VerifiedBase
from adapters.cores import ahead, cores
from adapters.layout import Tensors
from adapters.manifest import VersionManifest
from adapters.parts import PARTS
from adapters.task import Task
from aggregation.errors import DataError
from client.node import statedir as device_files
from client.node.privateparts import PrivateParts
from client.node.statedir import DeviceStateDir
from client.training import graphengine, torchengine
from client.training.examples import Example, Split, in_split, read_examples
from client.training.personal import (
    Candidate,
    Choice,
    Personalization,
    PersonalMethod,
    PersonalStep,
    personalize,
    rehearsal,
)
from client.training.private import subject_of, with_private
from client.training.trainer import ClassifierTrainer, FrozenBase, LocalTrainer
from simulations.data.population import Client, Population
from simulations.engine import provision
from simulations.engine.progress import RunProgress
from simulations.report.result import ClientResult
from simulations.scenario import PersonalSettings, Scenario

OUTCOME = "outcome.json"
MOST_AT_ONCE = 4  # clients; each holds a base in memory


class _Stopped(Exception):  # noqa: N818  # no error: the run has ended
    """Ends the training of a client whose outcome nobody waits for any more."""


@dataclass(frozen=True, slots=True)
class ArmInputs:
    """What the arms of every client are made from.

    Attributes:
        seed_adapter: The vendor's adapter, version 0.
        task: The federation's training settings, for all parts of the adapter.
        federation_epochs: Passes over its examples that a device makes in all rounds together.
        personal: The personal step.
        scale: Logit of a score of 1 of a head that is fitted by a regression.
        local_rates: The two learning rates of the local arm.
        public: Training examples that every device can have.
        seed: Of the scenario; it orders the examples.
    """

    seed_adapter: Tensors
    task: Task
    federation_epochs: int
    personal: PersonalSettings
    scale: float
    local_rates: tuple[float, float]
    public: Sequence[Example]
    seed: int

    @classmethod
    def of(cls, scenario: Scenario, manifest: VersionManifest, seed_adapter: Tensors, population: Population) -> Self:
        """The inputs that a scenario gives; the manifest is that of any version."""
        federation = scenario.federation
        return cls(
            seed_adapter=seed_adapter,
            task=replace(federation.task(manifest), trained=PARTS, proximal=0.0),
            federation_epochs=federation.training_rounds * federation.training.epochs,
            personal=scenario.personal,
            scale=federation.analytic.scale,
            local_rates=scenario.local_rates,
            public=provision.public_examples(provision.released_texts(population)),
            seed=scenario.seed,
        )


def personal_step(
    mine: ClassifierTrainer,
    client: str,
    examples: Sequence[Example],
    start: Tensors,
    inputs: ArmInputs,
    *,
    rate: float | None = None,
    arm: str = "",
    step: Callable[[], object] = lambda: None,
) -> Personalization:
    """A client's personal step from ``start``.

    Args:
        mine: Of the base.
        client: Its name, which orders the examples together with the seed and the arm.
        examples: The client's, of all parts.
        start: The global adapter, or what stands for it.
        inputs: Of the run.
        rate: The learning rate; by default that of the personal arm.
        arm: A name for this use of the step, if it is not the personal arm.
        step: As for ``Trainer.train``.
    """
    candidates = {Candidate.BASE: inputs.seed_adapter, Candidate.GLOBAL: start}
    own = inputs.personal
    fine = replace(inputs.task, learning_rate=rate or own.learning_rate, proximal=own.proximal if not arm else 0.0)
    method, choice = PersonalMethod(own.method), Choice(own.choice)
    how = PersonalStep(own.epochs, inputs.scale, method, own.share, choice, own.patience)
    order, public = generator(inputs.seed, client, arm), rehearsal(mine, examples, inputs.public, own.public)
    read = [*examples, *public.trained]
    return personalize(mine, candidates, read, fine, how, rng=order, plain=public.counted, step=step)


def after_the_rounds(
    state_dir: DeviceStateDir, mine: LocalTrainer, inputs: ArmInputs, global_adapter: Tensors
) -> Tensors:
    """The global adapter with the parts of it that the device has trained and not shared."""
    subject, parts = subject_of(mine.base.digest, inputs.task, mine.layout), state_dir.load(PrivateParts)
    return with_private(global_adapter, parts.start(subject) if parts else None, inputs.task)


def local_arm(
    mine: ClassifierTrainer,
    client: str,
    examples: Sequence[Example],
    inputs: ArmInputs,
    step: Callable[[], object] = lambda: None,
) -> Personalization:
    """What a client makes by itself. It gets all that the personal arm gets, except what other clients contribute.

    As many epochs, two learning rates, and the same choice on the validation part.
    """
    (first, second), train = inputs.local_rates, in_split(examples, Split.TRAIN)
    task, order = replace(inputs.task, learning_rate=first), generator(inputs.seed, client, "/local")
    start = mine.train(inputs.seed_adapter, train, task, epochs=inputs.federation_epochs, rng=order, step=step)
    return personal_step(mine, client, examples, start, inputs, rate=second, arm="/local/personal step", step=step)


def generator(seed: int, client: str, arm: str) -> np.random.Generator:
    """What orders the examples of one training: of a scenario's seed, a client and an arm."""
    name = int.from_bytes(hashlib.sha256(f"{client}{arm}".encode()).digest()[:8], "big")
    return np.random.default_rng([seed, name])


def personalize_all(
    out: Path,
    scenario: Scenario,
    population: Population,
    base: FrozenBase,
    progress: RunProgress,
    *,
    at_once: int | None = None,
) -> tuple[ClientResult, ...]:
    """The outcome of every client, computed or read from its device's state directory.

    Args:
        out: The folder of the run.
        scenario: Of the run.
        population: Of the run.
        base: What the devices train on.
        progress: Shows how many clients are done.
        at_once: Clients that train at the same time; by default one a core, ``MOST_AT_ONCE`` at most.
    """
    inputs, global_adapter = _inputs(out, scenario, population)
    config = inputs.task.peft_config
    state_dirs = provision.open_state_dirs(out, population)
    at_once = at_once or min(cores(), MOST_AT_ONCE)
    idle: SimpleQueue[ClassifierTrainer] = SimpleQueue()
    for _ in range(at_once):
        labels = len(population.labels)
        idle.put(
            graphengine.classifier(base, labels, config)
            if isinstance(base, VerifiedBase)
            else torchengine.classifier(base, labels, config)
        )
    stop, outcomes = Event(), []

    def outcome(client: Client) -> ClientResult:
        mine = idle.get()
        try:
            return _outcome(state_dirs[client.name], client, mine, inputs, global_adapter, partial(_check, stop))
        finally:
            idle.put(mine)

    with progress.stage("personal step", total=len(population.clients)) as advance, _one_thread():
        for _, wait in ahead(outcome, population.clients, at_once):
            try:
                outcomes.append(wait())
            except BaseException:
                stop.set()  # or Ctrl-C waits until the clients under way are trained
                raise
            advance()
    return tuple(outcomes)


def _check(stop: Event) -> None:
    if stop.is_set():
        raise _Stopped


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute on one thread for each thread that calls it, while the block runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _inputs(out: Path, scenario: Scenario, population: Population) -> tuple[ArmInputs, Tensors]:
    """The inputs of every client, and the global adapter: the last version of the registry."""
    registry = provision.registry(out)
    last = registry.latest()
    if last is None:
        raise DataError(f"the registry of {out} is empty", about="registry")
    inputs = ArmInputs.of(scenario, last.manifest, registry.tensors(0), population)
    return inputs, registry.tensors(last.manifest.version)


def _outcome(
    state_dir: DeviceStateDir,
    client: Client,
    mine: ClassifierTrainer,
    inputs: ArmInputs,
    global_adapter: Tensors,
    step: Callable[[], object],
) -> ClientResult:
    path = state_dir.folder / OUTCOME
    if path.exists():
        return ClientResult(**json.loads(path.read_bytes()))
    examples = read_examples(state_dir.examples, len(inputs.task.labels))
    test = in_split(examples, Split.TEST)
    start = after_the_rounds(state_dir, mine, inputs, global_adapter)
    personal = personal_step(mine, client.name, examples, start, inputs, step=step)
    storage.replace(state_dir.folder / device_files.PERSONAL, files.encode(personal.adapter))
    local = local_arm(mine, client.name, examples, inputs, step)
    arms = {
        "base": inputs.seed_adapter,
        "local": local.adapter,
        "global": global_adapter,
        "personal": personal.adapter,
    }
    outcome = ClientResult(
        client.name,
        client.language,
        client.unseen,
        len(in_split(examples, Split.TRAIN)),
        len(test),
        {arm: mine.score(adapter, test).accuracy for arm, adapter in arms.items()},
        personal.chosen.value,
    )
    storage.replace(path, json.dumps(asdict(outcome)).encode())
    return outcome
