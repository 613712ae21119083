"""After the last round: each client's four arms, trained where they need training, and scored on its test phrases.

A client's outcome is one file in its device's state directory, so a resumed run continues with the next client.
Clients train next to each other, each on one core, which keeps the cores busier than one small batch that is spread
over them, and makes the same adapters on any number of cores.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event

import numpy as np
import torch

from adapters import files, storage
from adapters.base import Base
from adapters.cores import ahead, cores
from adapters.layout import Tensors
from adapters.task import Task
from aggregation.errors import DataError
from client.node import statedir as device_files
from client.node.statedir import DeviceStateDir
from client.training.examples import Split, in_split, read_examples
from client.training.personal import Candidate, Personalization, personalize
from client.training.trainer import Trainer
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
        global_adapter: The last version of the registry.
        task: The federation's training settings.
        federation_epochs: Passes over its examples that a device makes in all rounds together.
        personal: The personal step: its epochs and its learning rate.
        local_rates: The two learning rates of the local arm.
        seed: Of the scenario; it orders the examples.
    """

    seed_adapter: Tensors
    global_adapter: Tensors
    task: Task
    federation_epochs: int
    personal: PersonalSettings
    local_rates: tuple[float, float]
    seed: int


def personalize_all(
    out: Path,
    scenario: Scenario,
    population: Population,
    base: Base,
    progress: RunProgress,
    *,
    at_once: int | None = None,
) -> tuple[ClientResult, ...]:
    """The outcome of every client, computed or read from its device's state directory.

    Args:
        out: The folder of the run.
        scenario: Of the run.
        population: Of the run.
        base: Of the run.
        progress: Shows how many clients are done.
        at_once: Clients that train at the same time; by default one a core, ``MOST_AT_ONCE`` at most.
    """
    inputs, state_dirs = _inputs(out, scenario), provision.open_state_dirs(out, population)
    at_once = at_once or min(cores(), MOST_AT_ONCE)
    idle: SimpleQueue[Trainer] = SimpleQueue()
    for _ in range(at_once):
        idle.put(Trainer(base, len(population.labels), provision.lora(scenario)))
    stop, outcomes = Event(), []

    def outcome(client: Client) -> ClientResult:
        mine = idle.get()
        try:
            return _outcome(state_dirs[client.name], client, mine, inputs, partial(_check, stop))
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


def _inputs(out: Path, scenario: Scenario) -> ArmInputs:
    registry = provision.registry(out)
    last = registry.latest()
    if last is None:
        raise DataError(f"the registry of {out} is empty", about="registry")
    federation = scenario.federation
    return ArmInputs(
        seed_adapter=registry.tensors(0),
        global_adapter=registry.tensors(last.manifest.version),
        task=federation.training.task(last.manifest),
        federation_epochs=federation.rounds * federation.training.epochs,
        personal=scenario.personal,
        local_rates=scenario.local_rates,
        seed=scenario.seed,
    )


def _outcome(
    state_dir: DeviceStateDir, client: Client, mine: Trainer, inputs: ArmInputs, step: Callable[[], object]
) -> ClientResult:
    path = state_dir.folder / OUTCOME
    if path.exists():
        return ClientResult(**json.loads(path.read_bytes()))
    examples = read_examples(state_dir.examples, len(inputs.task.labels))
    train, test = in_split(examples, Split.TRAIN), in_split(examples, Split.TEST)
    first, second = inputs.local_rates

    def at(rate: float) -> Task:
        return replace(inputs.task, learning_rate=rate)

    def generator(arm: str) -> np.random.Generator:
        name = int.from_bytes(hashlib.sha256(f"{client.name}{arm}".encode()).digest()[:8], "big")
        return np.random.default_rng([inputs.seed, name])

    def personal_step(start: Tensors, rate: float, arm: str) -> Personalization:
        candidates, fine = {Candidate.BASE: inputs.seed_adapter, Candidate.GLOBAL: start}, at(rate)
        epochs = inputs.personal.epochs
        return personalize(mine, candidates, examples, fine, epochs=epochs, rng=generator(arm), step=step)

    personal = personal_step(inputs.global_adapter, inputs.personal.learning_rate, "")
    storage.replace(state_dir.folder / device_files.PERSONAL, files.encode(personal.adapter))
    # The local arm gets all that the personal arm gets, except what other clients contribute: as many epochs, two
    # learning rates, and the same choice on the validation part.
    epochs, order = inputs.federation_epochs, generator("/local")
    by_itself = mine.train(inputs.seed_adapter, train, at(first), epochs=epochs, rng=order, step=step)
    local = personal_step(by_itself, second, "/local/personal step")
    arms = {
        "base": inputs.seed_adapter,
        "local": local.adapter,
        "global": inputs.global_adapter,
        "personal": personal.adapter,
    }
    outcome = ClientResult(
        client.name,
        client.language,
        client.unseen,
        len(train),
        len(test),
        {arm: mine.score(adapter, test).accuracy for arm, adapter in arms.items()},
        personal.chosen.value,
    )
    storage.replace(path, json.dumps(asdict(outcome)).encode())
    return outcome
