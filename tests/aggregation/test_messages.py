"""Messages and their envelope: one encoding, one purpose, one signer."""

import dataclasses
import hashlib
from typing import Any

import pytest

from aggregation import envelope, wire
from aggregation.errors import ConfigError, ProtocolError
from aggregation.messages import (
    MESSAGES,
    Advert,
    Assignment,
    Challenge,
    CheckIn,
    ConsistencySignature,
    EncryptedShares,
    MaskedInput,
    Message,
    Offer,
    Plan,
    Roster,
    Shares,
    Survivors,
    Unmask,
    UnmaskResponse,
)
from aggregation.pki.identity import IdentityKey
from tests.support import refused

D = hashlib.sha256(b"digest").digest()
KEY = IdentityKey(bytes(range(32)))
ENCRYPTED_SHARES = {"a": EncryptedShares(b"sealed", (bytes(16),)), "b": EncryptedShares(b"", ())}
PLAN = Plan(D, 3, ("a", "b"), 7, D.hex(), b"settings")
SURVIVORS = Survivors(D, {"a": D, "b": bytes(32)})


@pytest.fixture
def samples(spec_of: Any) -> list[Message]:
    return [
        Challenge(D, 2**64 - 1),
        CheckIn(D, b"der", D),
        Offer(D, spec_of(4), (b"der", b"")),
        Advert(D, "a", D, (D, D), (D,)),
        Roster(D, (b"advert",)),
        Shares(D, "a", ENCRYPTED_SHARES),
        PLAN,
        Assignment(PLAN, ENCRYPTED_SHARES),
        MaskedInput(D, "a", D),
        SURVIVORS,
        ConsistencySignature(D, "a"),
        Unmask(SURVIVORS, {"a": bytes(64)}),
        UnmaskResponse(D, "a", {"b": bytes(33)}, {}),
    ]


def test_there_is_a_sample_of_every_message(samples: list[Message]) -> None:
    assert tuple(map(type, samples)) == MESSAGES


def test_messages_come_back_from_their_bytes(samples: list[Message]) -> None:
    for message in samples:
        assert type(message).decode(message.encode()) == message


def test_every_field_of_a_message_travels(samples: list[Message]) -> None:
    for message in samples:
        assert list(wire.annotated(type(message))) == [field.name for field in dataclasses.fields(message)]


def test_signed_messages_come_back_from_their_envelope(samples: list[Message]) -> None:
    for message in samples:
        assert envelope.open_verified(type(message), envelope.sign(KEY, message), KEY.public, "peer") == message


def test_no_message_passes_for_another(samples: list[Message]) -> None:
    for message in samples:
        raw = envelope.sign(KEY, message)
        for kind in MESSAGES:
            if kind is not type(message):
                with refused(ProtocolError, "envelope.tag", peer="peer"):
                    envelope.open_verified(kind, raw, KEY.public, "peer")


def test_a_body_signed_for_one_purpose_is_not_valid_for_another() -> None:
    body = ConsistencySignature(D, "a").encode()
    moved = envelope.Envelope(b"EA", 1, "consistency-signature", body, KEY.sign("advert", body))
    with refused(ProtocolError, "signature", peer="peer", value="consistency-signature"):
        envelope.open_verified(ConsistencySignature, envelope.ENVELOPE.encode(moved), KEY.public, "peer")


@pytest.mark.parametrize(("field", "value"), [("version", 2), ("magic", b"EB")])
def test_another_version_is_refused(field: str, value: Any) -> None:
    genuine = envelope.ENVELOPE.decode(envelope.sign(KEY, ConsistencySignature(D, "a")))
    other = envelope.ENVELOPE.encode(dataclasses.replace(genuine, **{field: value}))
    with refused(ProtocolError, "envelope.version", peer="peer"):
        envelope.open_verified(ConsistencySignature, other, KEY.public, "peer")


def test_a_message_over_its_limit_is_refused_by_size() -> None:
    with refused(ProtocolError, "envelope.size", peer="peer", value=1153):
        envelope.open_verified(
            ConsistencySignature, bytes(ConsistencySignature.LIMIT + envelope.OVERHEAD + 1), KEY.public, "peer"
        )


def test_the_error_names_the_peer() -> None:
    with refused(ProtocolError, "encoding.length", peer="kitchen", value=2) as caught:
        envelope.open_verified(ConsistencySignature, b"", KEY.public, "kitchen")
    assert str(caught.value) == "kitchen: message is truncated: 2 bytes expected, 0 left"


def test_digests_of_different_messages_differ_even_where_their_bytes_agree() -> None:
    same = MaskedInput(D, "a", D)
    assert same.digest() == hashlib.sha256(b"masked-input\x00" + same.encode()).digest()
    assert same.digest() != hashlib.sha256(same.encode()).digest()


def test_a_vector_comes_back_with_its_header_and_no_copy() -> None:
    packed = bytes(range(100))
    raw = envelope.sign_vector(KEY, MaskedInput(D, "a", hashlib.sha256(packed).digest()), packed)
    header, vector = envelope.open_vector(raw, 100, KEY.public, "peer")
    long = raw[:100] + bytes(5000) + (5000).to_bytes(4, "big")
    with refused(ProtocolError, "masked-input.size", value=len(long)):  # before it is copied
        envelope.open_vector(long, 100, KEY.public, "peer")
    for size in (99, 101):
        with refused(ProtocolError, "masked-input.size", peer="peer", value=254):
            envelope.open_vector(raw, size, KEY.public, "peer")
    assert header.device == "a"
    assert vector == packed
    assert vector.obj is raw


def test_a_vector_other_than_the_signed_one_is_refused() -> None:
    raw = envelope.sign_vector(KEY, MaskedInput(D, "a", D), bytes(10))
    with refused(ProtocolError, "masked-input.vector", peer="peer"):
        envelope.open_vector(raw, 10, KEY.public, "peer")


def test_a_plan_over_its_limits_is_not_written() -> None:
    with refused(ConfigError, "encoding.limit", value=1048577):
        dataclasses.replace(PLAN, training=bytes(2**20 + 1)).encode()


def test_no_share_is_in_a_repr_of_what_holds_it() -> None:
    from aggregation.sharing import Secrets, SharePair

    assert repr(SharePair(b"s" * 33, b"k" * 33)) == "SharePair()"
    assert repr(Secrets(b"s" * 32, b"k" * 32)) == "Secrets()"
