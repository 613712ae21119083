"""A fleet of a language model, in which each device has the texts of an author."""

import tomllib
from itertools import cycle
from pathlib import Path
from typing import Any

import tomli_w

from client.node.statedir import SETTINGS
from coordinator.transport import SERVER_NODE
from simulations.data.population import Client, LabelledText, Population
from simulations.engine import provision
from simulations.scenario import Scenario
from tests.conftest import TinyFleet

AUTHORS = {"device-00": "abab ab", "device-01": "aab aab", "device-02": "ab abb", "device-03": "abba ab"}


def texts(words: str, count: int) -> tuple[LabelledText, ...]:
    return tuple(LabelledText(f"{words} " * (2 + number % 3), -1, "g") for number in range(count))


def fleet_of_authors(out: Path, base: Any, adapter: dict[str, Any], devices: int = len(AUTHORS)) -> TinyFleet:
    """A device for each author, or more, and a coordinator whose first version is of this ``[adapter]``."""
    said = dict(zip((f"device-{number:02}" for number in range(devices)), cycle(AUTHORS.values())))
    clients = tuple(Client(name, "", False, texts(own, 6), texts(own, 2), ()) for name, own in said.items())
    population = Population((), (), clients)
    settings = {"name": "authors", "base": {"model": str(base.folder)}, "adapter": adapter}
    scenario = Scenario.parse(settings, "test")
    made = TinyFleet(out, scenario, population, base)
    provision.provision(made.out, scenario, population, base)
    provision.Enrolment.of(made.out, scenario, population, base).enrol(client.name for client in population.clients)
    made.configure({"rounds": 3, "training.learning_rate": 0.02, "training.epochs": 4})
    made.configure({"aggregation.keep_masked_inputs": True})
    folders = [str(provision.device_folder(made.out, name)) for name in said]
    made.nodes = dict(enumerate(folders, SERVER_NODE + 1))
    return made


def train_with_bundle(folder: Path, bundle: Path) -> None:
    """Let a device train with the training graph of a bundle, in place of its base in torch."""
    settings = folder / SETTINGS
    settings.write_text(tomli_w.dumps(tomllib.loads(settings.read_text()) | {"base": str(bundle)}))
