"""A thief has a copy of a device's TLS key, and not its identity. It attends at the gateway in the device's place.

If the gateway admits the thief, the device's stream ends, and its requests go to the thief: the device takes part in no
round any more. The thief cannot answer them, because answers are signed by the identity.
"""

from collections.abc import Callable

import pytest
from grpc import StatusCode

from adapters.gateway import gateway_pb2 as pb
from coordinator.gateway import server
from coordinator.gateway.hub import Credentials
from tests.coordinator.gateway.conftest import Site, site_of
from tests.support.lightdevice import LightDevice

__all__ = ["site_of"]


def thief_of(site: Site, device: LightDevice) -> LightDevice:
    """Another identity, of a device of the fleet, with the TLS key and certificate of ``device``."""
    thief = site.device("garage")
    thief.close()
    thief.tls_key, thief.tls_certificate = device.tls_key, device.tls_certificate
    thief.connect()
    return thief


def hellos(thief: LightDevice, device: LightDevice) -> list[bytes]:
    """With its own certificate, and with the device's, which every offer contains; both signed by the thief."""
    borrowed = pb.Hello.FromString(thief.hello)
    borrowed.certificate = device.certificate
    return [thief.hello, borrowed.SerializeToString()]


def test_a_stolen_tls_key_attends_for_nobody(site_of: Callable[..., Site]) -> None:
    site = site_of()
    device = site.device("kitchen")
    stream, thief = device.attend(), thief_of(site, device)
    for hello in hellos(thief, device):
        assert thief.attend(hello).refused()[0] is StatusCode.PERMISSION_DENIED
    number = site.ask("kitchen")
    assert stream.request().id == number


def test_without_the_check_of_the_binding_the_thief_takes_the_place_of_the_device(
    site_of: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unchecked(service: server.Service, credentials: Credentials, at: object) -> None:
        return None

    monkeypatch.setattr(server.Service, "verify", unchecked)
    site = site_of()
    device = site.device("kitchen")
    stream, thief = device.attend(), thief_of(site, device)
    stolen = thief.attend()
    assert stream.refused()[0] is StatusCode.FAILED_PRECONDITION
    number = site.ask("kitchen")
    assert stolen.request().id == number
