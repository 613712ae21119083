"""A gateway with an authority, and devices that a test drives message by message."""

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority, Root
from aggregation.pki.certificates import serial
from aggregation.pki.revocation import Revocation
from coordinator.gateway.carriers import BrowserSettings
from coordinator.gateway.hub import NoAnswer
from coordinator.gateway.server import Gateway, GatewayLimits
from tests.support.gateway import HOST, server_tls
from tests.support.lightdevice import CARRIERS, GRPC, PATIENCE, LightDevice

LIMITS = GatewayLimits(transfer=1.0, grace=0.3)


@dataclass
class Site:
    """An authority, a gateway of it, and what was answered."""

    authority: Authority
    gateway: Gateway
    answers: "queue.Queue[tuple[int, bytes | NoAnswer]]"
    roots: list[Root]  # the last one is in force
    carrier: str = GRPC  # of its devices, unless they say otherwise
    refusals: list[tuple[str, str, str]] = field(default_factory=list)
    devices: list[LightDevice] = field(default_factory=list)

    def device(self, name: str, **changes: Any) -> LightDevice:
        given = {"carrier": self.carrier, **changes}
        self.devices.append(LightDevice(self.gateway, self.authority, name, **given))
        return self.devices[-1]

    def ask(self, device: str, step: str = "offer", body: bytes = b"body", seconds: float = PATIENCE) -> int | None:
        return self.gateway.ask({device: (step, {"body": body})}, seconds)[device]

    def answered(self, seconds: float = PATIENCE) -> tuple[int, bytes | NoAnswer]:
        return self.answers.get(timeout=seconds)

    def revoke(self, *certificates: bytes) -> None:
        now = datetime.now(UTC)
        revoked = {serial(each): Revocation(now) for each in certificates}
        listed = self.authority.revocations(1, revoked, now, now + timedelta(1))
        self.roots.append(self.authority.root.with_revocations(listed.der))
        self.gateway.service._root = None  # which is read once a second


SiteOf = Callable[..., Site]


@pytest.fixture
def site_of() -> Iterator[SiteOf]:
    sites = []

    def make(limits: GatewayLimits = LIMITS, carrier: str = GRPC, origins: frozenset[str] = frozenset()) -> Site:
        now = datetime.now(UTC)
        authority = Authority.create("fleet", SystemEntropy(), now - timedelta(days=1), now + timedelta(days=9))
        answers: queue.Queue[tuple[int, bytes | NoAnswer]] = queue.Queue()
        roots = [authority.root]

        def answered(number: int, answer: bytes | NoAnswer) -> None:
            answers.put((number, answer))

        browsers = BrowserSettings(f"{HOST}:0", origins)
        refusals = list[tuple[str, str, str]]()
        gateway = Gateway(
            f"{HOST}:0",
            server_tls(authority),
            lambda at: roots[-1],
            answered,
            limits,
            browsers,
            lambda *refusal: refusals.append(refusal),
        )
        sites.append(Site(authority, gateway, answers, roots, carrier, refusals))
        return sites[-1]

    yield make
    for site in sites:
        for device in site.devices:
            device.close()
        site.gateway.close()


@pytest.fixture(params=CARRIERS)
def carrier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def site(site_of: SiteOf, carrier: str) -> Site:
    return site_of(carrier=carrier)
