"""The lines that users see name the peer or file, the refused value, and the remedy."""

import datetime as dt
from typing import Any

import pytest

from aggregation.errors import ConfigError, EdgeAdaptError, ProtocolError, TrustError, of_file
from aggregation.pki import Authority
from aggregation.policy import Policy
from aggregation.vector import Segment, VectorSpec


def test_a_protocol_error_begins_with_the_peer_and_keeps_the_subject() -> None:
    error = ProtocolError.of(ConfigError("rounds 0 is not between 1 and 9", about="spec.rounds", value=0), "kitchen")
    assert str(error) == "kitchen: rounds 0 is not between 1 and 9"
    assert (error.peer, error.about, error.value) == ("kitchen", "spec.rounds", 0)


def test_an_error_about_a_files_content_begins_with_the_file() -> None:
    with pytest.raises(TrustError) as caught, of_file("base.onnx"):
        raise TrustError("not a base", about="base.digest", value="ab")
    assert (str(caught.value), caught.value.about, caught.value.value) == ("base.onnx: not a base", "base.digest", "ab")


def test_lines_name_the_value_and_the_remedy(spec_of: Any, entropy: Any) -> None:
    begin, day = dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.timedelta(days=1)
    authority = Authority.create("fleet", entropy, begin, begin + 90 * day)
    listed = authority.revocations(3, {}, begin, begin + 30 * day)
    base = "0" * 64

    def ring_too_small() -> None:
        VectorSpec((Segment("x", 1, 1.0),), ring_bits=6, max_clients=32)

    cases = {
        "coordinator: offer refused: cohort of 5 is below this device's minimum of 8": lambda: Policy().check(
            spec_of(5), 5
        ),
        "coordinator: offer refused: base 000000000000 is not on this device": (
            lambda: Policy().check(spec_of(8, base_digest=base), 8)
        ),
        "revocation list 3 was valid until 2026-01-31 00:00: get a newer one": (
            lambda: listed.require_fresh(begin + 31 * day)
        ),
        "a ring of 6 bits cannot hold a sum of 32 clients: use more bits": ring_too_small,
    }
    for line, call in cases.items():
        with pytest.raises(EdgeAdaptError) as caught:
            call()
        assert str(caught.value) == line
