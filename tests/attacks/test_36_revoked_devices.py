"""A device was revoked, and its key still signs challenges.

It calls without end, to fill the log and to use up the calls of the device that has its name now.
"""

import logging

import pytest

from aggregation.pki.certificates import load, subject
from coordinator.gateway import places
from coordinator.gateway.hub import ComeBack, Credentials
from coordinator.gateway.places import REFUSALS, RefusalRates
from coordinator.gateway.server import GatewayLimits, Service
from edgeadapt.formats.gateway import messages
from tests.coordinator.gateway.conftest import Site, SiteOf, carrier, site_of
from tests.support.lightdevice import Kind

__all__ = ["carrier", "site_of"]
CALLS = REFUSALS + 16


def counted_first(self: Service, hello: messages.DeviceHello, nonce: bytes, names: frozenset[str]) -> Credentials:
    """What holds without the rule: a call is counted by name, and then verified."""
    if self._count_call(subject(load(hello.certificate))):
        raise ComeBack("calls", "too many calls")
    return VERIFIED(self, hello, nonce, names)


VERIFIED = Service._verified


@pytest.mark.parametrize("proved", [True, False], ids=["counted after the proof", "counted before it"])
def test_a_revoked_device_that_calls_without_end_uses_up_no_calls_of_its_successor(
    site_of: SiteOf, carrier: str, monkeypatch: pytest.MonkeyPatch, proved: bool
) -> None:
    if not proved:
        monkeypatch.setattr(Service, "_verified", counted_first)
    site = site_of(GatewayLimits(calls=5, seconds=1e9), carrier)
    old = site.device("kitchen")
    site.revoke(old.certificate)
    kinds = [old.greet().ended().kind for _ in range(20)]
    assert kinds == ([Kind.REFUSED] * 20 if proved else [Kind.REFUSED] * 5 + [Kind.LATER] * 15)
    assert site.device("kitchen").is_let_in() is proved


@pytest.mark.parametrize("limited", [True, False], ids=["limited", "not limited"])
def test_a_revoked_device_that_calls_without_end_is_in_the_log_a_few_times(
    site_of: SiteOf,
    carrier: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    limited: bool,
) -> None:
    monkeypatch.setattr(places, "REFUSED", 0.0)
    if not limited:
        monkeypatch.setattr(RefusalRates, "wait", lambda *given: 0.0)
    site: Site = site_of(carrier=carrier)
    kitchen = site.device("kitchen")
    site.revoke(kitchen.certificate)
    with caplog.at_level(logging.WARNING, "edgeadapt.gateway"):
        for _ in range(CALLS):
            over = kitchen.greet().ended()
            assert (over.kind, over.reason) == (Kind.REFUSED, "certificate of kitchen is revoked")
    assert REFUSALS <= len(caplog.records) < CALLS if limited else len(caplog.records) == CALLS
    assert site.gateway.devices() == ()
