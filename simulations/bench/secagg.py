"""`edgeadapt bench secagg`: the comparison itself, and the sweeps of cohort and vector."""

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aggregation import graph, masks, ring
from aggregation.masks import Mask
from aggregation.serverside import Collecting
from simulations.bench import ours, peer
from simulations.bench.timing import Timing, measure

DROPOUTS = (0.0, 0.1, 0.3)


@dataclass(frozen=True, slots=True)
class Size:
    """How much work: devices, neighbours, elements, repeats of ours and of the peer's slow server."""

    devices: int = 100
    degree: int = 20
    elements: int = 10**6
    repeats: int = 5
    peer_repeats: int = 1
    sweep_devices: tuple[int, ...] = (10, 32, 100, 316, 1000)
    sweep_elements: tuple[int, ...] = (10**5, 10**6, 10**7)

    @property
    def threshold(self) -> int:
        """The least that lets no half of a neighbourhood open a secret (``graph.withstands``)."""
        return self.degree // 2 + 2


QUICK = Size(20, 10, 2_000, 2, 1, (10, 12), (1_000, 2_000))


@dataclass(frozen=True, slots=True)
class Pair:
    """The same work, ours and the peer's."""

    ours: Timing
    peer: Timing

    def to_json(self) -> dict[str, Any]:
        """Medians of wall time and their ratio; the rest beside them."""
        return {
            "ours_ms": self.ours.ms,
            "peer_ms": self.peer.ms,
            "ratio": self.peer.ms / self.ours.ms,
            "cpu_ratio": self.peer.cpu_ms / self.ours.cpu_ms,
            "ours": self.ours.to_json(),
            "peer": self.peer.to_json(),
        }


Note = Callable[[str], None]


def compare(size: Size, note: Note) -> dict[str, Any]:
    """Measure both on the same work.

    Args:
        size: Of the work.
        note: Told what is being measured.
    """
    note("setting up both sides")
    mine, theirs = (
        ours.make(size.devices, size.degree, size.threshold, size.elements),
        peer.make(size.devices, size.degree, size.threshold),
    )
    begun, values = mine.begin(), np.random.default_rng(1).uniform(-1, 1, size.elements)
    first, rng = next(iter(mine.devices)), np.random.default_rng(2)

    note("client: shares, then encode and mask")
    shares = Pair(
        measure(mine.deal, lambda: first, size.repeats),
        measure(theirs.deal, lambda: copy.deepcopy(theirs.states[0]), size.repeats),
    )
    client = Pair(
        measure(
            lambda p: mine.upload(p, {"delta": values}, rng), lambda: mine.planned(first, begun.plan), size.repeats
        ),
        measure(lambda c: theirs.upload(c, values), lambda: 0, size.repeats),
    )
    fraction, limit = _mask_fraction(size)

    note("uploads of every device")
    bodies = {name: mine.upload(mine.planned(name, begun.plan), {"delta": values}, rng) for name in mine.devices}
    foreign = theirs.upload(0, values)
    served = {f"{dropout:g}": _serve(size, mine, theirs, begun, bodies, foreign, dropout, note) for dropout in DROPOUTS}
    return {
        "devices": size.devices,
        "neighbours": size.degree,
        "elements": size.elements,
        "shares": shares.to_json(),
        "client": client.to_json(),
        "server": {key: pair.to_json() for key, (pair, _) in served.items()},
        "server_checks_ms": {key: checks for key, (_, checks) in served.items()},
        "bytes": {"ours": len(bodies[first]), "peer": len(foreign)},
        "mask_fraction_of_limit": fraction,
        "aes_ctr_gb_per_s": limit,
    }


def _serve(
    size: Size,
    mine: ours.Fleet,
    theirs: peer.Fleet,
    begun: Collecting,
    bodies: Mapping[str, bytes],
    foreign: bytes,
    dropout: float,
    note: Note,
) -> tuple[Pair, float]:
    """Sum and unmask with so many lost; and what our checks of digests and signatures add, in ms."""
    note(f"server: {dropout:.0%} lost; the peer takes a while")
    gone, away = ours.lost(mine, dropout), peer.lost(theirs, dropout)

    def arrived() -> ours.Uploads:
        return ours.collect(mine, bodies, begun, gone)

    def their_server(shares: Mapping[int, list[bytes]]) -> None:
        peer.unmask(theirs, peer.sum_up([foreign] * (size.devices - len(away))), shares, away)

    sums = measure(ours.sum_up, arrived, size.repeats)
    opened = measure(ours.finish, lambda: ours.ask(arrived()), size.repeats)
    checked = measure(ours.receive, arrived, size.repeats)
    other = measure(their_server, lambda: theirs.openings(away), size.peer_repeats)
    return Pair(_together(sums, opened), other), checked.ms - sums.ms


def _together(*parts: Timing) -> Timing:
    return Timing(
        tuple(map(sum, zip(*(part.wall for part in parts), strict=True))),
        tuple(map(sum, zip(*(part.cpu for part in parts), strict=True))),
    )


def _mask_fraction(size: Size) -> tuple[float, float]:
    """Speed of masking, as a fraction of AES-CTR and a wrapping add alone; and AES-CTR alone in GB/s. By CPU time."""
    vector = ring.zeros(size.elements, ours.BITS)
    found = [Mask(hashlib.sha256(bytes([i])).digest(), add=True) for i in range(size.degree + 1)]
    repeats = max(size.repeats, 5)
    ran = measure(lambda _: masks.apply(vector, found), lambda: None, repeats)
    block: Any = np.zeros(masks.BLOCK // 4, np.uint32)
    rounds = max(1, vector.nbytes * len(found) // masks.BLOCK)
    raw = measure(lambda _: _streams(block, rounds, add=False), lambda: None, repeats)
    limit = measure(lambda _: _streams(block, rounds, add=True), lambda: None, repeats)
    moved = rounds * masks.BLOCK
    done = vector.nbytes * len(found)
    return (min(limit.cpu) / moved) / (min(ran.cpu) / done), moved / min(raw.cpu) / 1e6


def _streams(block: Any, rounds: int, *, add: bool) -> None:
    """The least that masking can be: keystream into one block, added to another."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    stream = Cipher(algorithms.AES(bytes(32)), modes.CTR(bytes(16))).encryptor()
    zeros, buffer = bytes(block.nbytes), memoryview(bytearray(block.nbytes))
    keystream = np.frombuffer(buffer, np.uint32)
    for _ in range(rounds):
        stream.update_into(zeros, buffer)
        if add:
            np.add(block, keystream, out=block)


def sweep(size: Size, note: Note) -> dict[str, Any]:
    """Ours alone: one client and the server, over cohorts (crypto only: 1000 elements) and over vectors."""
    by_devices = [_once(n, 1_000, note, f"{n} devices") for n in size.sweep_devices]
    by_elements = [_once(10, d, note, f"{d} elements") for d in size.sweep_elements]
    return {
        "devices": _fitted(size.sweep_devices, by_devices),
        "elements": _fitted(size.sweep_elements, by_elements),
    }


def _once(devices: int, elements: int, note: Note, what: str) -> dict[str, float]:
    note(f"sweep: {what}")
    degree, threshold = graph.choose(devices, 0.1, 0.1)
    fleet = ours.make(devices, degree, threshold, elements)
    begun, rng = fleet.begin(), np.random.default_rng(3)
    values = {"delta": rng.uniform(-1, 1, elements)}
    first = next(iter(fleet.devices))
    client = measure(lambda p: fleet.upload(p, values, rng), lambda: fleet.planned(first, begun.plan), 3)
    bodies = {name: fleet.upload(fleet.planned(name, begun.plan), values, rng) for name in fleet.devices}
    gone = ours.lost(fleet, 0.1)
    server = measure(lambda given: ours.finish(ours.ask(given)), lambda: ours.collect(fleet, bodies, begun, gone), 1)
    deal = measure(fleet.deal, lambda: first, 3)
    return {"deal": deal.cpu_ms, "client": client.cpu_ms, "server": server.cpu_ms}


def _fitted(at: Sequence[int], found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The points, and by least squares the power of ``at`` with which each grows."""
    lines = {name: [point[name] for point in found] for name in found[0]}
    growth = {
        name: float(np.polyfit([math.log(x) for x in at], [math.log(y) for y in line], 1)[0])
        for name, line in lines.items()
    }
    return {"at": list(at), "cpu_ms": lines, "growth": growth}
