"""Cohorts by language: the groups of a population of which each has an adapter, and a federation, of its own.

A federation is a coordinator's key, its registry and its log. A device pins the key of its own group's coordinator, so
it takes part in no other group, whatever a coordinator says; and its policy refuses a cohort that is too small. No
device is in two groups: from the sum over all devices and the sums of the large groups, the difference would be the sum
of a small one (docs/decisions/0043-cohorts-by-language.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simulations.data.population import Client, Population
from simulations.scenario import GroupSettings

COMMON = "common"  # of the clients whose own group would be too small
GROUPS = "groups"  # in the folder of a run


@dataclass(frozen=True, slots=True)
class Group:
    """Clients that share an adapter."""

    name: str  # their language, ``COMMON``, or empty for all clients of an undivided population
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

    A language with fewer than ``settings.smallest`` clients that take part has no group of its own. Such clients
    have a common one; while it has too few, the smallest of the others joins it. Where they are all unseen,
    they get the adapter of the largest group.
    """
    if settings.by == "none":
        return (Group("", Path(), population),)
    languages: dict[str, list[Client]] = {}
    for client in population.clients:
        languages.setdefault(client.language, []).append(client)
    own = {name: members for name, members in languages.items() if _devices(members) >= settings.smallest}
    left = [client for name, members in languages.items() if name not in own for client in members]
    while own and 0 < _devices(left) < settings.smallest:
        left += own.pop(min(own, key=lambda name: (_devices(own[name]), name)))
    if left and not _devices(left):
        own[max(own, key=lambda name: (_devices(own[name]), name))] += left
        left = []
    found = [*sorted(own.items()), *([(COMMON, left)] if left else [])]
    return tuple(
        Group(name, Path(GROUPS, str(number)), population.only({client.name for client in members}))
        for number, (name, members) in enumerate(found, 1)
    )


def describe(groups: Sequence[Group]) -> str:
    """The groups in one line: ``de 9 devices, en 8, common 5 (it, nl)``."""
    parts = []
    for group in groups:
        inside = ", ".join(sorted({client.language for client in group.population.clients}))
        parts.append(f"{group.name} {group.devices}{f' ({inside})' if group.name == COMMON else ''}")
    return f"devices of each federation: {'; '.join(parts)}"


def fleet_folders(out: Path, groups: Sequence[Group]) -> dict[str, Path]:
    """Client → the folder of its federation in the run in ``out``."""
    return {client.name: out / group.folder for group in groups for client in group.population.clients}


def _devices(clients: Sequence[Client]) -> int:
    return sum(not client.unseen for client in clients)
