"""A population: the clients of a simulated federation with their texts, whatever source they come from."""

import dataclasses
import hashlib
import json
from collections.abc import Container
from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True, slots=True)
class LabelledText:
    """Holds one text of a client, with its label, or with the prompt that it answers. ``group``: texts that are
    variants of one another share it, and no group is on both sides of a split. The id of the sentence template of a
    household's phrase, such as ``en/HassTurnOn/3f2a9c01``."""

    text: str  # the text
    label: int  # index in ``Population.labels``; ``client.training.examples.NO_LABEL`` for a language model
    group: str
    prompt: str = ""  # what comes before the text, for a language model
    target: tuple[float, ...] = ()  # what a task of others made of the label; empty: ``label`` counts


@dataclass(frozen=True, slots=True)
class Client:
    name: str  # unique in the population
    language: str  # a code, empty if it is not known
    unseen: bool  # whether it takes no part in training the global adapter
    train: tuple[LabelledText, ...]  # what its device has so far
    validation: tuple[LabelledText, ...]
    test: tuple[LabelledText, ...]  # what comes later, of groups of which no client has a text in the other parts
    found: str = ""  # the group that a round of discovery found for it


@dataclass(frozen=True, slots=True)
class Population:
    labels: tuple[str, ...]  # the names of the head's rows, in order, as a task has them; none for a language model
    public: tuple[LabelledText, ...]  # a few texts for each label, or that a language model shall still write well
    clients: tuple[Client, ...]  # in the order of their numbers

    def sampled(self, count: int, seed: int) -> Self:
        """Choose ``count`` of the clients, two or more, at random and in their order; at most all. The share of unseen
        clients stays, rounded; of either kind that the population has, at least one is chosen."""
        kinds = [[i for i, client in enumerate(self.clients) if client.unseen is unseen] for unseen in (False, True)]
        seen, unseen = map(len, kinds)
        if count >= seen + unseen:
            return self
        few = min(max(round(count * unseen / (seen + unseen)), min(unseen, 1)), count - 1 if seen else count)
        rng = np.random.default_rng([seed, count])
        pairs = zip(kinds, (count - few, few), strict=True)
        chosen = sorted(int(i) for kind, number in pairs for i in rng.choice(kind, size=number, replace=False))
        return dataclasses.replace(self, clients=tuple(self.clients[i] for i in chosen))

    def only(self, names: Container[str]) -> Self:
        return dataclasses.replace(self, clients=tuple(client for client in self.clients if client.name in names))

    @property
    def digest(self) -> str:
        """Hash the content (SHA-256, hex): two populations are equal if and only if their digests are."""
        table = dataclasses.asdict(
            self, dict_factory=lambda row: {k: v for k, v in row if k not in ("target", "found") or v}
        )
        return hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
