"""The gateway's calls over real gRPC with mutual TLS: what is served, what is refused, and with which status."""

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from adapters.gateway import frames
from adapters.gateway import gateway_pb2 as pb
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, TrustError
from aggregation.pki import Authority
from aggregation.pki.certificates import serial, to_der
from aggregation.pki.revocation import Revocation
from aggregation.pki.tls import TlsRole
from coordinator.gateway.hub import WAITING, NoAnswer
from coordinator.gateway.server import Gateway
from tests.coordinator.gateway.conftest import LIMITS, Site
from tests.support import refused
from tests.support.gateway import HOST, channel, server_tls, wait_until
from tests.support.lightdevice import Attendance, LightDevice


def status_of(call: Callable[[], Any]) -> StatusCode:
    """With which status a call ends."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    code: StatusCode = caught.value.code()
    return code


def test_a_request_reaches_its_device_and_the_answer_comes_back(site: Site) -> None:
    kitchen = site.device("kitchen")
    stream = kitchen.attend()
    assert site.gateway.devices() == ("kitchen",)
    number = site.ask("kitchen", "offer", b"what the coordinator signed")
    request = stream.request()
    assert (request.id, request.step, dict(request.fields)) == (
        number,
        "offer",
        {"body": b"what the coordinator signed"},
    )
    kitchen.answer(frames.answer_parts(request.id, b"what the device signed"))
    assert site.answered() == (number, b"what the device signed")
    site.ask("kitchen", "plan")
    request = stream.request()
    kitchen.answer(frames.reason_parts(request.id, 100, "the device refuses"))
    assert site.answered() == (request.id, NoAnswer(100, "the device refuses"))


def test_long_fields_and_answers_are_transferred_in_parts_and_resumed(site: Site) -> None:
    kitchen, content = site.device("kitchen"), bytes(range(256)) * 5000
    stream = kitchen.attend()
    site.ask("kitchen", "plan", content)
    request = stream.request()
    (blob,) = request.blobs.values()
    assert (not request.fields, blob.size, blob.sha256) == (True, len(content), hashlib.sha256(content).digest())
    for offset in (0, 1, frames.CHUNK, len(content) - 1, len(content)):
        assert kitchen.fetch(blob.sha256, offset) == content[offset:]
    kitchen.answer(frames.answer_parts(request.id, content))
    assert site.answered() == (request.id, content)


def test_requests_of_one_device_go_one_at_a_time_and_no_more_than_a_few_wait(site: Site) -> None:
    kitchen = site.device("kitchen")
    stream = kitchen.attend()
    numbers = [site.ask("kitchen", body=bytes([n])) for n in range(WAITING + 1)]
    assert numbers[-1] is None
    assert None not in numbers[:-1]
    for n in range(WAITING):
        request = stream.request()
        assert request.fields["body"] == bytes([n])
        assert stream.requests.empty()
        kitchen.answer(frames.answer_parts(request.id, b"answer"))
    assert site.ask("garage") is None  # nobody there


def test_a_request_whose_time_is_over_is_void(site: Site) -> None:
    kitchen = site.device("kitchen")
    stream = kitchen.attend()
    number = site.ask("kitchen", seconds=0.2)
    request = stream.request()
    assert site.answered() == (number, NoAnswer(None, "did not answer in time"))
    assert status_of(lambda: kitchen.answer(frames.answer_parts(request.id, b"late"))) is StatusCode.FAILED_PRECONDITION


def test_a_device_whose_stream_broke_gets_the_request_again_and_one_that_stays_away_has_no_answer(site: Site) -> None:
    kitchen = site.device("kitchen")
    stream = kitchen.attend()
    number = site.ask("kitchen")
    assert stream.request().id == number
    stream.cancel()
    stream = kitchen.attend()
    assert stream.request().id == number
    kitchen.answer(frames.answer_parts(number or 0, b"answer"))
    assert site.answered() == (number, b"answer")
    number = site.ask("kitchen")
    stream.cancel()
    assert site.answered() == (number, NoAnswer(None, "the device disconnected"))
    assert site.ask("kitchen") is None
    assert site.answers.empty()


def test_a_newer_stream_of_a_device_ends_the_older_one(site: Site) -> None:
    kitchen = site.device("kitchen")
    older = kitchen.attend()
    newer = kitchen.attend()
    assert older.refused()[0] is StatusCode.FAILED_PRECONDITION
    number = site.ask("kitchen")
    assert newer.request().id == number


def test_health_reflection_and_status_are_served_to_a_device(site: Site) -> None:
    kitchen = site.device("kitchen")
    stream = kitchen.attend()
    site.ask("kitchen")
    stream.request()
    asked = health_pb2.HealthCheckRequest(service=frames.SERVICE)
    found = health_pb2_grpc.HealthStub(kitchen.channel).Check(asked, timeout=10)
    assert found.status == health_pb2.HealthCheckResponse.SERVING
    assert frames.SERVICE in ProtoReflectionDescriptorDatabase(kitchen.channel).get_services()
    status = kitchen.status()
    assert (status.devices, status.requests) == (1, 1)


def test_a_port_in_use_or_a_wrong_key_is_refused(site: Site) -> None:
    tls = server_tls(site.authority)
    for address, given in ((f"{HOST}:{site.gateway.port}", tls), (f"{HOST}:0", replace(tls, key=b"no key"))):
        with refused(ConfigError, "--gateway"):
            Gateway(address, given, lambda at: site.authority.root, lambda number, answer: None)


def test_a_revocation_list_that_has_expired_refuses_no_device_for_good(site: Site) -> None:
    def expired(at: datetime) -> Any:
        raise TrustError("the revocation list has expired", about="revocation.expired")

    other = Gateway(f"{HOST}:0", server_tls(site.authority), expired, lambda number, answer: None)
    kitchen = LightDevice(other.port, site.authority, "kitchen")
    assert kitchen.attend().refused()[0] is StatusCode.UNAVAILABLE
    kitchen.close()
    other.close()


# Attacks: who may connect.


def test_wrong_certificate(site: Site) -> None:
    """Without a certificate, or with one of another authority of the same name, nobody gets past the handshake."""
    now = datetime.now(UTC)
    stranger = Authority.create("fleet", SystemEntropy(), now - timedelta(days=1), now + timedelta(days=1))
    forged = LightDevice(site.gateway.port, stranger, "kitchen")
    genuine = site.device("kitchen")
    for key, certificate in ((None, None), (forged.tls_key, forged.tls_certificate)):
        other = channel(site.gateway.port, key, certificate, site.authority)
        call = other.unary_stream(frames.ATTEND)(genuine.hello, timeout=5)
        assert status_of(lambda: list(call)) is StatusCode.UNAVAILABLE  # noqa: B023
        other.close()
    forged.close()
    assert site.gateway.devices() == ()


def test_the_certificate_of_a_gateway_is_no_devices(site: Site) -> None:
    gateway = site.device("kitchen", role=TlsRole.GATEWAY)
    code, _ = gateway.attend().refused()
    assert code in (StatusCode.UNAVAILABLE, StatusCode.PERMISSION_DENIED)
    assert site.gateway.devices() == ()


def test_a_device_that_poses_as_a_gateway_is_refused_by_devices(site: Site) -> None:
    kitchen = site.device("kitchen")
    tls = replace(server_tls(site.authority), key=kitchen.tls_key, certificate=kitchen.tls_certificate)
    impostor = Gateway(f"{HOST}:0", tls, lambda at: site.authority.root, lambda number, answer: None)
    garage = LightDevice(impostor.port, site.authority, "garage")
    assert garage.attend().refused()[0] is StatusCode.UNAVAILABLE
    assert impostor.devices() == ()
    garage.close()
    impostor.close()


def test_another_devices_certificate(site: Site) -> None:
    """A device presents the identity of another one, or a hello that another one sent."""
    kitchen, garage = site.device("kitchen"), site.device("garage")
    borrowed = pb.Hello.FromString(garage.hello)
    borrowed.certificate = kitchen.certificate
    for hello in (kitchen.hello, borrowed.SerializeToString()):
        assert garage.attend(hello).refused()[0] is StatusCode.PERMISSION_DENIED
    assert site.gateway.devices() == ()


def test_a_device_that_is_revoked_is_disconnected_and_not_admitted_again(site: Site) -> None:
    kitchen, garage, now = site.device("kitchen"), site.device("garage"), datetime.now(UTC)
    streams = [kitchen.attend(), garage.attend()]
    number = serial(kitchen.certificate)
    listed = site.authority.revocations(1, {number: Revocation(now)}, now, now + timedelta(days=1))
    site.roots.append(site.authority.root.with_revocations(listed.der))
    time.sleep(1.0)  # a list is read once a second
    assert site.gateway.devices() == ("garage",)
    assert streams[0].refused()[0] is StatusCode.PERMISSION_DENIED
    assert kitchen.attend().refused()[0] is StatusCode.PERMISSION_DENIED
    by_tls = site.authority.revocations(
        2, {serial(to_der(garage.tls_certificate)): Revocation(now)}, now, now + timedelta(1)
    )
    site.roots.append(site.authority.root.with_revocations(by_tls.der))
    time.sleep(1.0)
    assert site.gateway.devices() == ()


# Attacks: what is sent.


def test_oversized(site: Site) -> None:
    """Messages over the limit, answers longer or shorter than they began, and answers over the limit."""
    kitchen = site.device("kitchen")
    stream = kitchen.attend()
    site.ask("kitchen")
    number = stream.request().id
    huge = bytes(frames.MAX_MESSAGE + 1)
    assert status_of(lambda: kitchen.raw(frames.FETCH, "unary_stream", huge)) is StatusCode.RESOURCE_EXHAUSTED
    over = pb.AnswerPart(beginning=pb.Beginning(request=number, size=frames.MAX_ANSWER + 1)).SerializeToString()
    begun = pb.AnswerPart(beginning=pb.Beginning(request=number, size=3)).SerializeToString()
    data = pb.AnswerPart(data=b"four").SerializeToString()
    for parts in ([over], [begun, data], [begun, data[:-2]], [begun], [begun, begun], [data], []):
        assert status_of(lambda: kitchen.answer(parts)) is StatusCode.INVALID_ARGUMENT  # noqa: B023
    assert site.answers.empty()
    kitchen.answer(frames.answer_parts(number, b"answer"))


def test_malformed(site: Site) -> None:
    """Bytes that are no message."""
    kitchen = site.device("kitchen")
    kitchen.attend()
    for method, kind in (
        (frames.ATTEND, "unary_stream"),
        (frames.FETCH, "unary_stream"),
        (frames.ANSWER, "stream_unary"),
    ):
        for junk in (b"", b"\xff", b"\x0a\xff\xff\xff\xff\x0f", bytes(1000)):
            assert status_of(lambda: kitchen.raw(method, kind, junk)) is StatusCode.INVALID_ARGUMENT  # noqa: B023
    unknown = kitchen.channel.unary_unary(f"/{frames.SERVICE}/Nothing")
    assert status_of(lambda: unknown(b"", timeout=10)) is StatusCode.UNIMPLEMENTED
    assert site.gateway.devices() == ("kitchen",)


def test_replayed_call(site: Site) -> None:
    """An answer is sent again, or by another device, or without attending."""
    kitchen, garage = site.device("kitchen"), site.device("garage")
    stream = kitchen.attend()
    number = site.ask("kitchen", body=bytes(frames.INLINE + 1))
    (blob,) = stream.request().blobs.values()
    answer = [*frames.answer_parts(number or 0, b"answer")]
    assert status_of(lambda: garage.answer(answer)) is StatusCode.FAILED_PRECONDITION
    garage.attend()
    assert status_of(lambda: garage.answer(answer)) is StatusCode.FAILED_PRECONDITION
    assert status_of(lambda: garage.fetch(blob.sha256)) is StatusCode.FAILED_PRECONDITION
    kitchen.answer(answer)
    assert status_of(lambda: kitchen.answer(answer)) is StatusCode.FAILED_PRECONDITION
    assert site.answered() == (number, b"answer")
    assert site.answers.empty()


def test_an_answer_of_a_device_that_has_left_meanwhile_is_refused(site_of: Callable[..., Site]) -> None:
    """The gateway closes while the answer is on the way, as when the coordinator's disk is full."""
    site = site_of(replace(LIMITS, transfer=60.0, grace=0.0))
    kitchen = site.device("kitchen")
    stream = kitchen.attend()
    number = site.ask("kitchen")
    assert stream.request().id == number

    def parts() -> Iterator[bytes]:
        beginning, *rest = frames.answer_parts(number or 0, b"answer")
        yield beginning
        stream.cancel()
        wait_until(lambda: not site.answers.empty())
        yield from rest

    assert status_of(lambda: kitchen.answer(parts())) is StatusCode.FAILED_PRECONDITION
    assert site.answered() == (number, NoAnswer(None, "the device disconnected"))


def test_slow_client(site: Site) -> None:
    """A device begins an answer and does not go on. It is cut off, and meanwhile others are served."""
    kitchen, garage = site.device("kitchen"), site.device("garage")
    streams = {"kitchen": kitchen.attend(), "garage": garage.attend()}
    numbers = {name: site.ask(name) for name in streams}
    for stream in streams.values():
        stream.request()
    forever = threading.Event()

    def stalled() -> Iterator[bytes]:
        yield next(frames.answer_parts(numbers["kitchen"] or 0, b"answer"))
        forever.wait(20)

    codes = list[StatusCode]()
    slow = threading.Thread(target=lambda: codes.append(status_of(lambda: kitchen.answer(stalled()))))
    slow.start()
    time.sleep(0.2)
    garage.answer(frames.answer_parts(numbers["garage"] or 0, b"quick"))
    assert site.answered() == (numbers["garage"], b"quick")
    assert not codes
    slow.join(10)
    forever.set()
    assert codes == [StatusCode.DEADLINE_EXCEEDED]


def test_a_device_that_calls_too_often_has_to_wait_and_others_do_not(site_of: Callable[..., Site]) -> None:
    site = site_of(replace(LIMITS, calls=2, seconds=6.0))
    kitchen, garage = site.device("kitchen"), site.device("garage")
    for _ in range(2):
        kitchen.status()
    with pytest.raises(grpc.RpcError) as caught:
        kitchen.status()
    assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED
    after = int(dict(caught.value.trailing_metadata())[frames.RETRY_AFTER])
    assert 0 < after <= 3001
    garage.status()
    time.sleep(after / 1000)
    kitchen.status()


def window_of(attendance: Attendance) -> frames.RetryWindow:
    """With which window a device is sent away, by an error that permits another try."""
    assert attendance.refused()[0] is StatusCode.RESOURCE_EXHAUSTED
    window = frames.retry_window(attendance.call.trailing_metadata())
    assert window is not None
    return window


def test_a_device_that_was_sent_away_and_comes_back_too_early_gets_the_rest_of_its_window(
    site_of: Callable[..., Site],
) -> None:
    site = site_of(replace(LIMITS, devices=1, rejected=3600.0))
    site.device("kitchen").attend()
    garage, hall = site.device("garage"), site.device("hall")
    first = window_of(garage.attend())
    assert 3500 < first.earliest <= 3600.001
    assert first.latest - first.earliest == pytest.approx(3600, abs=0.002)
    early = window_of(garage.attend())
    assert early.earliest < first.earliest
    assert window_of(hall.attend()).earliest > early.earliest  # another device has a later one


def test_check_ins_above_the_target_are_sent_away_with_windows_of_their_own(site_of: Callable[..., Site]) -> None:
    site = site_of(replace(LIMITS, check_ins=0.1, rejected=1.0))  # one in ten minutes
    site.device("kitchen").attend()
    windows = [window_of(site.device(name).attend()) for name in ("garage", "hall")]
    assert 0 < windows[0].earliest <= 1.001
    assert windows[1].earliest - windows[0].earliest > 1000  # half of the target is for these


def test_a_device_that_is_there_reconnects_at_once_whatever_the_pace(site_of: Callable[..., Site]) -> None:
    site = site_of(replace(LIMITS, check_ins=0.1, grace=60.0))
    kitchen = site.device("kitchen")
    kitchen.attend().cancel()
    kitchen.attend()
    assert site.gateway.devices() == ("kitchen",)


def test_a_gateway_that_closes_tells_its_devices_when_to_come_back(site_of: Callable[..., Site]) -> None:
    site = site_of(replace(LIMITS, check_ins=60.0, accepted=5.0))
    streams = [site.device(name).attend() for name in ("kitchen",)]
    site.gateway.close()
    (stream,) = streams
    assert stream.call.code() is StatusCode.OK
    window = frames.retry_window(stream.call.trailing_metadata())
    assert window == frames.RetryWindow(5.0, 10.0)


@pytest.mark.parametrize(
    ("version", "code"),
    [
        ("0.9.9", StatusCode.FAILED_PRECONDITION),
        ("1.2.0.dev3", StatusCode.FAILED_PRECONDITION),
        ("1.2", None),
        ("1.10.0", None),
        ("newest", StatusCode.INVALID_ARGUMENT),
        ("", StatusCode.INVALID_ARGUMENT),
        ("1" * 65, StatusCode.INVALID_ARGUMENT),
    ],
)
def test_a_device_of_an_older_version_is_refused_with_the_version_that_it_needs(
    site_of: Callable[..., Site], version: str, code: StatusCode | None
) -> None:
    site = site_of(replace(LIMITS, client_version="1.2"))
    attendance = site.device("kitchen", version=version).attend()
    if code is None:
        assert site.gateway.devices() == ("kitchen",)
    else:
        found, reason = attendance.refused()
        assert found is code
        assert "1.2" in reason or code is StatusCode.INVALID_ARGUMENT


def test_answers_over_the_memory_of_the_gateway_come_later(site_of: Callable[..., Site]) -> None:
    site = site_of(replace(LIMITS, uploading=100))
    kitchen = site.device("kitchen")
    stream = kitchen.attend()
    number = site.ask("kitchen")
    stream.request()
    many = [*frames.answer_parts(number or 0, bytes(101))]
    assert status_of(lambda: kitchen.answer(many)) is StatusCode.RESOURCE_EXHAUSTED
    kitchen.answer(frames.answer_parts(number or 0, bytes(100)))


def test_a_device_that_announces_many_answers_uses_up_no_memory_of_others(site_of: Callable[..., Site]) -> None:
    site = site_of(replace(LIMITS, uploading=150, transfer=60.0))
    kitchen, garage = site.device("kitchen"), site.device("garage")
    streams = {"kitchen": kitchen.attend(), "garage": garage.attend()}
    numbers = {name: site.ask(name) or 0 for name in streams}
    for stream in streams.values():
        stream.request()
    begun = pb.AnswerPart(beginning=pb.Beginning(request=numbers["kitchen"], size=100)).SerializeToString()
    codes, go_on = queue.Queue[StatusCode](), threading.Event()

    def stalled() -> Iterator[bytes]:
        yield begun
        go_on.wait(20)

    calls = [threading.Thread(target=lambda: codes.put(status_of(lambda: kitchen.answer(stalled())))) for _ in range(3)]
    for call in calls:
        call.start()
    found = [codes.get(timeout=10) for _ in calls[1:]]  # the older ones are out of time
    assert found == [StatusCode.DEADLINE_EXCEEDED] * 2
    garage.answer(frames.answer_parts(numbers["garage"], bytes(50)))
    kitchen.answer(frames.answer_parts(numbers["kitchen"], bytes(100)))
    go_on.set()
    assert codes.get(timeout=10) in (StatusCode.DEADLINE_EXCEEDED, StatusCode.FAILED_PRECONDITION)
    for call in calls:
        call.join(10)


def test_a_full_gateway_admits_who_is_there_already(site_of: Callable[..., Site]) -> None:
    site = site_of(replace(LIMITS, devices=1, rejected=0.001))
    kitchen, garage = site.device("kitchen"), site.device("garage")
    stream = kitchen.attend()
    assert garage.attend().refused()[0] is StatusCode.RESOURCE_EXHAUSTED
    stream.cancel()
    kitchen.attend().cancel()
    wait_until(lambda: kitchen.status().devices == 0)
    garage.attend()
    assert site.gateway.devices() == ("garage",)
