"""Steps 1 to 4: what a session is, who is in it, and the boxes in which they share their secrets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from aggregation import wire
from aggregation.messages.base import DEVICES, DIGESTS, HEX, MAX_COHORT, MIB, U32, Message
from aggregation.pki import MAX_CERTIFICATE
from aggregation.shamir import SHARE
from aggregation.spec import MAX_ROUNDS, Adversary, SessionSpec
from aggregation.vector import MAX_SEGMENTS, Segment, VectorSpec
from aggregation.wire import Codec

SHARE_DIGEST = 16  # bytes: who would pass a wrong share for a given one must find a second preimage
AEAD_TAG = 16  # bytes
PAIR = 2 * SHARE  # bytes: what a holder gets for one round of one dealer
_KEYS = wire.sequence(wire.fixed(32), MAX_ROUNDS)

SEGMENT: Codec[Segment] = wire.record(
    Segment, {"name": wire.text(r"[A-Za-z0-9_./-]{1,128}"), "size": U32, "bound": wire.real}
)
VECTOR_SPEC: Codec[VectorSpec] = wire.record(
    VectorSpec,
    {"segments": wire.sequence(SEGMENT, MAX_SEGMENTS), "ring_bits": wire.uint(8), "max_clients": U32},
)
SESSION_SPEC: Codec[SessionSpec] = wire.record(
    SessionSpec,
    {
        "rounds": U32,
        "threshold": U32,
        "minimum_survivors": U32,
        "degree": U32,
        "vector": VECTOR_SPEC,
        "clip_norm": wire.real,
        "weight_cap": wire.uint(64),
        "privacy": wire.text(r"[a-z-]{1,32}"),
        "base_digest": HEX,
        "layout_digest": HEX,
        "adversary": wire.choice(Adversary),
    },
)


@dataclass(frozen=True, slots=True)
class Offer(Message):
    """Coordinator → devices: a session to join. ``session`` is 32 fresh bytes; certificates in order of device id."""

    TAG: ClassVar = "offer"
    LIMIT: ClassVar = 32 * MIB
    FIELDS: ClassVar = {
        "session": DIGESTS,
        "spec": SESSION_SPEC,
        "certificates": wire.sequence(wire.blob(MAX_CERTIFICATE), MAX_COHORT),
    }
    session: bytes
    spec: SessionSpec
    certificates: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Advert(Message):
    """Device → coordinator: its X25519 keys. One mask key and one commitment to the self-mask seed for each round."""

    TAG: ClassVar = "advert"
    LIMIT: ClassVar = MIB
    FIELDS: ClassVar = {
        "offer": DIGESTS,
        "device": DEVICES,
        "share_key": wire.fixed(32),
        "mask_keys": _KEYS,
        "commitments": _KEYS,
    }
    offer: bytes
    device: str
    share_key: bytes
    mask_keys: tuple[bytes, ...]
    commitments: tuple[bytes, ...]

    @property
    def keys(self) -> frozenset[bytes]:
        """All of them, the box key too."""
        return frozenset((self.share_key, *self.mask_keys))


@dataclass(frozen=True, slots=True)
class Roster(Message):
    """Coordinator → devices: every advert, as its device signed it, in order of device id."""

    TAG: ClassVar = "roster"
    LIMIT: ClassVar = 256 * MIB
    FIELDS: ClassVar = {"offer": DIGESTS, "adverts": wire.sequence(wire.blob(Advert.LIMIT), MAX_COHORT)}
    offer: bytes
    adverts: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class EncryptedShares:
    """Shares from one dealer for one holder: sealed, with a digest of each so that a wrong one has an author.

    ``sealed`` holds, round by round, a share of the self-mask seed and one of the mask key; ``digests`` are of
    these shares in the same order.
    """

    sealed: bytes
    digests: tuple[bytes, ...]


ENCRYPTED_SHARES: Codec[Mapping[str, EncryptedShares]] = wire.mapping(
    DEVICES,
    wire.record(
        EncryptedShares,
        {
            "sealed": wire.blob(MAX_ROUNDS * PAIR + AEAD_TAG),
            "digests": wire.sequence(wire.fixed(SHARE_DIGEST), 2 * MAX_ROUNDS),
        },
    ),
    MAX_COHORT,
)


@dataclass(frozen=True, slots=True)
class Shares(Message):
    """Device → coordinator: one box for each neighbour. ``context`` is the digest of offer and roster."""

    TAG: ClassVar = "shares"
    LIMIT: ClassVar = 64 * MIB
    FIELDS: ClassVar = {"context": DIGESTS, "device": DEVICES, "encrypted_shares": ENCRYPTED_SHARES}
    context: bytes
    device: str
    encrypted_shares: Mapping[str, EncryptedShares]
