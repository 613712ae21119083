"""After the last round: each client's four arms, trained where they need training, and scored on its test phrases.

A client's outcome is one file in its device's state directory, so a resumed run continues with the next client.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from adapters import files, storage
from adapters.base import Base
from adapters.layout import Tensors
from adapters.task import Task
from aggregation.errors import DataError
from client.node import statedir as device_files
from client.node.statedir import DeviceStateDir
from client.training.examples import Split, in_split, read_examples
from client.training.personal import Candidate, Personalization, personalize
from client.training.trainer import Trainer, load_trainer
from simulations.data.population import Client, Population
from simulations.engine import provision
from simulations.engine.progress import RunProgress
from simulations.report.result import ClientResult
from simulations.scenario import PersonalSettings, Scenario

OUTCOME = "outcome.json"


@dataclass(frozen=True, slots=True)
class ArmInputs:
    """What the arms of every client are made from.

    Attributes:
        seed_adapter: The vendor's adapter, version 0.
        global_adapter: The last version of the registry.
        task: The federation's training settings.
        federation_epochs: Passes over its examples that a device makes in all rounds together.
        personal: The personal step: its epochs and its learning rate.
        seed: Of the scenario; it orders the examples.
    """

    seed_adapter: Tensors
    global_adapter: Tensors
    task: Task
    federation_epochs: int
    personal: PersonalSettings
    seed: int


def personalize_all(
    out: Path, scenario: Scenario, population: Population, base: Base, progress: RunProgress
) -> tuple[ClientResult, ...]:
    """The outcome of every client, computed or read from its device's state directory."""
    inputs = _inputs(out, scenario)
    mine = load_trainer(base, len(population.labels), provision.lora(scenario))
    state_dirs = provision.open_state_dirs(out, population)
    outcomes = []
    with progress.stage("personal step", total=len(population.clients)) as advance:
        for client in population.clients:
            outcomes.append(_outcome(state_dirs[client.name], client, mine, inputs))
            advance()
    return tuple(outcomes)


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
        seed=scenario.seed,
    )


def _outcome(state_dir: DeviceStateDir, client: Client, mine: Trainer, inputs: ArmInputs) -> ClientResult:
    path = state_dir.folder / OUTCOME
    if path.exists():
        return ClientResult(**json.loads(path.read_bytes()))
    examples = read_examples(state_dir.examples, len(inputs.task.labels))
    train, test = in_split(examples, Split.TRAIN), in_split(examples, Split.TEST)
    fine = replace(inputs.task, learning_rate=inputs.personal.learning_rate)

    def generator(arm: str) -> np.random.Generator:
        name = int.from_bytes(hashlib.sha256(f"{client.name}{arm}".encode()).digest()[:8], "big")
        return np.random.default_rng([inputs.seed, name])

    def personal_step(start: Tensors, arm: str) -> Personalization:
        candidates = {Candidate.BASE: inputs.seed_adapter, Candidate.GLOBAL: start}
        return personalize(mine, candidates, examples, fine, epochs=inputs.personal.epochs, rng=generator(arm))

    personal = personal_step(inputs.global_adapter, "")
    storage.replace(state_dir.folder / device_files.PERSONAL, files.encode(personal.adapter))
    # The local arm gets all that the personal arm gets, except what other clients contribute: as many epochs, at
    # the same two learning rates, and the same choice on the validation part.
    epochs, order = inputs.federation_epochs, generator("/local")
    by_itself = mine.train(inputs.seed_adapter, train, inputs.task, epochs=epochs, rng=order)
    local = personal_step(by_itself, "/local/personal step")
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
