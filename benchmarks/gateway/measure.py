"""Ask many connected devices over a real gateway with TLS on loopback, and time the answers.

The gateway and the coordinator's transport are those of a run; the devices are in another process and only wait
(``clients``). Both processes share this machine, so that the devices' work on TLS is in the times.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import IO, Any

from aggregation.entropy import SystemEntropy
from aggregation.errors import DataError
from aggregation.pki import Authority, certificates
from aggregation.pki.tls import TlsKey, read_tls_request
from aggregation.steps import ADAPTER, Step
from benchmarks.gateway.clients import HOST, WORK
from benchmarks.ondevice.process import resident
from benchmarks.timing import Note, aligned
from coordinator.gateway.grid import GatewayGrid
from coordinator.gateway.server import GatewayLimits
from coordinator.servertls import ServerTls
from coordinator.settings import GatewaySettings
from coordinator.transport import Transport

ADAPTER_BYTES, UPDATE_BYTES = 345_000, 172_000  # MiniLM with LoRA of rank 8, 16 bits per element
CHECK_IN_BYTES, SIGNATURE_BYTES, SHARES_BYTES = 400, 150, 4_000
DEADLINE = 120.0  # seconds for an exchange


@dataclass(frozen=True, slots=True)
class Load:
    cohort: int  # devices of a round
    work: float  # seconds that each device works at each step
    repeats: int  # rounds
    devices: int  # connected at once
    check_ins: int  # of them, asked at once
    pulls: int  # of them, that get an adapter at once


@dataclass(frozen=True, slots=True)
class Arrivals:
    rate: float  # a minute
    seconds: float


FULL = Load(cohort=10, work=0.2, repeats=10, devices=2000, check_ins=1000, pulls=200)
QUICK = Load(cohort=3, work=0.05, repeats=2, devices=10, check_ins=5, pulls=5)


def measure(load: Load, note: Note) -> dict[str, Any]:
    """Run all parts; times in milliseconds, memory in bytes."""
    before = os.getloadavg()[0]
    note(f"rounds of {load.cohort} devices")
    with _gateway(load.cohort) as (transport, _):
        rounds = [_round(transport, load.work) for _ in range(load.repeats + 1)][1:]  # the first one warms up
    note(f"{load.devices} devices connect")
    begin = time.perf_counter()
    with _gateway(load.devices) as (transport, memory):
        connected, nodes = time.perf_counter() - begin, transport.nodes()
        note(f"{load.check_ins} check-ins, {load.pulls} adapters")
        check_ins = _ask(transport, Step.CHECK_IN, nodes[: load.check_ins], 0.0, CHECK_IN_BYTES)
        pulls = _ask(transport, Step.PLAN, nodes[: load.pulls], 0.0, SIGNATURE_BYTES, os.urandom(ADAPTER_BYTES))
    return {
        "load": asdict(load),
        "round": {name: _spread([each[name] for each in rounds]) for name in rounds[0]},
        "connect_seconds": connected,
        "connected": len(nodes),
        "bytes_a_connection": memory / load.devices,
        "check_in": check_ins,
        "pull": pulls,
        "load_average": [before, os.getloadavg()[0]],
    }


def _round(transport: Transport, work: float) -> dict[str, float]:
    """Milliseconds of each step of a round beyond the devices' work, and of all steps together."""
    nodes, adapter = transport.nodes(), os.urandom(ADAPTER_BYTES)
    found = {}
    for step, size in ((Step.PLAN, UPDATE_BYTES), (Step.SURVIVORS, SIGNATURE_BYTES), (Step.UNMASK, SHARES_BYTES)):
        asked = _ask(transport, step, nodes, work, size, adapter if step is Step.PLAN else b"")
        if asked["errors"]:
            raise AssertionError(f"{asked['errors']} devices did not answer {step.value}")
        found[step.value] = asked["last_ms"] - 1e3 * work
    return {**found, "all": sum(found.values())}


def _ask(
    transport: Transport, step: Step, nodes: tuple[int, ...], work: float, size: int, adapter: bytes = b""
) -> dict[str, float]:
    """One exchange: when the answers were there, in milliseconds since it began, and how many were missing."""
    body = WORK.pack(work, size)
    fields: Mapping[int, Mapping[str, bytes]] = {node: {ADAPTER: adapter} if adapter else {} for node in nodes}
    begin, times, errors = time.perf_counter(), list[float](), 0
    for reply in transport.ask(step, dict.fromkeys(nodes, body), "1", fields):
        times.append(1e3 * (time.perf_counter() - begin))
        errors += reply.body is None
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return {"p50_ms": cuts[49], "p99_ms": cuts[98], "last_ms": times[-1], "errors": errors, "asked": len(nodes)}


def tls_of(authority: Authority) -> ServerTls:
    """A new key of a gateway on this machine, and its certificate for a day."""
    key, now = TlsKey.generate(SystemEntropy()), datetime.now(UTC)
    _, public = read_tls_request(key.request("gateway"))
    dates = {"not_before": now - timedelta(hours=1), "not_after": now + timedelta(days=1)}
    return ServerTls(key.pem, certificates.to_pem(authority.issue_tls("gateway", public, (HOST,), serial=1, **dates)))


@contextmanager
def _serving() -> Iterator[tuple[GatewayGrid, Authority]]:
    """A gateway, and the authority of its devices."""
    now = datetime.now(UTC)
    authority = Authority.create("bench", SystemEntropy(), now - timedelta(hours=1), now + timedelta(days=2))
    # Devices ask a step after the other, without training, and come again without a pause.
    limits = GatewayLimits(calls=10_000, grace=0.0, settings=GatewaySettings(check_ins_per_minute=1e6))
    grid = GatewayGrid(f"{HOST}:0", tls_of(authority), lambda at: authority.root, limits)
    try:
        yield grid, authority
    finally:
        grid.close()


@contextmanager
def _clients(authority: Authority, *arguments: object) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A process of devices, after its first line: its standard input and output."""
    command = [sys.executable, "-m", "benchmarks.gateway.clients", *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as clients:  # noqa: S603
        if clients.stdin is None or clients.stdout is None:
            raise AssertionError
        clients.stdin.write(authority.to_pem() + b"\n")
        clients.stdin.flush()
        if not clients.stdout.readline():
            raise AssertionError("the devices could not connect")
        yield clients.stdin, clients.stdout
        clients.stdin.close()


@contextmanager
def _gateway(count: int) -> Iterator[tuple[Transport, float]]:
    """A gateway to which so many devices are connected, and the bytes of memory that they take here."""
    with _serving() as (grid, authority):
        before = resident("VmRSS")
        with _clients(authority, grid.gateway.port, count):
            yield Transport(grid, grid.clock, DEADLINE), resident("VmRSS") - before


def measure_arrivals(arrivals: Arrivals, note: Note) -> dict[str, Any]:
    """Let devices check in at a rate, each over a new connection; times in milliseconds."""
    before, rate = os.getloadavg()[0], arrivals.rate / 60.0
    with _serving() as (grid, authority):
        note("devices are made")
        with _clients(authority, grid.gateway.port, rate, arrivals.seconds) as (asked, answered):
            note(f"{arrivals.rate:.0f} check-ins a minute for {arrivals.seconds:.0f} s")
            begin = time.process_time()
            asked.write(b"\n")
            asked.flush()
            line = answered.readline()
            own = time.process_time() - begin
    found = json.loads(line or b'{"milliseconds": [], "errors": {"the devices ended": 1}}')
    if len(times := found["milliseconds"]) < 2:
        failed = ", ".join(f"{count} {name}" for name, count in found["errors"].items())
        raise DataError(
            f"{len(times)} check-ins were admitted ({failed}): there is nothing to measure", about="admitted"
        )
    elapsed = found["seconds"]
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return {
        "arrivals": asdict(arrivals),
        "admitted": len(times),
        "errors": found["errors"],
        "admitted_a_minute": 60.0 * len(times) / elapsed,
        "p50_ms": cuts[49],
        "p99_ms": cuts[98],
        "last_ms": max(times),
        "cores": os.cpu_count(),
        "gateway_cores": own / elapsed,
        "device_cores": found["cpu_seconds"] / elapsed,
        "gateway_cpu_ms": 1e3 * own / len(times),
        "device_cpu_ms": 1e3 * found["cpu_seconds"] / len(times),
        "load_average": [before, os.getloadavg()[0]],
    }


def arrivals_table(found: Mapping[str, Any]) -> str:
    asked, (before, after) = found["arrivals"], found["load_average"]
    used, devices = found["gateway_cores"] + found["device_cores"], found["device_cores"]
    failed = ", ".join(f"{count} {name}" for name, count in found["errors"].items()) or "none"
    return "\n".join(
        [
            f"{asked['rate']:.0f} check-ins a minute for {asked['seconds']:.0f} s, each over a new connection with TLS",
            f"  admitted   {found['admitted']}, {found['admitted_a_minute']:.0f} a minute; failed: {failed}",
            f"  until then p50 {found['p50_ms']:.0f} ms, p99 {found['p99_ms']:.0f} ms, last {found['last_ms']:.0f} ms",
            f"  cores      gateway {found['gateway_cores']:.2f}, devices {devices:.2f} ({devices / used:.0%} of what "
            f"both used), of {found['cores']}",
            f"  a check-in takes {found['gateway_cpu_ms']:.1f} ms of a core at the gateway, and "
            f"{found['device_cpu_ms']:.1f} ms at the device",
            "",
            f"load average {before:.1f} before, {after:.1f} after; gateway and devices share this machine",
        ]
    )


def _spread(values: list[float]) -> dict[str, float]:
    return {"median_ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values)}


def table(found: Mapping[str, Any]) -> str:
    load, (before, after) = found["load"], found["load_average"]
    rounds = [
        ["step", "median", "least", "most"],
        *(_row(step, each.values()) for step, each in found["round"].items()),
    ]
    at_once = [["at once", "p50 ms", "p99 ms", "last", "errors"]]
    for name, what in (("check_in", "check-ins"), ("pull", f"adapters of {ADAPTER_BYTES / 1e3:.0f} kB")):
        *figures, count = found[name].values()
        at_once.append(_row(f"{count} {what}", figures))
    return "\n".join(
        [
            f"A round of {load['cohort']} devices that work {1e3 * load['work']:.0f} ms a step: ms beyond that work",
            aligned(rounds),
            "",
            f"{found['connected']} of {load['devices']} devices connected in {found['connect_seconds']:.1f} s, "
            "their keys and certificates included",
            f"{found['bytes_a_connection'] / 1024:.0f} KiB of memory a connection",
            aligned(at_once),
            "",
            f"load average {before:.1f} before, {after:.1f} after; gateway and devices share this machine",
        ]
    )


def _row(name: str, figures: Iterable[float]) -> list[str]:
    return [name, *(f"{figure:.0f}" for figure in figures)]
