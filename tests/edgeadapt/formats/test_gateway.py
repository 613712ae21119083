"""The messages of a conversation: any bytes are a message within the limits, or one error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import ConfigError, ProtocolError
from aggregation.steps import Step
from edgeadapt.formats.gateway import messages


@given(st.floats(0, messages.LONGEST_WAIT), st.floats(0, 3600))
def test_a_window_is_read_as_it_is_written_and_is_at_most_a_day(earliest: float, length: float) -> None:
    found = messages.retry_window(messages.RetryWindow(earliest, earliest + length).metadata())
    assert found is not None
    assert found.earliest == pytest.approx(earliest, abs=1e-3)
    assert found.latest == pytest.approx(min(earliest + length, messages.LONGEST_WAIT), abs=1e-3)


@pytest.mark.parametrize("text", ["", "1", "2-1", "-1-2", "1-", "a-b", "1-2-3", "1 - 2", "9" * 10 + "-1", b"1-2"])
def test_what_is_not_a_window_gives_nothing(text: str | bytes) -> None:
    assert messages.retry_window(((messages.RETRY_WINDOW, text),)) is None
    assert messages.retry_window(None) is None


@given(
    st.sampled_from([*Step]),
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,32}", fullmatch=True),
        st.sampled_from([0, 1, messages.INLINE, messages.INLINE + 1, messages.CHUNK + 1]).map(bytes),
        min_size=1,
        max_size=8,
    ),
)
def test_a_request_has_the_fields_that_were_put_in(step: Step, fields: dict[str, bytes]) -> None:
    first, *parts = messages.request_messages(1, step.value, fields)
    found = messages.REQUEST.decode(first)
    assert {name: len(fields[name]) for name in found.blobs} == found.blobs
    assert {**found.fields, **{name: fields[name] for name in found.blobs}} == fields
    assert b"".join(parts) == b"".join(fields[name] for name in sorted(found.blobs))
    assert all(0 < len(part) <= messages.CHUNK for part in parts)


@given(st.integers(1, 2 * messages.CHUNK + 3))
def test_an_answer_has_the_bytes_that_were_put_in_and_no_others(size: int) -> None:
    first, *parts = messages.answer_messages(3, bytes(size))
    reader = messages.PartReader(messages.ANSWER.decode(first).size)
    for part in parts:
        reader.add(part)
    assert (reader.left, len(reader.body)) == (0, size)
    for wrong in (b"", b"x"):
        with pytest.raises(ProtocolError):
            reader.add(wrong)


def test_a_long_reason_is_cut_where_a_character_ends() -> None:
    raw = messages.reason_message(3, 100, "é" * messages.MAX_REASON)
    assert messages.ANSWER.decode(raw).reason.decode() == "é" * (messages.MAX_REASON // 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"id": 0},
        {"step": "other"},
        {"fields": {}},
        {"fields": {"body": b""}, "blobs": {"body": 9}},
        {"fields": {f"field_{chr(97 + n)}": b"" for n in range(messages.MAX_FIELDS + 1)}},
    ],
    ids=str,
)
def test_a_request_outside_its_limits_is_not_made(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        messages.DeviceRequest(**{"id": 1, "step": "plan", "fields": {"body": b""}, **changes})  # type: ignore[arg-type]


def test_a_node_is_a_positive_number_of_63_bits_and_the_same_in_any_case() -> None:
    nodes = {messages.node_of(f"device-{n}") for n in range(1000)}
    assert len(nodes) == 1000
    assert all(0 < node < 2**63 for node in nodes)
    assert messages.node_of("Kitchen") == messages.node_of("kitchen")
