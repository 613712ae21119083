"""A population: the clients of a simulated federation with their texts, whatever source they come from."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True, slots=True)
class LabelledText:
    """One text of a client, with its label, or with the prompt that it answers.

    Attributes:
        text: The text.
        label: Index in ``Population.labels``; ``client.training.examples.NO_LABEL`` for a language model.
        group: Texts that are variants of one another share it, and no group is on both sides of a split. The id of the
            sentence template of a household's phrase, such as ``en/HassTurnOn/3f2a9c01``.
        prompt: What comes before the text, for a language model.
    """

    text: str
    label: int
    group: str
    prompt: str = ""


@dataclass(frozen=True, slots=True)
class Client:
    """One client of the federation: a person or a home with a device.

    Attributes:
        name: Unique in the population.
        language: A code, empty if it is not known.
        unseen: Whether it takes no part in training the global adapter.
        train, validation: What its device has so far.
        test: What comes later: from groups of which no client has a text in ``train`` or ``validation``.
    """

    name: str
    language: str
    unseen: bool
    train: tuple[LabelledText, ...]
    validation: tuple[LabelledText, ...]
    test: tuple[LabelledText, ...]


@dataclass(frozen=True, slots=True)
class Population:
    """All clients, and the public texts that a vendor can ship on day one.

    Attributes:
        labels: The names of the labels, in the order of the head's rows; none for a language model.
        public: A few texts for each label, or that a language model shall still write well.
        clients: In the order of their numbers.
    """

    labels: tuple[str, ...]
    public: tuple[LabelledText, ...]
    clients: tuple[Client, ...]

    def sampled(self, count: int, seed: int) -> Self:
        """The population with ``count`` of its clients, chosen at random and in their order; all, if it has no more.

        The share of unseen clients stays, rounded; of either kind that the population has, at least one is chosen.

        Args:
            count: Two or more.
            seed: Determines the choice, together with the population's numbers of clients.
        """
        kinds = [[i for i, client in enumerate(self.clients) if client.unseen is unseen] for unseen in (False, True)]
        seen, unseen = map(len, kinds)
        if count >= seen + unseen:
            return self
        few = min(max(round(count * unseen / (seen + unseen)), min(unseen, 1)), count - 1 if seen else count)
        rng = np.random.default_rng([seed, count])
        pairs = zip(kinds, (count - few, few), strict=True)
        chosen = sorted(int(i) for kind, number in pairs for i in rng.choice(kind, size=number, replace=False))
        return dataclasses.replace(self, clients=tuple(self.clients[i] for i in chosen))

    @property
    def digest(self) -> str:
        """SHA-256 of the content, in hexadecimal: two populations are equal if and only if their digests are."""
        canonical = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()
