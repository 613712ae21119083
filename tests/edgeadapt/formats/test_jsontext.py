"""JSON is written one way, and read only if every reader reads the same."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, ProtocolError, TrustError
from aggregation.pki.identity import IdentityKey
from aggregation.steps import Step
from edgeadapt.formats import jsontext
from edgeadapt.formats.gateway import messages
from edgeadapt.formats.keyfiles import make_key, read_key, read_public_keys
from edgeadapt.formats.phrases import encode_phrases, parse_phrases
from tests.support import refused

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), children, max_size=3)
    ),
    max_leaves=8,
)


@given(values)
def test_what_is_written_reads_back(value: Any) -> None:
    assert jsontext.decode(jsontext.encode(value)) == value


def test_equal_objects_have_the_same_bytes_whatever_the_order_of_their_keys() -> None:
    assert jsontext.encode({"b": 1, "a": {"d": 2, "c": 3}}) == jsontext.encode({"a": {"c": 3, "d": 2}, "b": 1})


@given(values)
def test_another_spelling_of_a_value_is_the_same_value(value: Any) -> None:
    assert jsontext.decode(json.dumps(value, indent=2).encode()) == value


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"a": 1} x',
        b'{"a": 1, "a": 1}',
        b'{"a": 1, "\\u0061": 1}',
        b'[{"b": {"a": 1, "a": 2}}]',
        b"NaN",
        b"-Infinity",
        b"[1e999]",
        b'"\xff"',
        '{"a": 1}'.encode("utf-16"),
        b"\xef\xbb\xbf{}",
        b'["\\ud800"]',
        b'{"\\uDC00\\ud800": 1}',
        b"[" * 17 + b"]" * 17,
        b'{"a":' * 17 + b"1" + b"}" * 17,
        b"[" * 200_000,
    ],
)
def test_what_two_readers_could_read_differently_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        jsontext.decode(raw)


def test_a_pair_of_surrogates_is_one_character() -> None:
    assert jsontext.decode(b'"\\ud83d\\ude00"') == "\U0001f600"


def test_sixteen_levels_are_read() -> None:
    assert jsontext.decode(b"[" * 16 + b"]" * 16)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), b"bytes", {1, 2}, "\ud800"], ids=repr)
def test_what_json_has_no_form_for_is_not_written(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        jsontext.encode({"value": value})


# Phrases


TEXT = st.text(min_size=1).filter(lambda text: text.split() and text.isprintable())


@given(st.lists(st.tuples(TEXT, TEXT)))
def test_phrases_are_read_as_they_were_written_apart_from_white_space(pairs: list[tuple[str, str]]) -> None:
    written = [(" ".join(label.split()), " ".join(phrase.split())) for label, phrase in pairs]
    assert parse_phrases(encode_phrases(pairs), Path("phrases.tsv")) == written


def test_a_text_of_several_lines_becomes_one() -> None:
    text = "Subject: a\tb\r\n\r\n c\u2028d\x1ce"
    assert encode_phrases([("alt.atheism", text)]) == b"alt.atheism\tSubject: a b c d e\n"


def test_content_above_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeadapt.formats.phrases.LONGEST_LIST", 9)
    assert parse_phrases(b"on\tlights", Path("phrases.tsv")) == [("on", "lights")]
    with refused(DataError, "phrases.tsv", value=10):
        parse_phrases(b"on\tlights!", Path("phrases.tsv"))


# The messages of a conversation: any bytes are a message within the limits, or one error.
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


# Keys in files: made once, for their owner only, and read strictly.
def test_a_new_key_is_for_its_owner_only_and_its_public_half_for_everyone(tmp_path: Path) -> None:
    key, public = make_key(tmp_path / "new" / "vendor.pem", SystemEntropy())
    assert public == tmp_path / "new" / "vendor.pub.pem"
    modes = {path.name: path.stat().st_mode & 0o777 for path in public.parent.iterdir()}
    assert modes == {"vendor.pem": 0o600, "vendor.pub.pem": 0o644}
    assert read_key(tmp_path / "new" / "vendor.pem") == key
    assert read_public_keys(public) == (key.public,)


@pytest.mark.parametrize("existing", ["vendor.pem", "vendor.pub.pem"])
def test_a_key_is_never_replaced(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_bytes(b"old")
    with refused(ConfigError, existing):
        make_key(tmp_path / "vendor.pem", SystemEntropy())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {existing: b"old"}


@pytest.mark.parametrize("full", ["vendor.pem", "vendor.pub.pem"])
def test_a_full_disk_leaves_no_key_and_the_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    def sync(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").resolve().name == full:
            raise OSError(28, "No space left on device")  # as a write does, which has no name

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match=rf"No space left.*/{full}"):
        make_key(tmp_path / "vendor.pem", SystemEntropy())
    assert list(tmp_path.iterdir()) == []


def test_a_missing_key_is_named_with_the_remedy(tmp_path: Path) -> None:
    with refused(ConfigError, "vendor.pem") as caught:
        read_key(tmp_path / "vendor.pem")
    assert "edgeadapt bundle key" in str(caught.value)
    with refused(ConfigError, "trust.pem") as caught:
        read_public_keys(tmp_path / "trust.pem")
    assert "--trust" in str(caught.value)


def test_several_public_keys_are_read_in_order(tmp_path: Path) -> None:
    keys = [IdentityKey.generate(SystemEntropy()).public for _ in range(3)]
    (tmp_path / "trust.pem").write_bytes(b"\n".join(key.to_pem() for key in keys) + b"\n")
    assert read_public_keys(tmp_path / "trust.pem") == tuple(keys)


def test_a_damaged_and_a_private_key_are_refused_with_the_files_name(tmp_path: Path) -> None:
    path, key = tmp_path / "trust.pem", IdentityKey.generate(SystemEntropy())
    for raw in (key.to_pem(), b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"):
        path.write_bytes(raw)
        with pytest.raises(TrustError) as caught:
            read_public_keys(path)
        assert str(path) in str(caught.value)
    path.write_bytes(key.public.to_pem())
    with pytest.raises(TrustError) as caught:
        read_key(path)
    assert str(path) in str(caught.value)


def test_a_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "trust.pem").write_bytes(bytes(2**16 + 1))
    with refused(DataError, "trust.pem"):
        read_public_keys(tmp_path / "trust.pem")
