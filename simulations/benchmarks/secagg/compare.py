"""`edgeadapt bench secagg`: both sides on the same work, in turns (docs/explanation/secagg-benchmark.md)."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adapters.cores import cores
from aggregation.server import Collecting
from simulations.benchmarks.secagg import ours, peer
from simulations.benchmarks.secagg.limit import limit
from simulations.benchmarks.timing import Call, Timing, in_turns

DROPOUTS = (0.0, 0.1, 0.3)
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Size:
    """How much work: devices, neighbours, elements, repeats of ours and of the peer's slow server, and the sweeps."""

    devices: int = 100
    degree: int = 20
    elements: int = 10**6
    repeats: int = 7
    peer_repeats: int = 3
    sweep_devices: tuple[int, ...] = (10, 32, 100, 316, 1000)
    sweep_elements: tuple[int, ...] = (10**5, 10**6, 10**7)
    large_devices: int = 1000
    large_elements: int = 10**5
    threads: int = field(default_factory=cores)

    @property
    def threshold(self) -> int:
        """The least that lets no half of a neighbourhood open a secret (``graph.is_secure``)."""
        return self.degree // 2 + 2


QUICK = Size(20, 10, 2_000, 2, 1, (10, 12), (1_000, 2_000), 30, 1_000)


@dataclass(frozen=True, slots=True)
class Pair:
    """The same work, ours and the peer's. ``alone``: ours where it used every core, but on one."""

    ours: Timing
    peer: Timing
    alone: Timing | None = None

    def to_json(self) -> dict[str, Any]:
        """Medians of wall time and their ratio; the rest beside them. CPU time is compared on one core."""
        alone = self.alone or self.ours
        return {
            "ours_ms": self.ours.ms,
            "peer_ms": self.peer.ms,
            "ratio": self.peer.ms / self.ours.ms,
            "one_core_ratio": self.peer.ms / alone.ms,
            "cpu_ratio": self.peer.cpu_ms / alone.cpu_ms,
            "ours": self.ours.to_json(),
            "peer": self.peer.to_json(),
            "ours_on_one_core": alone.to_json(),
        }


def compare(size: Size, note: Note) -> dict[str, Any]:
    """Measure both on the same work.

    Args:
        size: Of the work.
        note: Told what is being measured; ``STEPS`` times.
    """
    note("setting up both sides")
    mine = ours.make(size.devices, size.degree, size.threshold, size.elements)
    theirs = peer.make(size.devices, size.degree, size.threshold)
    begun, values = mine.begin(), np.random.default_rng(1).uniform(-1, 1, size.elements)
    first, rng = next(iter(mine.devices)), np.random.default_rng(2)

    note("client: shares, encode and mask, whole upload")
    clients = _clients(size, mine, theirs, begun, values)
    note("masks against AES and an addition")
    bound = limit(size.elements, size.degree + 1, max(size.repeats, 7))

    note("uploads of every device")
    bodies = {name: mine.upload(mine.planned(name, begun.plan), {"delta": values}, rng) for name in mine.devices}
    foreign = theirs.upload(0, values)
    server = _servers(size, mine, theirs, (begun, bodies, foreign), note)
    return {
        "devices": size.devices,
        "neighbours": size.degree,
        "elements": size.elements,
        "threads": size.threads,
        **{name: pair.to_json() for name, pair in clients.items()},
        "server": {key: pair.to_json() for key, (pair, _) in server.items()},
        "server_checks_ms": {key: checks for key, (_, checks) in server.items()},
        "bytes": {"ours": len(bodies[first]), "peer": len(foreign)},
        **bound,
    }


STEPS = 4 + len(DROPOUTS)


def _clients(
    size: Size, mine: ours.Fleet, theirs: peer.Fleet, begun: Collecting, values: np.ndarray[Any, np.dtype[np.float64]]
) -> dict[str, Pair]:
    first, rng, given = next(iter(mine.devices)), np.random.default_rng(2), {"delta": values}

    def peers(their: Callable[[Any], object]) -> Call:
        return Call(their, lambda: copy.deepcopy(theirs.states[0]), size.repeats)

    def pair(our: Callable[..., object], their: Callable[[int, Any], object]) -> Pair:
        def ours_on(threads: int) -> Call:
            return Call(lambda p: our(p, given, rng, threads), lambda: mine.planned(first, begun.plan), size.repeats)

        ran, alone, other = in_turns(ours_on(size.threads), ours_on(1), peers(lambda _: their(0, values)))
        return Pair(ran, other, alone)

    shares = in_turns(Call(mine.deal, lambda: first, size.repeats), peers(theirs.deal))
    return {
        "shares": Pair(*shares),
        "client": pair(mine.masked, theirs.masked),
        "upload": pair(mine.upload, theirs.upload),
    }


def _servers(
    size: Size,
    mine: ours.Fleet,
    theirs: peer.Fleet,
    sent: tuple[Collecting, Mapping[str, bytes], bytes],
    note: Note,
) -> dict[str, tuple[Pair, float]]:
    begun, bodies, foreign = sent
    # Each upload is a piece of memory of its own, on both sides, as they come in a round.
    copies = [bytes(bytearray(foreign)) for _ in range(size.devices)]
    found = {}
    for dropout in DROPOUTS:
        note(f"server: {dropout:.0%} lost; the peer takes a while")
        found[f"{dropout:g}"] = _serve(size, mine, theirs, (begun, bodies, copies), dropout)
    return found


def _serve(
    size: Size,
    mine: ours.Fleet,
    theirs: peer.Fleet,
    sent: tuple[Collecting, Mapping[str, bytes], list[bytes]],
    dropout: float,
) -> tuple[Pair, float]:
    """Sum and unmask with so many lost; and what our checks of digests and signatures add, in ms."""
    begun, bodies, copies = sent
    gone, away = ours.lost(mine, dropout), peer.lost(theirs, dropout)
    shares = theirs.responses(away)

    def arrived() -> ours.Uploads:
        return ours.collect(mine, bodies, begun, gone)

    def their_server(_: None) -> None:
        peer.unmask(theirs, peer.sum_up(copies[: size.devices - len(away)]), shares, away)

    sums, masks, alone, checked, other = in_turns(
        Call(ours.sum_up, arrived, size.repeats),
        Call(lambda u: ours.finish(u, size.threads), lambda: ours.ask(arrived()), size.repeats),
        Call(lambda u: ours.finish(u, 1), lambda: ours.ask(arrived()), size.repeats),
        Call(ours.receive, arrived, size.repeats),
        Call(their_server, lambda: None, size.peer_repeats),
    )
    return Pair(sums + masks, other, alone=sums + alone), checked.ms - sums.ms
