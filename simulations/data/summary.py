"""What a population is, in numbers: clients, sizes, labels, languages, words that the base does not know."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from client.inference.phrases import PhraseReader
from client.training.examples import NO_LABEL
from edgeadapt.bases.base import Base, OwnModel
from edgeadapt.bases.markedwords import unmarked
from edgeadapt.bases.readers import media_of
from simulations.data.population import Client, LabelledText
from simulations.data.tables import DataFacts, Loaded

SHOWN_LABELS = 8
READ = 200  # characters at the begin of a text, which no base truncates
SHOWN_BROKEN = 20
SHOWN_DOUBTS = 3
MUCH_UNKNOWN = 0.1  # of the tokens
# A base spells words of other languages out. Letters a token of a household's phrases, in Latin script and in others:
# in a language of the base 2.8 to 4.0 and 1.5 to 3.6, in another 1.9 to 2.8 and 0.7 to 1.4 (22 languages, two bases).
LATIN = re.compile(r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+")
SPELLED = {True: 2.75, False: 1.45}


@dataclass(frozen=True, slots=True)
class ClientSummary:
    """``unknown``: the mean share, 0 to 1, of a text's tokens that the tokenizer lacks; ``letters``: those a token."""

    name: str
    language: str
    unseen: bool
    train: int
    validation: int
    test: int
    labels: int  # different ones
    unknown: float
    letters: float
    spelled: bool  # the base spells the words out: it was made for other languages


@dataclass(frozen=True, slots=True)
class DataSummary:
    """Describes a population. ``facts`` is None for households, which no rows became."""

    clients: tuple[ClientSummary, ...]
    labels: dict[str, int]  # label → texts of all clients, most frequent first
    public: int
    facts: DataFacts | None

    @property
    def unknown(self) -> float:
        return float(np.mean([client.unknown for client in self.clients]))

    @property
    def warns(self) -> bool:
        return any(client.spelled or client.unknown > MUCH_UNKNOWN for client in self.clients)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "unknown": self.unknown}


def summarize(loaded: Loaded, base: Base) -> DataSummary:
    """Count what is in a population; the base gives its tokenizer."""
    population = loaded.population
    reader = None if isinstance(base, OwnModel) or media_of(base.folder) else _reader(base)
    counts = Counter(text.label for client in population.clients for text in _texts(client))
    return DataSummary(
        tuple(_client(client, reader) for client in population.clients),
        {population.labels[label]: count for label, count in counts.most_common() if label != NO_LABEL},
        len(population.public),
        loaded.facts,
    )


def _reader(base: Base) -> PhraseReader:
    return PhraseReader.of((base.folder / "tokenizer.json").read_bytes())


def lines(summary: DataSummary) -> Iterator[tuple[str, str]]:
    clients, facts = summary.clients, summary.facts
    unseen = sum(client.unseen for client in clients)
    left_out = f"; {facts.small} more have too few texts" if facts and facts.small else ""
    yield "clients", f"{len(clients)}, {unseen} of them unseen: no part in training{left_out}"
    if facts and facts.dealt:
        yield "", "made up, and the texts dealt out to them: name the column of whose text it is with data.client"
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
        for line in _warnings(facts):
            yield "look at", line
        for line in facts.broken[:SHOWN_BROKEN]:
            yield "broken", line


def _unknown(summary: DataSummary) -> str:
    worst = max(summary.clients, key=lambda client: client.unknown)
    text = f"{100 * summary.unknown:.1f} % of the tokens"
    if worst.unknown:
        text += f", at most {100 * worst.unknown:.1f} % ({worst.name})"
    spelled = [client for client in summary.clients if client.spelled]
    if spelled:
        least = min(spelled, key=lambda client: client.letters)
        text += f"; the words of {len(spelled)} of {len(summary.clients)} clients are spelled out ({least.name}: "
        text += f"{least.letters:.1f} letters a token)"
    if summary.warns:
        text += ": this base hardly reads them; choose one for these languages (edgeadapt base show)"
    return text


def _rows(facts: DataFacts) -> str:
    parts = [f"{facts.rows} read, {facts.groups} groups of near-duplicates"]
    counted = {
        "broken ones left out": len(facts.broken),
        "too long and cut": facts.cut,
        "taken from clients and made public, with their near-duplicates": facts.taken,
        "test texts left out, of which training has a near-duplicate": facts.overlapping,
        "test texts of your split have a near-duplicate in training": facts.leaked,
    }
    return "; ".join(parts + [f"{count} {what}" for what, count in counted.items() if count])


def _warnings(facts: DataFacts) -> Iterator[str]:
    """Say what is probably a mistake in the data."""
    doubts = (
        (facts.conflicting, "texts with several labels", "which no model can learn"),
        (facts.variants, "labels in spellings that differ in case, punctuation, space or zeros", "write them alike"),
        (facts.unsaid, "labels that say that there is none", "leave such rows out"),
        (facts.lists, "labels that are lists or objects, written as text", "each is taken for one label"),
        (facts.idle, "columns that are not used", "name each with its key, such as data.split"),
        (facts.rare, "labels with too few texts to make one public", "the vendor's head knows nothing of them"),
    )
    for named, what, so in doubts:
        if named:
            more = ", …" if len(named) > SHOWN_DOUBTS else ""
            yield f"{what}, {len(named)}: {', '.join(repr(name[:60]) for name in named[:SHOWN_DOUBTS])}{more} ({so})"


def _texts(client: Client) -> Iterator[LabelledText]:
    yield from (*client.train, *client.validation, *client.test)


def _client(client: Client, reader: PhraseReader | None) -> ClientSummary:
    texts = list(_texts(client))
    begins = [unmarked(text.text).strip()[:READ] for text in texts]
    counts = [reader.known(begin) for begin in begins] if reader else []
    letters, spelled = _letters("".join(begins), sum(known for known, _ in counts)) if reader else (0.0, False)
    return ClientSummary(
        client.name,
        client.language,
        client.unseen,
        len(client.train),
        len(client.validation),
        len(client.test),
        len({text.label for text in texts}),
        float(np.mean([1 - known / total if total else 1.0 for known, total in counts])) if reader else 0.0,
        letters,
        spelled,
    )


def _letters(text: str, tokens: int) -> tuple[float, bool]:
    """Letters a token, and whether they are so few that the words were spelled out."""
    letters = sum(unicodedata.category(char)[0] in "LM" for char in text)
    latin = sum(map(len, LATIN.findall(text))) > letters / 2
    share = letters / max(1, tokens)
    return share, letters > 0 and share < SPELLED[latin]
