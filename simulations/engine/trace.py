"""Availability traces: a CSV file that says in which rounds which devices of a simulation can be reached."""

import bisect
import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.storage import file_sha256
from aggregation.errors import ConfigError, DataError
from simulations.data.population import Client

WHO = ("client", "language")
COLUMNS = ("round", "available")
KEY = "network.trace"


@dataclass(frozen=True, slots=True)
class Steps:
    """A share that changes at some rounds.

    >>> Steps((1, 4), (1.0, 0.2)).at(3), Steps((2,), (0.5,)).at(1)
    (1.0, None)

    Attributes:
        rounds: Where it changes, ascending.
        shares: From each of these rounds on, 0 to 1.
    """

    rounds: tuple[int, ...]
    shares: tuple[float, ...]

    def at(self, round_: int) -> float | None:
        """The share in a round; None before the first change."""
        index = bisect.bisect_right(self.rounds, round_) - 1
        return self.shares[index] if index >= 0 else None


def read_trace(path: Path, clients: Iterable[Client]) -> Mapping[str, Steps]:
    """Client → when its device can be reached.

    The file has the columns ``round`` and ``available``, and ``client`` or ``language``. A row holds from its round on,
    until another one of the same client or language. ``available`` is 1 or 0 for a client; in between it is the
    share of the clients of a language, or the probability for a client.

    Raises:
        ConfigError: The file cannot be read, or lacks a column.
        DataError: A row is broken, repeated, or names no client or language of the population.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file, strict=True)
            who = _column(path, lines.fieldnames or ())
            named: dict[str, list[str]] = {}
            for client in clients:
                named.setdefault(client.name if who == "client" else client.language, []).append(client.name)
            found: dict[str, dict[int, float]] = {}
            for row in lines:
                about = f"{path}, line {lines.line_num}"
                name, number, share = _row(about, who, row)
                if name not in named:
                    raise DataError(f"{about}: the population has no {who} {name!r}", about=about, value=name)
                if number in found.setdefault(name, {}):
                    raise DataError(f"{about}: {name!r} has a row of round {number} before", about=about, value=number)
                found[name][number] = share
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{KEY}: {path} cannot be read: {error}", about=KEY, value=str(path)) from error
    steps = {name: Steps(*zip(*sorted(rows.items()), strict=True)) for name, rows in found.items()}
    return {client: each for name, each in steps.items() for client in named[name]}


def trace_digest(path: Path) -> str:
    """SHA-256 of the file (hex): a resumed run has the trace that it began with.

    Raises:
        ConfigError: The file cannot be read.
    """
    try:
        return file_sha256(path)
    except OSError as error:
        raise ConfigError(f"{KEY}: {path} cannot be read: {error}", about=KEY, value=str(path)) from error


def _column(path: Path, header: Sequence[str]) -> str:
    """The column that says whom a row is about."""
    if missing := [name for name in COLUMNS if name not in header]:
        raise ConfigError(f"{KEY}: {path} has no column {missing[0]!r}", about=KEY, value=str(path))
    given = [name for name in WHO if name in header]
    if len(given) != 1:
        text = f"{KEY}: {path} needs one of the columns 'client' and 'language', it has {len(given)} of them"
        raise ConfigError(text, about=KEY, value=str(path))
    return given[0]


def _row(about: str, who: str, row: Mapping[str, str | None]) -> tuple[str, int, float]:
    try:
        name, number, share = row[who], int(row["round"] or ""), float(row["available"] or "")
    except (TypeError, ValueError):
        raise DataError(f"{about}: round is no whole number, or available is no number", about=about) from None
    if not name or number < 1 or not 0 <= share <= 1:
        text = f"{about}: a row needs a {who}, a round from 1 on, and available from 0 to 1"
        raise DataError(text, about=about, value=(name, number, share))
    return name, number, share
