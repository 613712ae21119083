"""Groups of clients that have a federation and an adapter each: by language, or as a round of discovery found them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from aggregation.errors import DataError
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.formats.layout import Floats
from edgeadapt.rounds.discovery import Cells, found
from edgeadapt.rounds.ridge import unit_rows
from simulations.data.population import Client, Population
from simulations.engine import provision
from simulations.scenario import GroupSettings

COMMON = "common"  # group of clients whose own would be too small
GROUPS, DISCOVERY = "groups", "discovery"  # in the folder of a run; the second of the federation that finds groups
FOUND = "found.json"  # there: client → its group


@dataclass(frozen=True, slots=True)
class Group:
    name: str  # their language or found group, ``COMMON``, or empty for all clients of an undivided population
    folder: Path
    population: Population  # the clients, in the order of the whole population

    @property
    def devices(self) -> int:
        return len(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(client.name for client in self.population.clients if not client.unseen)


def grouped(population: Population, settings: GroupSettings) -> tuple[Group, ...]:
    """Divide a population. Guarantee: each client is in one group, and each group has a client that takes part.

    A language, or found group, with fewer than ``settings.smallest`` clients that take part has no group of its own.
    Such clients have a common one; while it has too few, the smallest of the others joins it. Where they are all
    unseen, they get the adapter of the largest group."""
    if settings.by == "none":
        return (Group("", Path(), population),)
    languages: dict[str, list[Client]] = {}
    for client in population.clients:
        languages.setdefault(client.found if settings.by == "discovered" else client.language, []).append(client)
    own = {name: members for name, members in languages.items() if _devices(members) >= settings.smallest}
    left = [client for name, members in languages.items() if name not in own for client in members]
    while own and 0 < _devices(left) < settings.smallest:
        left += own.pop(min(own, key=lambda name: (_devices(own[name]), name)))
    if left and not _devices(left):
        own[max(own, key=lambda name: (_devices(own[name]), name))] += left
        left = []
    groups = [*sorted(own.items()), *([(COMMON, left)] if left else [])]
    return tuple(
        Group(name, Path(GROUPS, str(number)), population.only({client.name for client in members}))
        for number, (name, members) in enumerate(groups, 1)
    )


def fleet_folders(out: Path, groups: Sequence[Group]) -> dict[str, Path]:
    return {client.name: out / group.folder for group in groups for client in group.population.clients}


def _devices(clients: Sequence[Client]) -> int:
    return sum(not client.unseen for client in clients)


@dataclass(frozen=True, slots=True)
class Router:
    """Tells found groups apart, the largest first: as the adapter that ``coordinator groups --out`` writes."""

    weight: Floats  # shape (groups, hidden)
    bias: Floats

    @classmethod
    def of(cls, run: Path, settings: GroupSettings) -> Self:
        """Make that of the groups which the federation in the folder of a run found. Raises DataError: its round was
        aborted; ConfigError as ``found``."""
        asked = CoordinatorStateDir.open(run / DISCOVERY / provision.COORDINATOR).settings.discovery
        if (latest := provision.registry(run / DISCOVERY).latest()) is None:
            reason = "the round that finds groups was aborted: lower network.forced_dropouts or network.message_loss"
            raise DataError(reason, about="groups.by")
        groups = found(latest.manifest.metrics, settings.most, settings.smallest)
        return cls(*Cells.decode(asked.cells, asked.count).router([group.center for group in groups]))

    def joined(self, embeddings: Floats) -> str:
        """Name the group that a client with these texts joins, shape ``(texts, hidden)``."""
        logits = unit_rows(embeddings) @ self.weight.T + self.bias
        return f"group-{logits.mean(axis=0).argmax() + 1}"


def spent_on_finding(run: Path) -> tuple[float, float]:
    """Return the epsilon of a device in the round that found the groups, and its delta."""
    spent = [one.epsilon for one in provision.registry(run / DISCOVERY).rounds() if one.epsilon is not None]
    return spent[-1], CoordinatorStateDir.open(run / DISCOVERY / provision.COORDINATOR).settings.privacy.delta


def with_found(run: Path, population: Population) -> Population:
    """Return the population whose clients have the groups that were found in the folder of a run, if any were."""
    if not (stored := run / DISCOVERY / FOUND).exists():
        return population
    own = json.loads(stored.read_bytes())
    return replace(population, clients=tuple(replace(each, found=own[each.name]) for each in population.clients))
