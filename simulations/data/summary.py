"""What a population is, in numbers: clients, sizes, labels, languages, tokens that the base does not know."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from client.inference.phrases import PhraseReader
from client.training.examples import NO_LABEL
from edgeadapt.bases.base import Base, OwnModel
from simulations.data.population import Client, LabelledText
from simulations.data.tables import DataFacts, Loaded

SHOWN_LABELS = 8
SHOWN_BROKEN = 20
MUCH_UNKNOWN = 0.1  # of the tokens


@dataclass(frozen=True, slots=True)
class ClientSummary:
    """Describes one client. ``unknown`` is the mean share, 0 to 1, of a text's tokens that the tokenizer lacks."""

    name: str
    language: str
    unseen: bool
    train: int
    validation: int
    test: int
    labels: int  # different ones
    unknown: float


@dataclass(frozen=True, slots=True)
class DataSummary:
    """Describes a population. ``facts`` is None for households, which no rows became."""

    clients: tuple[ClientSummary, ...]
    labels: dict[str, int]  # label → texts of all clients, most frequent first
    public: int
    facts: DataFacts | None

    @property
    def unknown(self) -> float:
        """Return the share of unknown tokens, as a mean over the clients."""
        return float(np.mean([client.unknown for client in self.clients]))

    @property
    def warns(self) -> bool:
        """Check whether there is a client whose texts the base cannot read."""
        return max(client.unknown for client in self.clients) > MUCH_UNKNOWN

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "unknown": self.unknown}


def summarize(loaded: Loaded, base: Base) -> DataSummary:
    """Count what is in a population; the base gives its tokenizer."""
    population = loaded.population
    reader = None if isinstance(base, OwnModel) else PhraseReader.of((base.folder / "tokenizer.json").read_bytes())
    counts = Counter(text.label for client in population.clients for text in _texts(client))
    return DataSummary(
        tuple(_client(client, reader) for client in population.clients),
        {population.labels[label]: count for label, count in counts.most_common() if label != NO_LABEL},
        len(population.public),
        loaded.facts,
    )


def lines(summary: DataSummary) -> Iterator[tuple[str, str]]:
    """Put the summary in words: pairs of a title and a line."""
    clients, facts = summary.clients, summary.facts
    unseen = sum(client.unseen for client in clients)
    left_out = f"; {facts.small} more have too few texts" if facts and facts.small else ""
    yield "clients", f"{len(clients)}, {unseen} of them unseen: no part in training{left_out}"
    sizes = [(name, [getattr(client, name) for client in clients]) for name in ("train", "validation", "test")]
    described = ", ".join(f"{name} {int(np.median(found))} ({min(found)}–{max(found)})" for name, found in sizes)
    yield "texts", f"of a client, median and range: {described}; {summary.public} public ones"
    total, shown = sum(summary.labels.values()), list(summary.labels.items())[:SHOWN_LABELS]
    some = ", ".join(f"{label} {100 * count / total:.0f} %" for label, count in shown)
    if summary.labels:
        yield "labels", f"{len(summary.labels)}: {some}{', …' if len(summary.labels) > SHOWN_LABELS else ''}"
    if languages := Counter(client.language for client in clients if client.language):
        yield "languages", ", ".join(f"{code} {count}" for code, count in sorted(languages.items()))
    yield "unknown", _unknown(summary)
    if facts:
        yield "rows", _rows(facts)
        for line in facts.broken[:SHOWN_BROKEN]:
            yield "broken", line


def _unknown(summary: DataSummary) -> str:
    worst = max(summary.clients, key=lambda client: client.unknown)
    text = f"{100 * summary.unknown:.1f} % of the tokens, at most {100 * worst.unknown:.1f} % ({worst.name})"
    if summary.warns:
        text += ": this base cannot read them; choose one for these languages (edgeadapt base list)"
    return text


def _rows(facts: DataFacts) -> str:
    parts = [f"{facts.rows} read, {facts.groups} groups of near-duplicates"]
    if facts.broken:
        parts.append(f"{len(facts.broken)} broken ones left out")
    if facts.overlapping:
        parts.append(f"{facts.overlapping} test texts left out, of which training has a near-duplicate")
    if facts.leaked:
        parts.append(f"{facts.leaked} test texts of your split have a near-duplicate in training")
    return "; ".join(parts)


def _texts(client: Client) -> Iterator[LabelledText]:
    yield from (*client.train, *client.validation, *client.test)


def _client(client: Client, reader: PhraseReader | None) -> ClientSummary:
    texts = list(_texts(client))
    return ClientSummary(
        client.name,
        client.language,
        client.unseen,
        len(client.train),
        len(client.validation),
        len(client.test),
        len({text.label for text in texts}),
        float(np.mean([reader.unknown_share(text.text) for text in texts])) if reader else 0.0,
    )
