"""A device was revoked, and its TLS certificate still opens connections: gRPC asks no revocation list.

It opens calls that need no verification, or calls whose message never comes, to use up those of all devices; and it
calls without end, to fill the log and to use up the calls of the device that has its name now.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2

from adapters.gateway import frames
from aggregation.pki.certificates import load, to_der
from aggregation.pki.revocation import Revocation
from aggregation.pki.tls import TlsRole, verify_tls
from coordinator.gateway import admission, server
from coordinator.gateway.admission import OPEN, Admission
from coordinator.gateway.server import GatewayLimits
from tests.coordinator.gateway.conftest import Site, site_of
from tests.coordinator.gateway.test_websocket import Browser, Start, ended, received, start
from tests.support.gateway import channel
from tests.support.lightdevice import PATIENCE, LightDevice

__all__ = ["site_of", "start"]
WATCH = "/grpc.health.v1.Health/Watch"
FEW = GatewayLimits(devices=8)  # 32 calls at once
CONNECTIONS, STREAMS = 5, 8  # of the revoked device, and calls on each


def revoke(site: Site, *certificates: bytes) -> None:
    now = datetime.now(UTC)
    revoked = {load(each).serial_number: Revocation(now) for each in certificates}
    listed = site.authority.revocations(1, revoked, now, now + timedelta(1))
    site.roots.append(site.authority.root.with_revocations(listed.der))
    site.gateway.service._root = None  # which is read once a second


def revoked(site: Site, name: str) -> LightDevice:
    device = site.device(name)
    revoke(site, device.certificate, to_der(device.tls_certificate))
    return device


def connections(device: LightDevice) -> list[grpc.Channel]:
    pair = device.tls_key, device.tls_certificate
    return [channel(device.port, *pair, device.authority) for _ in range(CONNECTIONS)]


def is_served(device: LightDevice) -> bool:
    try:
        return bool(device.status().seconds >= 0)
    except grpc.RpcError as error:
        assert error.code() is StatusCode.RESOURCE_EXHAUSTED  # noqa: PT017
        return False


def begins(call: Any) -> bool:
    """Whether a call gets an answer."""
    try:
        return bool(next(iter(call)))
    except grpc.RpcError as error:
        return bool(error.code() is not StatusCode.RESOURCE_EXHAUSTED)


async def passing(self: Admission, continuation: Callable[..., Any], details: Any) -> Any:
    return await continuation(details)


@pytest.mark.parametrize("counted", [True, False], ids=["counted", "not counted"])
def test_calls_of_a_revoked_device_without_end_leave_those_of_others(
    site_of: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, counted: bool
) -> None:
    if not counted:
        monkeypatch.setattr(Admission, "intercept_service", passing)
    site = site_of(FEW)
    kitchen, thief = site.device("kitchen"), revoked(site, "thief")
    with pytest.raises(grpc.RpcError) as caught:
        thief.status()
    assert caught.value.code() is StatusCode.PERMISSION_DENIED
    asked, channels = health_pb2.HealthCheckRequest().SerializeToString(), connections(thief)
    calls = [each.unary_stream(WATCH)(asked, timeout=PATIENCE) for each in channels for _ in range(STREAMS)]
    assert sum(map(begins, calls)) == (OPEN if counted else 4 * FEW.devices)
    assert is_served(kitchen) is counted
    for each in channels:
        each.close()


@pytest.mark.parametrize("timed", [True, False], ids=["timed", "not timed"])
def test_calls_whose_message_does_not_come_end_and_leave_those_of_others(
    site_of: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, timed: bool
) -> None:
    begun, over, genuine = threading.Semaphore(0), threading.Event(), Admission.intercept_service

    async def counted(self: Admission, continuation: Callable[..., Any], details: Any) -> Any:
        begun.release()
        return await (genuine if timed else passing)(self, continuation, details)

    def never() -> Iterator[bytes]:
        over.wait()
        yield b""

    monkeypatch.setattr(Admission, "intercept_service", counted)
    monkeypatch.setattr(admission, "PROOF", 0.2)
    site = site_of(FEW)
    kitchen, channels = site.device("kitchen"), connections(revoked(site, "thief"))
    calls = [each.stream_stream(frames.ATTEND)(never()) for each in channels for _ in range(STREAMS)]
    assert all(begun.acquire(timeout=PATIENCE) for _ in range(4 * FEW.devices))
    if timed:
        ends = {StatusCode.DEADLINE_EXCEEDED, StatusCode.RESOURCE_EXHAUSTED}
        assert {call.code() for call in calls} <= ends
    assert is_served(kitchen) is timed
    over.set()
    for each in channels:
        each.close()


async def verified_first(self: server.Service, context: Any) -> tuple[str, bytes]:
    """What holds without the rule: a call is verified, and then counted by name."""
    (pem,) = context.auth_context()["x509_pem_cert"]
    at, der = datetime.now(UTC), to_der(pem)
    return verify_tls(self.root(at), der, TlsRole.DEVICE, at), der


@pytest.mark.parametrize("first", [True, False], ids=["counted first", "verified first"])
def test_a_revoked_device_that_calls_without_end_is_heard_a_few_times_and_its_successor_is_served(
    site_of: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, first: bool
) -> None:
    if not first:
        monkeypatch.setattr(server.Service, "_peer", verified_first)
    site = site_of(GatewayLimits(calls=5, seconds=1e9))
    old = revoked(site, "kitchen")
    new, codes = site.device("kitchen"), []
    with caplog.at_level(logging.WARNING, "edgeadapt.gateway"):
        for _ in range(20):
            with pytest.raises(grpc.RpcError) as caught:
                old.status()
            codes.append(caught.value.code())
    denied = 5 if first else 20
    assert codes == [StatusCode.PERMISSION_DENIED] * denied + [StatusCode.RESOURCE_EXHAUSTED] * (20 - denied)
    assert len(caplog.records) == denied
    assert is_served(new)


def test_a_revoked_page_that_comes_without_end_is_in_the_log_a_few_times(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    site, browser = start()
    tab: Browser = browser("tab")
    revoke(site, tab.certificate)
    with caplog.at_level(logging.WARNING, "edgeadapt.gateway"):
        for _ in range(80):
            with tab.connected() as connection:
                connection.send(tab.hello(received(connection)))
                assert ended(connection) == (1008, "certificate of tab is revoked")
    assert 64 <= len(caplog.records) < 80
    assert site.gateway.devices() == ()
