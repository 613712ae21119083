"""A host of a thief lures a device, passes the gateway's challenge on to it, and attends with its answer.

If the gateway admits the thief, the device's stream ends, and its requests go to the thief: the device takes part in no
round any more. The thief cannot answer them, because answers are signed by the identity. Or the thief has a copy of the
device's certificate, which every offer contains, and not its key.
"""

import pytest

from aggregation.entropy import SystemEntropy
from aggregation.pki import IdentityKey, PublicKey
from coordinator.gateway.server import Service
from edgeadapt.formats.gateway import messages
from tests.coordinator.gateway.conftest import Site, carrier, site, site_of
from tests.support.gateway import HOST
from tests.support.lightdevice import Kind, LightDevice, Talk

__all__ = ["carrier", "site", "site_of"]
LURE = "evil.example"  # whose certificate the device has verified, as its name is in it


def relayed(device: LightDevice, stated: str) -> Talk:
    """A conversation of the thief, with the device's signature for the thief's own host."""
    talk = device.connect()
    talk.send(device.hello(talk.receive(), host=LURE, stated=stated))
    return talk


def test_a_relayed_challenge_attends_for_nobody(site: Site) -> None:
    device = site.device("kitchen")
    talk = device.attend()
    for stated in (LURE, HOST):
        assert relayed(device, stated).ended().kind is Kind.REFUSED
    number = site.ask("kitchen")
    assert talk.request().id == number


def test_without_the_check_of_the_host_the_thief_takes_the_place_of_the_device(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = Service._verified
    monkeypatch.setattr(
        Service, "_verified", lambda self, hello, nonce, names: genuine(self, hello, nonce, names | {LURE})
    )
    device = site.device("kitchen")
    talk = device.attend()
    stolen = relayed(device, LURE)
    assert stolen.receive() == messages.ADMITTED
    assert talk.ended().kind is Kind.INVALID
    number = site.ask("kitchen")
    assert stolen.request().id == number


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
def test_a_copied_certificate_attends_for_nobody_without_its_key(
    site: Site, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    device = site.device("kitchen")
    talk, thief = device.attend(), device.connect()
    if not checked:
        monkeypatch.setattr(PublicKey, "verify", lambda *given: None)
    thief.send(device.hello(thief.receive(), key=IdentityKey.generate(SystemEntropy())))
    if not checked:
        assert thief.receive() == messages.ADMITTED
    assert (thief if checked else talk).ended().kind is (Kind.REFUSED if checked else Kind.INVALID)
    number = site.ask("kitchen")
    assert (talk if checked else thief).request().id == number
