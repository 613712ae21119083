"""The gateway's format: what is written is read, and anything else raises one error."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.gateway import frames, websocket
from adapters.gateway import gateway_pb2 as pb
from aggregation.errors import ProtocolError
from aggregation.steps import Step

READERS = (
    frames.hello,
    frames.request,
    frames.byte_range,
    frames.chunk,
    frames.beginning,
    frames.answer_data,
    frames.enrol_request,
    frames.renew_request,
    frames.enrolled,
    websocket.CHALLENGE.decode,
    websocket.HELLO.decode,
    websocket.REQUEST.decode,
    websocket.ANSWER.decode,
)
VALID = (
    pb.Hello(certificate=b"c" * 300, binding=bytes(64), version="1.2").SerializeToString(),
    frames.request_message(7, "plan", {"body": b"b", "adapter": b"a" * 9}, {"adapter": bytes(32)}),
    pb.Range(sha256=bytes(32), offset=5).SerializeToString(),
    next(frames.chunks(b"content", 2)),
    *frames.answer_parts(7, b"answer"),
    *frames.reason_parts(7, 100, "a reason"),
    pb.EnrolRequest(token=b"t", request=b"r", tls_request=b"q").SerializeToString(),
    pb.Enrolled(certificate=b"c", tls_certificate=b"t").SerializeToString(),
    websocket.CHALLENGE.encode(websocket.SocketChallenge(bytes(32))),
    websocket.HELLO.encode(websocket.SocketHello(b"c" * 300, bytes(64), "1.2")),
    websocket.REQUEST.encode(websocket.SocketRequest(7, "plan", {"adapter": b"a" * 9, "body": b"b"})),
    *websocket.answer_messages(7, b"answer"),
    websocket.ANSWER.encode(websocket.SocketAnswer(7, 0, 100, b"a reason")),
)


@given(st.floats(0, frames.LONGEST_WAIT), st.floats(0, 3600))
def test_a_window_is_read_as_it_is_written_and_is_at_most_a_day(earliest: float, length: float) -> None:
    written = frames.RetryWindow(earliest, earliest + length)
    found = frames.retry_window(written.metadata())
    assert found is not None
    assert found.earliest == pytest.approx(earliest, abs=1e-3)
    assert found.latest == pytest.approx(min(earliest + length, frames.LONGEST_WAIT), abs=1e-3)


@pytest.mark.parametrize("text", ["", "1", "2-1", "-1-2", "1-", "a-b", "1-2-3", "1 - 2", "9" * 10 + "-1", "1.5-2"])
def test_what_is_not_a_window_gives_nothing(text: str) -> None:
    assert frames.retry_window(((frames.RETRY_WINDOW, text),)) is None
    assert frames.retry_window(None) is None
    assert frames.retry_window(((frames.RETRY_WINDOW, b"1-2"),)) is None


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_within_the_limits_or_raise_one_error(raw: bytes) -> None:
    for read in READERS:
        try:
            read(raw)
        except ProtocolError:
            continue


@given(st.sampled_from(VALID), st.data())
def test_a_damaged_message_is_read_or_raises_one_error(raw: bytes, data: st.DataObject) -> None:
    at, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(raw)
    flipped[at] ^= 1 << bit
    for damaged in (bytes(flipped), raw[:at], raw + raw[:at]):
        for read in READERS:
            try:
                read(damaged)
            except ProtocolError:
                continue


@given(
    st.sampled_from([*Step]),
    st.dictionaries(
        st.text(st.characters(codec="ascii"), min_size=1, max_size=32), st.binary(max_size=20), min_size=1, max_size=8
    ),
    st.data(),
)
def test_a_request_has_the_fields_that_were_put_in(step: Step, fields: dict[str, bytes], data: st.DataObject) -> None:
    long = data.draw(st.sets(st.sampled_from(sorted(fields))))
    found = frames.request(frames.request_message(1, step.value, fields, dict.fromkeys(long, bytes(32))))
    assert {**found.fields, **{name: fields[name] for name in found.blobs}} == fields
    assert {name: blob.size for name, blob in found.blobs.items()} == {name: len(fields[name]) for name in long}


@given(st.binary(min_size=1, max_size=2 * frames.CHUNK + 3).filter(bool), st.integers(0, frames.CHUNK))
def test_an_answer_and_a_blob_have_the_bytes_that_were_put_in(body: bytes, offset: int) -> None:
    first, *rest = frames.answer_parts(3, body)
    assert frames.beginning(first).size == len(body)
    assert b"".join(map(frames.answer_data, rest)) == body
    assert b"".join(map(frames.chunk, frames.chunks(body, offset))) == body[offset:]


def test_a_long_reason_is_cut_where_a_character_ends() -> None:
    (raw,) = frames.reason_parts(3, 100, "é" * frames.MAX_REASON)
    assert frames.beginning(raw).reason.text == "é" * (frames.MAX_REASON // 2)


@pytest.mark.parametrize(
    "message",
    [
        pb.Request(id=0, step="plan", fields={"body": b""}),
        pb.Request(id=1, step="other", fields={"body": b""}),
        pb.Request(id=1, step="plan"),
        pb.Request(id=1, step="plan", fields={"": b""}),
        pb.Request(id=1, step="plan", fields={"body": b""}, blobs={"body": pb.Blob(sha256=bytes(32))}),
        pb.Request(id=1, step="plan", fields={str(n): b"" for n in range(frames.MAX_FIELDS + 1)}),
        pb.Request(id=1, step="plan", blobs={"body": pb.Blob(sha256=bytes(31))}),
        pb.Request(id=1, step="plan", blobs={"body": pb.Blob(sha256=bytes(32), size=frames.MAX_BLOB + 1)}),
    ],
)
def test_a_request_outside_its_limits_is_refused_by_a_device(message: pb.Request) -> None:
    with pytest.raises(ProtocolError):
        frames.request(message.SerializeToString())


def test_a_node_is_a_positive_number_of_63_bits_and_the_same_in_any_case() -> None:
    nodes = {frames.node_of(f"device-{n}") for n in range(1000)}
    assert len(nodes) == 1000
    assert all(0 < node < 2**63 for node in nodes)
    assert frames.node_of("Kitchen") == frames.node_of("kitchen")


def test_the_generated_code_is_that_of_the_proto(tmp_path: Path) -> None:
    from grpc_tools import protoc

    root, module = Path(frames.__file__).parents[2], Path("adapters/gateway/gateway_pb2.py")
    assert (
        protoc.main(["protoc", f"-I{root}", f"--python_out={tmp_path}", str(root / "adapters/gateway/gateway.proto")])
        == 0
    )
    made, kept = ((folder / module).read_text().partition("DESCRIPTOR = ")[2] for folder in (tmp_path, root))
    assert made == kept, "run make proto"
