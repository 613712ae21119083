"""After the last round: each household's private adapter, what it is compared with, and its score on its test phrases.

A household's outcome is one file in its device's home, so a resumed run goes on with the next household.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from adapters import files, storage
from adapters.base import Base
from adapters.layout import Tensors
from adapters.task import Task
from aggregation.errors import DataError
from client.node import statedir as device_home
from client.node.statedir import DeviceStateDir
from client.training.examples import Split, part, read_examples
from client.training.personal import Choice, personalize
from client.training.trainer import Trainer, trainer
from simulations.data.households import Household, Population
from simulations.engine import provision
from simulations.engine.progress import Progress
from simulations.report.result import HouseholdResult
from simulations.scenario import Scenario

OUTCOME = "outcome.json"


@dataclass(frozen=True, slots=True)
class Start:
    """What every household starts from: the vendor's adapter, the last shared one, and how to train."""

    seed: Tensors
    shared: Tensors
    task: Task
    rounds: int
    personal_epochs: int
    personal_rate: float


def personalize_all(
    out: Path, scenario: Scenario, population: Population, base: Base, progress: Progress
) -> tuple[HouseholdResult, ...]:
    """The outcome of every household, made or found in its home."""
    start = _start(out, scenario)
    mine = trainer(base, len(population.labels), provision.lora(scenario))
    state_dirs = provision.open_state_dirs(out, population)
    outcomes = []
    with progress.stage("personal step", total=len(population.households)) as advance:
        for household in population.households:
            outcomes.append(_outcome(state_dirs[household.name], household, mine, start))
            advance()
    return tuple(outcomes)


def _start(out: Path, scenario: Scenario) -> Start:
    registry = provision.registry(out)
    last = registry.latest()
    if last is None:
        raise DataError(f"the registry of {out} is empty")
    return Start(
        registry.tensors(0),
        registry.tensors(last.manifest.version),
        scenario.federation.training.task(last.manifest, scenario.seed),
        scenario.federation.rounds,
        scenario.personal.epochs,
        scenario.personal.learning_rate,
    )


def _outcome(state_dir: DeviceStateDir, household: Household, mine: Trainer, start: Start) -> HouseholdResult:
    path = state_dir.folder / OUTCOME
    if path.exists():
        return HouseholdResult(**json.loads(path.read_bytes()))
    examples = read_examples(state_dir.examples, len(start.task.labels))
    train, test = part(examples, Split.TRAIN), part(examples, Split.TEST)
    fine = replace(start.task, learning_rate=start.personal_rate)
    personal = personalize(
        mine,
        {Choice.BASE: start.seed, Choice.GLOBAL: start.shared},
        examples,
        fine,
        epochs=start.personal_epochs,
        salt=household.name,
    )
    storage.replace(state_dir.folder / device_home.PERSONAL, files.encode(personal.adapter))
    # Alone with the same compute: as many passes over the same examples as this household's device makes in all.
    passes = start.rounds * start.task.epochs + start.personal_epochs
    local = mine.train(start.seed, train, start.task, epochs=passes, salt=f"{household.name}/local")
    arms = {"base": start.seed, "local": local, "global": start.shared, "personal": personal.adapter}
    outcome = HouseholdResult(
        household.name,
        household.language,
        household.unseen,
        len(train),
        len(test),
        {arm: mine.score(adapter, test).accuracy for arm, adapter in arms.items()},
        personal.choice.value,
    )
    storage.replace(path, json.dumps(asdict(outcome)).encode())
    return outcome
