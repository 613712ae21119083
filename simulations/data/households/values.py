"""What a population is once it has been sampled: plain values and the digest that names them."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One utterance.

    Attributes:
        text: What was said.
        label: Index of the intent in ``Population.labels``.
        template: The template that it came from, such as ``en/HassTurnOn/3f2a9c01``.
    """

    text: str
    label: int
    template: str


@dataclass(frozen=True, slots=True)
class Household:
    """One home with a device. ``unseen``: it never takes part in training the shared adapter.

    ``train`` and ``validation`` are what the household has said; ``test`` is what it will say: the same mix of
    intents, from templates that no utterance of any household's ``train`` or ``validation`` came from.
    """

    name: str
    language: str
    unseen: bool
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Population:
    """All households, and the public phrases that a vendor can ship on day one.

    Attributes:
        labels: The intents, in alphabetical order.
        public: A few phrases for each intent, from templates used nowhere else.
        households: In order of their numbers.
    """

    labels: tuple[str, ...]
    public: tuple[Example, ...]
    households: tuple[Household, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the whole content in hex: equal exactly where two populations are equal."""
        canonical = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def spoken(text: str) -> str:
    """What two texts share if they sound the same: letter case and white space do not count."""
    return " ".join(text.casefold().split())
