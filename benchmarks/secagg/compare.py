"""The measurements of ``secagg``: both sides on the same work, then growth and memory of this project's.

docs/explanation/results.md says what each figure covers.
"""

import copy
import dataclasses
import hashlib
import math
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from aggregation import graph, masks, ring, rotation
from aggregation.errors import DataError
from aggregation.masks import Mask
from aggregation.ring import Ring
from aggregation.vector import Floats
from benchmarks.secagg import ours, peer
from benchmarks.timing import Call, Note, Stopwatch, Timing, aligned, interleaved, measure
from edgeadapt.formats.cores import cores

T = TypeVar("T")
DROPOUTS = (0.0, 0.1, 0.3)  # fractions of the devices, after the plan
DROPOUT = 0.1  # the fraction in the sweeps and in the large round
MEMORY_DEVICES = 12  # a server that held their uploads would need 12 vectors more
SWEEP_ELEMENTS = 1_000  # of the sweep over devices: few, so that keys and shares dominate
SWEEP_DEVICES = 10  # of the sweep over elements


@dataclass(frozen=True, slots=True)
class SecAggWorkload:
    """The size of the work: devices, neighbors, elements; repeats of ours and of the peer's slow server; the sweeps."""

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
        """The smallest with which no half of a neighborhood can reconstruct a secret (``graph.is_secure``)."""
        return self.degree // 2 + 2


QUICK = SecAggWorkload(20, 10, 2_000, 2, 1, (10, 12), (1_000, 2_000), 30, 1_000)


@dataclass(frozen=True, slots=True)
class Pair:
    """Both sides on the same work. ``one_core``: ours in one thread, where ``ours`` used one per core."""

    ours: Timing
    peer: Timing
    one_core: Timing | None = None

    def to_json(self) -> dict[str, Any]:
        """Medians of wall-clock time with their ratio, and all timings. CPU time is compared on one core."""
        one_core = self.one_core or self.ours
        return {
            "ours_ms": self.ours.ms,
            "peer_ms": self.peer.ms,
            "ratio": self.peer.ms / self.ours.ms,
            "one_core_ratio": self.peer.ms / one_core.ms,
            "cpu_ratio": self.peer.cpu_ms / one_core.cpu_ms,
            "ours": self.ours.to_json(),
            "peer": self.peer.to_json(),
            "ours_on_one_core": one_core.to_json(),
        }


def compare(work: SecAggWorkload, note: Note) -> dict[str, Any]:
    """Measure both sides on the same work and return the figures as JSON has them."""
    note("setting up both sides")
    mine = ours.make(work.devices, work.degree, work.threshold, work.elements)
    theirs = peer.make(work.devices, work.degree, work.threshold)
    values, rng = np.random.default_rng(1).uniform(-1, 1, work.elements), np.random.default_rng(2)
    note("client: shares, encode and mask, rotation, whole upload")
    clients = _clients(work, mine, theirs, values)
    back = measure(lambda given: rotation.rotate_back(given, bytes(32)), lambda: values, work.repeats)
    note("masks against AES and an addition")
    limits = mask_limits(work.elements, work.degree + 1, max(work.repeats, 7))
    note("uploads of every device")
    begun = mine.begin()
    bodies = {name: mine.upload(mine.planned(name, begun.plan), {"delta": values}, rng) for name in mine.devices}
    uploads, foreign = ours.Uploads(mine, begun, bodies), theirs.upload(0, values)
    # Each upload is in memory of its own, on both sides, as in a round.
    copies = [bytes(bytearray(foreign)) for _ in range(work.devices)]
    server, checks = {}, {}
    for fraction in DROPOUTS:
        note(f"server: {fraction:.0%} dropouts; the peer takes a while")
        pair, checks[f"{fraction:g}"] = _server(work, uploads, theirs, copies, fraction)
        server[f"{fraction:g}"] = pair.to_json()
    return {
        "devices": work.devices,
        "neighbors": work.degree,
        "elements": work.elements,
        "threads": work.threads,
        **{name: pair.to_json() for name, pair in clients.items()},
        "server": server,
        "server_checks_ms": checks,
        "server_rotation_ms": back.ms,
        "bytes": {"ours": len(next(iter(bodies.values()))), "peer": len(foreign)},
        **limits,
    }


def _clients(
    work: SecAggWorkload, mine: ours.EdgeAdaptFleet, theirs: peer.FlowerFleet, values: Floats
) -> dict[str, Pair]:
    first, plan, rng, given = next(iter(mine.devices)), mine.begin().plan, np.random.default_rng(2), {"delta": values}

    def peers(run: Callable[[Any], object]) -> Call:
        return Call(run, lambda: copy.deepcopy(theirs.states[0]), work.repeats)

    def pair(our: Callable[..., object], their: Callable[[int, Any], object]) -> Pair:
        def ours_on(threads: int) -> Call:
            return Call(lambda p: our(p, given, rng, threads), lambda: mine.planned(first, plan), work.repeats)

        all_cores, one_core, other = interleaved(ours_on(work.threads), ours_on(1), peers(lambda _: their(0, values)))
        return Pair(all_cores, other, one_core)

    return {
        "shares": Pair(*interleaved(Call(mine.deal, lambda: first, work.repeats), peers(theirs.deal))),
        "client": pair(mine.masked, theirs.masked),
        "client_rotated": pair(mine.rotated, theirs.masked),
        "upload": pair(mine.upload, theirs.upload),
    }


def _server(
    work: SecAggWorkload, uploads: ours.Uploads, theirs: peer.FlowerFleet, copies: list[bytes], fraction: float
) -> tuple[Pair, float]:
    """Sum and unmask with that fraction of dropouts; and the milliseconds that our checks of the uploads add."""
    absent, away = dropouts(uploads.fleet.order, fraction), dropouts(theirs.states, fraction)
    shares = theirs.responses(away)

    def arrived() -> ours.Uploads:
        return uploads.without(absent)

    def ours_on(threads: int) -> Call:
        return Call(lambda unmasking: ours.unmask(unmasking, threads), lambda: arrived().until_unmask(), work.repeats)

    def their_server(_: None) -> None:
        peer.unmask(theirs, peer.sum_up(copies[: work.devices - len(away)]), shares, away)

    sums, unmasks, one_core, checked, other = interleaved(
        Call(ours.Uploads.sum_up, arrived, work.repeats),
        ours_on(work.threads),
        ours_on(1),
        Call(lambda each: each.receive(work.threads), arrived, work.repeats),
        Call(their_server, lambda: None, work.peer_repeats),
    )
    return Pair(sums + unmasks, other, one_core=sums + one_core), checked.ms - sums.ms


def dropouts(order: Iterable[T], fraction: float) -> frozenset[T]:
    """A fraction of the devices, spaced evenly along ``order``, so that every neighborhood keeps its threshold.

    >>> sorted(dropouts(range(10), 0.3))
    [0, 3, 6]
    """
    devices = tuple(order)
    count = round(fraction * len(devices))
    return frozenset(devices[i * len(devices) // count] for i in range(count))


def mask_limits(elements: int, count: int, repeats: int) -> dict[str, float]:
    """Compare the speed of ``count`` masks with its lower bound, the AES-256 keystream and one wrapping addition.

    Returns speeds in GB of keystream per second of CPU time (10^9 bytes): of masking, and of AES alone in CTR mode and
    in GCM. Fractions: masking relative to the faster of the two modes with the addition, and relative to CTR mode.
    """
    vector = ring.zeros(elements, ours.BITS)
    found = [Mask(hashlib.sha256(bytes([i])).digest(), add=True) for i in range(count)]
    blocks = max(1, vector.nbytes * count // masks.BLOCK)
    kinds = [(mode, add) for mode in (modes.CTR(bytes(16)), modes.GCM(bytes(12))) for add in (False, True)]
    masking, *raw = interleaved(
        Call(lambda _: masks.apply(vector, found), lambda: None, repeats),
        *(Call(partial(_keystream, blocks, *kind), lambda: None, repeats) for kind in kinds),
    )
    speed = vector.nbytes * count / min(masking.cpu)
    ctr, ctr_add, gcm, gcm_add = (blocks * masks.BLOCK / min(timing.cpu) for timing in raw)
    return {
        "mask_fraction_of_limit": speed / max(ctr_add, gcm_add),
        "mask_fraction_of_ctr_mode": speed / ctr_add,
        "mask_gb_per_s": speed / 1e6,
        "aes_ctr_gb_per_s": ctr / 1e6,
        "aes_gcm_gb_per_s": gcm / 1e6,
    }


def _keystream(blocks: int, mode: modes.CTR | modes.GCM, add: bool, _: None) -> None:
    """Write ``blocks`` blocks of keystream over each other; add each to another block if ``add``."""
    stream, zeros = Cipher(algorithms.AES256(bytes(32)), mode).encryptor(), bytes(masks.BLOCK)
    buffer, kind = memoryview(bytearray(masks.BLOCK)), ring.dtype(ours.BITS)
    keystream: Ring = np.frombuffer(buffer, kind)
    total = np.zeros_like(keystream)
    for _repeat in range(blocks):
        stream.update_into(zeros, buffer)
        if add:
            np.add(total, keystream, out=total)


def large(work: SecAggWorkload, note: Note) -> dict[str, Any]:
    """Run one round of many devices with a tenth of dropouts; time the server alone, with all of its checks."""
    note(f"{work.large_devices} devices with {work.large_elements} elements")
    fleet, values, rng = _fleet(work.large_devices, work.large_elements)
    absent, watch, state = dropouts(fleet.order, DROPOUT), Stopwatch(), fleet.begin()
    plan, survivors = state.plan, [name for name in fleet.devices if name not in absent]
    for name in survivors:  # one upload at a time; none is kept
        state = watch.run(state.on_masked_input, name, fleet.upload(fleet.planned(name, plan), values, rng))
    received = watch.seconds
    confirming = watch.run(ours.close_collecting, state)
    for name in survivors:
        signature = fleet.consistency_signature(name, confirming)
        confirming = watch.run(confirming.on_consistency_signature, name, signature)
    unmasking = watch.run(ours.close_confirming, confirming)
    for name in survivors:
        unmasking = watch.run(unmasking.on_unmask_response, name, fleet.unmask_response(name, unmasking))
    watch.run(ours.unmask, unmasking)
    return {
        "devices": work.large_devices,
        "elements": work.large_elements,
        "neighbors": fleet.session.spec.degree,
        "dropouts": DROPOUT,
        "server_receive_s": received,
        "server_s": watch.seconds,
        "server_cpu_s": watch.cpu,
    }


def memory(work: SecAggWorkload, note: Note) -> dict[str, float]:
    """Measure the peak of allocated memory, in vectors: of a device, and of a device and the server together. The
    trained values are not counted. The server's peak is taken while ``MEMORY_DEVICES`` uploads arrive."""
    note("memory")
    fleet, values, rng = _fleet(MEMORY_DEVICES, work.elements)
    plan, vector = fleet.begin().plan, ring.zeros(work.elements, ours.BITS).nbytes

    def upload(name: str) -> bytes:
        return fleet.upload(fleet.planned(name, plan), values, rng)

    def collect() -> None:
        state = dataclasses.replace(fleet.begin(), plan=plan, digest=plan.digest())
        for name in fleet.devices:
            state = state.on_masked_input(name, upload(name))

    client, both = _peak(lambda: upload(next(iter(fleet.devices)))), _peak(collect)
    return {"client_vectors": client / vector, "both_vectors": both / vector, "uploads": len(fleet.devices)}


def _peak(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def sweep(work: SecAggWorkload, note: Note) -> dict[str, Any]:
    """Measure CPU time of one client and of the server over the number of devices and over that of elements."""
    by_devices = [_point(n, SWEEP_ELEMENTS, note, f"sweep: {n} devices") for n in work.sweep_devices]
    by_elements = [_point(SWEEP_DEVICES, d, note, f"sweep: {d} elements") for d in work.sweep_elements]
    return {"devices": growth(work.sweep_devices, by_devices), "elements": growth(work.sweep_elements, by_elements)}


def _fleet(devices: int, elements: int) -> tuple[ours.EdgeAdaptFleet, dict[str, Any], np.random.Generator]:
    degree, threshold = graph.graph_parameters(devices, 0.1, DROPOUT)
    rng = np.random.default_rng(3)
    return ours.make(devices, degree, threshold, elements), {"delta": rng.uniform(-1, 1, elements)}, rng


def _point(devices: int, elements: int, note: Note, what: str) -> dict[str, float]:
    note(what)
    fleet, values, rng = _fleet(devices, elements)
    begun, first = fleet.begin(), next(iter(fleet.devices))
    client = measure(lambda p: fleet.upload(p, values, rng), lambda: fleet.planned(first, begun.plan), 3)
    bodies = {name: fleet.upload(fleet.planned(name, begun.plan), values, rng) for name in fleet.devices}
    uploads, absent = ours.Uploads(fleet, begun, bodies), dropouts(fleet.order, DROPOUT)
    received = measure(ours.Uploads.receive, lambda: uploads.without(absent), 3)
    unmasked = measure(ours.unmask, lambda: uploads.without(absent).until_unmask(), 1)
    shares = measure(fleet.deal, lambda: first, 3)
    return {"shares": shares.cpu_ms, "client": client.cpu_ms, "server": received.cpu_ms + unmasked.cpu_ms}


def growth(at: Sequence[int], points: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the points of a sweep with the exponent of each of their lines, the slope on logarithmic axes.

    >>> growth((1, 10), ({"server": 3.0}, {"server": 300.0}))["growth"]["server"].__round__(6)
    2.0
    """
    lines = {name: [point[name] for point in points] for name in points[0]}
    powers = {
        name: float(np.polyfit([math.log(x) for x in at], [math.log(y) for y in line], 1)[0])
        for name, line in lines.items()
    }
    return {"at": list(at), "cpu_ms": lines, "growth": powers}


_HEAD = ("", "ours ms", "peer ms", "ratio", "by CPU")
Figures = Mapping[str, Any]


def table(found: Figures) -> str:
    """Format the comparison: medians of wall-clock time with quartiles, ratios of wall-clock and of CPU time."""
    return "\n".join([aligned([_HEAD, *_rows(found)]), "", *_notes(found)])


def _rows(found: Figures) -> Iterator[tuple[str, ...]]:
    yield _row("client: shares", found["shares"])
    pairs = {
        "client: encode + mask": found["client"],
        "client: rotate + encode + mask": found["client_rotated"],
        "client: whole upload": found["upload"],
    }
    pairs |= {f"server: {float(key):.0%} dropouts": pair for key, pair in found["server"].items()}
    for what, pair in pairs.items():
        yield _row(what, {**pair, "cpu_ratio": None})
    for what, pair in pairs.items():
        yield _row(f"{what}, one core", {**pair, "ours": pair["ours_on_one_core"], "ratio": pair["one_core_ratio"]})


def _row(what: str, pair: Figures) -> tuple[str, ...]:
    by_cpu = "" if pair["cpu_ratio"] is None else f"{pair['cpu_ratio']:.1f}"
    return what, _spread(pair["ours"]), _spread(pair["peer"]), f"{pair['ratio']:.1f}", by_cpu


def _spread(timing: Figures) -> str:
    low, high = timing["quartiles_ms"]
    return f"{timing['ms']:.1f} ({low:.1f}–{high:.1f})"


def _notes(found: Figures) -> Iterator[str]:
    size, checks, server = found["bytes"], found["server_checks_ms"], next(iter(found["server"].values()))
    yield f"{found['devices']} devices, {found['elements']} elements, {found['neighbors']} neighbors."
    yield (
        f"Median (quartiles) of {found['client']['ours']['repeats']} repeats, ours and the peer's alternately; "
        f"{server['peer']['repeats']} of the peer's server."
    )
    yield "Peer: the SecAgg+ functions of the installed flwr, which use one core."
    yield f"Ours masks in {found['threads']} thread{'s' * (found['threads'] > 1)}; in the rows of one core, in one."
    yield f"Bytes of an upload: ours {size['ours']}, peer {size['peer']}."
    yield f"Checks of digests and signatures, which the peer does not have, add {checks['0']:.0f} ms at our server."
    yield f"Rotating the sum back, which the peer does not do, adds {found['server_rotation_ms']:.0f} ms at our server."
    yield (
        f"Masks at {found['mask_gb_per_s']:.1f} GB/s: {found['mask_fraction_of_limit']:.0%} of the speed of the "
        f"keystream and one addition. AES-256 alone: {found['aes_ctr_gb_per_s']:.1f} GB/s in CTR mode, "
        f"{found['aes_gcm_gb_per_s']:.1f} in GCM."
    )
    yield from _sweep_notes(found)


def _sweep_notes(found: Figures) -> Iterator[str]:
    if "memory" in found:
        peak = found["memory"]
        yield (
            f"Memory, in vectors: {peak['client_vectors']:.1f} for a device; {peak['both_vectors']:.1f} for a device "
            f"and the server while {peak['uploads']} uploads arrive."
        )
    if "large" in found:
        big = found["large"]
        yield (
            f"A round of {big['devices']} devices with {big['elements']} elements and {big['neighbors']} neighbors, "
            f"{big['dropouts']:.0%} dropouts: {big['server_s']:.1f} s at the server, checks included "
            f"({big['server_cpu_s']:.1f} s of CPU)."
        )
    for what, line in found.get("sweep", {}).items():
        powers = ", ".join(f"{name} {power:.2f}" for name, power in line["growth"].items())
        yield f"Exponent of growth with the number of {what}: {powers}."


def draw(sweep: Figures, path: Path) -> None:
    """Write the sweeps as a PNG: CPU time over devices and over elements, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (what, line) in zip(figure.subplots(1, 2, sharey=True), sweep.items(), strict=True):
        for name, values in line["cpu_ms"].items():
            axes.loglog(line["at"], values, marker="o", label=f"{name}: power {line['growth'][name]:.2f}")
        axes.set(xlabel=what, title=f"One round by number of {what}")
        axes.grid(visible=True, which="both", alpha=0.2)
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("CPU time, ms")
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; choose another --out", about="--out") from None
