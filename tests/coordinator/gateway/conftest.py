"""A gateway with an authority, and devices that a test drives call by call."""

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest

from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority, Root
from coordinator.gateway.hub import NoAnswer
from coordinator.gateway.server import Gateway, GatewayLimits
from tests.support.gateway import HOST, server_tls
from tests.support.lightdevice import PATIENCE, LightDevice

LIMITS = GatewayLimits(transfer=1.0, grace=0.3)


@dataclass
class Site:
    """An authority, a gateway of it, and what was answered."""

    authority: Authority
    gateway: Gateway
    answers: "queue.Queue[tuple[int, bytes | NoAnswer]]"
    roots: list[Root]  # the last one is in force
    devices: list[LightDevice] = field(default_factory=list)

    def device(self, name: str, **changes: object) -> LightDevice:
        self.devices.append(LightDevice(self.gateway.port, self.authority, name, **changes))  # type: ignore[arg-type]
        return self.devices[-1]

    def ask(self, device: str, step: str = "offer", body: bytes = b"body", seconds: float = PATIENCE) -> int | None:
        return self.gateway.ask({device: (step, {"body": body})}, seconds)[device]

    def answered(self, seconds: float = PATIENCE) -> tuple[int, bytes | NoAnswer]:
        return self.answers.get(timeout=seconds)


@pytest.fixture
def site_of() -> Iterator[Callable[..., Site]]:
    sites = []

    def make(limits: GatewayLimits = LIMITS) -> Site:
        now = datetime.now(UTC)
        authority = Authority.create("fleet", SystemEntropy(), now - timedelta(days=1), now + timedelta(days=9))
        answers: queue.Queue[tuple[int, bytes | NoAnswer]] = queue.Queue()
        roots = [authority.root]

        def answered(number: int, answer: bytes | NoAnswer) -> None:
            answers.put((number, answer))

        gateway = Gateway(f"{HOST}:0", server_tls(authority), lambda at: roots[-1], answered, limits)
        sites.append(Site(authority, gateway, answers, roots))
        return sites[-1]

    yield make
    for site in sites:
        for device in site.devices:
            device.close()
        site.gateway.close()


@pytest.fixture
def site(site_of: Callable[..., Site]) -> Site:
    return site_of()
