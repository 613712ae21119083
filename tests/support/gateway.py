"""A gateway on this machine's loopback, with real TLS, and the agents of devices in threads."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority, certificates
from aggregation.pki.tls import TlsKey, read_tls_request
from benchmarks.faults.processes import HOST as HOST
from benchmarks.faults.processes import free_port as free_port
from client.gateway.agent import Agent
from client.node.eligibility import LOOK
from coordinator.gateway.grid import GatewayGrid
from coordinator.gateway.server import GatewayLimits
from coordinator.servertls import ServerTls
from coordinator.statedir import CoordinatorStateDir


def authority_of(fleet: Any) -> Authority:
    return Authority.from_pem((fleet.out / "authority" / "authority.pem").read_bytes())


def certify(authority: Authority, name: str = "gateway", **dates: datetime) -> tuple[bytes, bytes]:
    """A new TLS key of a gateway at ``HOST`` and its certificate, both PEM."""
    key, now = TlsKey.generate(SystemEntropy()), datetime.now(UTC)
    _, public = read_tls_request(key.request(name))
    valid = {"not_before": now - timedelta(days=1), "not_after": now + timedelta(days=1), **dates}
    serial = int.from_bytes(SystemEntropy().bytes(8), "big") + 1
    der = authority.issue_tls(name, public, (HOST,), serial=serial, **valid)
    return key.pem, certificates.to_pem(der)


def server_tls(authority: Authority) -> ServerTls:
    return ServerTls(*certify(authority))


@contextmanager
def gateway(fleet: Any, limits: GatewayLimits | None = None) -> Iterator[GatewayGrid]:
    """The grid over a gateway of a fleet's coordinator, at a free port, while the block runs."""
    state_dir = CoordinatorStateDir.open(fleet.out / "coordinator")
    grid = GatewayGrid(f"{HOST}:0", server_tls(authority_of(fleet)), state_dir.read_root, limits)
    try:
        yield grid
    finally:
        grid.close()
        state_dir.registry.close()


@contextmanager
def attending(port: int | tuple[int, ...], folders: Sequence[str | Path], look: float = LOOK) -> Iterator[list[Agent]]:
    """The agents of these devices, each in a thread, while the block runs. ``port``: of the gateway, or several."""
    addresses = tuple(f"{HOST}:{each}" for each in (port if isinstance(port, tuple) else (port,)))
    agents = [Agent(Path(folder), addresses, look=look) for folder in folders]
    threads = [threading.Thread(target=agent.run) for agent in agents]
    for thread in threads:
        thread.start()
    try:
        yield agents
    finally:
        for agent in agents:
            agent.stop()
        for thread in threads:
            thread.join()


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Until it holds; fails after so many seconds."""
    end, pause = datetime.now(UTC) + timedelta(seconds=seconds), threading.Event()
    while not condition():
        assert datetime.now(UTC) < end, "not in time"
        pause.wait(0.02)
