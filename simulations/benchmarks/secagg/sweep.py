"""Ours alone: how time grows with the cohort and with the vector, what memory it takes, and one large round."""

import dataclasses
import math
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from aggregation import graph
from simulations.benchmarks.secagg import ours
from simulations.benchmarks.secagg.compare import Note, Size
from simulations.benchmarks.timing import measure

T = TypeVar("T")
LOST = 0.1  # of the devices, after the plan
CROWD = 12  # devices, of which memory is measured: a server that held their uploads would need 12 vectors more


def large(size: Size, note: Note) -> dict[str, Any]:
    """One round of many devices, a tenth of them lost: the time of the server alone, with everything that it checks."""
    note(f"{size.large_devices} devices with {size.large_elements} elements")
    fleet, values, rng = _fleet(size.large_devices, size.large_elements)
    gone, watch, state = ours.lost(fleet, LOST), Stopwatch(), fleet.begin()
    plan, alive = state.plan, [name for name in fleet.devices if name not in gone]
    for name in alive:  # one upload at a time: none is kept
        state = watch.run(state.on_masked_input, name, fleet.upload(fleet.planned(name, plan), values, rng))
    received = watch.seconds
    confirming = watch.run(fleet.closed, state)
    for name in alive:
        confirming = watch.run(confirming.on_consistency_signature, name, fleet.agreement(name, confirming))
    unmasking = watch.run(ours.asked, confirming)
    for name in alive:
        unmasking = watch.run(unmasking.on_unmask_response, name, fleet.opening(name, unmasking))
    watch.run(ours.finish, unmasking)
    return {
        "devices": size.large_devices,
        "elements": size.large_elements,
        "neighbours": fleet.session.spec.degree,
        "lost": LOST,
        "server_receive_s": received,
        "server_s": watch.seconds,
        "server_cpu_s": watch.cpu,
    }


@dataclass(slots=True)
class Stopwatch:
    """Sums what the calls that it is given take: seconds that pass, and seconds of a core."""

    seconds: float = 0.0
    cpu: float = 0.0

    def run(self, call: Callable[..., T], *given: Any) -> T:
        """Call it."""
        begun, busy = time.perf_counter(), time.process_time()
        try:
            return call(*given)
        finally:
            self.cpu += time.process_time() - busy
            self.seconds += time.perf_counter() - begun


def memory(size: Size, note: Note) -> dict[str, float]:
    """The most that is allocated at once, in vectors: by a device that sends, and by it and the server together.

    What the device trained is not counted. Of the server it is the most while ``CROWD`` uploads come.
    """
    note("memory")
    fleet, values, rng = _fleet(CROWD, size.elements)
    plan, vector = fleet.begin().plan, 4 * size.elements  # bytes

    def upload(name: str) -> bytes:
        return fleet.upload(fleet.planned(name, plan), values, rng)

    def round_() -> None:
        state = dataclasses.replace(fleet.begin(), plan=plan, digest=plan.digest())
        for name in fleet.devices:
            state = state.on_masked_input(name, upload(name))

    client, both = _peak(lambda: upload(next(iter(fleet.devices)))), _peak(round_)
    return {"client_vectors": client / vector, "both_vectors": both / vector, "uploads": len(fleet.devices)}


def _peak(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def sweep(size: Size, note: Note) -> dict[str, Any]:
    """One client and the server, over cohorts (crypto only: 1000 elements) and over vectors."""
    by_devices = [_once(n, 1_000, note, f"sweep: {n} devices") for n in size.sweep_devices]
    by_elements = [_once(10, d, note, f"sweep: {d} elements") for d in size.sweep_elements]
    return {
        "devices": _fitted(size.sweep_devices, by_devices),
        "elements": _fitted(size.sweep_elements, by_elements),
    }


def steps(size: Size) -> int:
    """How often ``large``, ``memory`` and ``sweep`` note something, together."""
    return 2 + len(size.sweep_devices) + len(size.sweep_elements)


def _fleet(devices: int, elements: int) -> tuple[ours.Fleet, dict[str, Any], np.random.Generator]:
    degree, threshold = graph.graph_parameters(devices, 0.1, LOST)
    rng = np.random.default_rng(3)
    return ours.make(devices, degree, threshold, elements), {"delta": rng.uniform(-1, 1, elements)}, rng


def _once(devices: int, elements: int, note: Note, what: str) -> dict[str, float]:
    note(what)
    fleet, values, rng = _fleet(devices, elements)
    begun, first = fleet.begin(), next(iter(fleet.devices))
    client = measure(lambda p: fleet.upload(p, values, rng), lambda: fleet.planned(first, begun.plan), 3)
    bodies = {name: fleet.upload(fleet.planned(name, begun.plan), values, rng) for name in fleet.devices}
    gone = ours.lost(fleet, LOST)

    def arrived() -> ours.Uploads:
        return ours.collect(fleet, bodies, begun, gone)

    server = measure(ours.receive, arrived, 3).cpu_ms + measure(ours.finish, lambda: ours.ask(arrived()), 1).cpu_ms
    return {"shares": measure(fleet.deal, lambda: first, 3).cpu_ms, "client": client.cpu_ms, "server": server}


def _fitted(at: Sequence[int], found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The points, and by least squares the power of ``at`` with which each grows."""
    lines = {name: [point[name] for point in found] for name in found[0]}
    growth = {
        name: float(np.polyfit([math.log(x) for x in at], [math.log(y) for y in line], 1)[0])
        for name, line in lines.items()
    }
    return {"at": list(at), "cpu_ms": lines, "growth": growth}
