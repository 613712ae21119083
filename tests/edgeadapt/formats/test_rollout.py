"""The flag definition of a rollout: one form, and nothing else is read."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import ConfigError, TrustError
from edgeadapt.formats.rollout import MAX_FLAGS, Rollout, check_language, murmur3
from tests.support import refused

CODES = st.text("abcdefghijklmnopqrstuvwxyz", min_size=2, max_size=3)
ROLLOUTS = st.builds(
    Rollout,
    release=st.integers(0, 2**63 - 1),
    previous=st.integers(0, 2**63 - 1),
    share=st.integers(0, 100),
    languages=st.lists(CODES, max_size=100, unique=True).map(tuple),
)


@given(ROLLOUTS)
def test_what_is_written_is_read(rollout: Rollout) -> None:
    raw = rollout.encode()
    assert Rollout.decode(raw) == rollout
    assert len(raw) < MAX_FLAGS


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(raw: bytes) -> None:
    with refused(TrustError, "flags.json"):
        Rollout.decode(raw)


def changed(path: str, value: object) -> bytes:
    """A good definition with one other value."""
    document: Any = json.loads(Rollout(2, 1, 10, ("de",)).encode())
    place = document["flags"]["release-2"]
    *keys, last = path.split(".")
    for key in keys:
        place = place[int(key) if isinstance(place, list) else key]
    place[int(last) if isinstance(place, list) else last] = value
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("state", "DISABLED"),
        ("variants.newest", -1),
        ("variants.other", 3),
        ("targeting.if.1.fractional.0.1", 101),
        ("targeting.if.2", "newest"),
        ("targeting.if.0.in.1", ["de-AT"]),
        ("targeting.if.0.in.1", ["de"] * 101),
        ("targeting", {"fractional": []}),
        ("targeting", None),
    ],
)
def test_another_definition_is_refused(path: str, value: object) -> None:
    with refused(TrustError, "flags.json"):
        Rollout.decode(changed(path, value))


def test_a_truncated_definition_is_refused() -> None:
    raw = Rollout(2, 1, 10, ("de",)).encode()
    for end in range(len(raw)):
        with refused(TrustError, "flags.json"):
            Rollout.decode(raw[:end])


@pytest.mark.parametrize("code", ["", "d", "DE", "deut", "de-AT", "d3", "de\n"])
def test_what_is_no_language(code: str) -> None:
    with refused(ConfigError, "language"):
        check_language(code)


@pytest.mark.parametrize(
    ("release", "key", "part"),
    [  # of openfeature-flagd-core 2.0
        (2, "d98d70924ee7056ad79057eac5b6b4b4", 41),
        (3, "2cc5122d216268c31bf323d2c820aebb", 74),
        (1000, "046683030c70392f26c7e7737bcaeec8", 43),
        (2, "bb6a7d0aa52ba096a1c18721cd9789c1", 84),
        (3, "fb2c9cbbb6b7cebf504dd39a72efebb8", 37),
        (12, "4fd0471c8977ada99acc4ebb8ebbb94a", 44),
    ],
)
def test_a_device_is_in_the_part_that_flagd_puts_it_into(release: int, key: str, part: int) -> None:
    assert Rollout(release, 1, part).release_for(key, None) == 1
    assert Rollout(release, 1, part + 1).release_for(key, None) == release


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"", 0), (b"a", 0x3C2569B2), (b"hello", 0x248BFA47), (b"hello, world", 0x149BBB7F)],  # published by smhasher
)
def test_the_hash_is_murmur3(data: bytes, expected: int) -> None:
    assert murmur3(data) == expected
