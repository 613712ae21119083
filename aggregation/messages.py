"""The messages of the protocol: the fields of each, and its canonical encoding (``docs/reference/protocol.md``).

A message declares its fields once, in wire order. ``checks`` decides what a well-formed message may say at each step;
``envelope`` adds signatures and the version. Limits are in bytes of the encoded body.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from aggregation import wire
from aggregation.pki import DEVICE_ID, MAX_CERTIFICATE
from aggregation.pki.identity import SIGNATURE
from aggregation.shamir import SHARE
from aggregation.spec import MAX_ROUNDS, Adversary, SessionSpec
from aggregation.vector import MAX_SEGMENTS, Segment, VectorSpec
from aggregation.wire import Codec

DIGEST = 32  # bytes of SHA-256
MAX_COHORT = 10_000
MIB = 2**20  # bytes

DIGESTS: Codec[bytes] = wire.fixed(DIGEST)
DEVICES: Codec[str] = wire.text(DEVICE_ID)
HEX: Codec[str] = wire.text(r"[0-9a-f]{64}")
U32: Codec[int] = wire.uint(32)


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages: an encoding that follows from ``FIELDS``, and a digest under the message's tag."""

    TAG: ClassVar[str]
    LIMIT: ClassVar[int]
    FIELDS: ClassVar[Mapping[str, Codec[Any]]]

    @classmethod
    def codec(cls) -> Codec[Self]:
        """The codec of this message."""
        return wire.record(cls, cls.FIELDS)

    def encode(self) -> bytes:
        """The canonical bytes of this message.

        Raises:
            ConfigError: A field is over its limit.
        """
        return self.codec().encode(self)

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """The message that ``raw`` encodes. Law: ``decode(raw).encode() == raw``.

        Raises:
            ProtocolError: ``raw`` is not the canonical encoding of one such message.
        """
        return cls.codec().decode(raw)

    def digest(self) -> bytes:
        """SHA-256 of tag and canonical bytes."""
        return hashlib.sha256(self.TAG.encode() + b"\x00" + self.encode()).digest()


SHARE_DIGEST = 16  # bytes: passing a wrong share for the dealt one takes a second preimage
AEAD_TAG = 16  # bytes
PAIR = 2 * SHARE  # bytes: the shares that a holder gets from one dealer for one round
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
    """Coordinator → devices: a session to join. ``session`` is 32 fresh bytes; certificates are in device order."""

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
    """Device → coordinator: its X25519 keys, and a commitment to the self-mask seed of each round.

    ``share_key`` encrypts shares; ``mask_keys`` has one key for each round.
    """

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
        """All X25519 keys: the share key and the mask keys."""
        return frozenset((self.share_key, *self.mask_keys))


@dataclass(frozen=True, slots=True)
class Roster(Message):
    """Coordinator → devices: every advert as its device signed it, in order of device id."""

    TAG: ClassVar = "roster"
    LIMIT: ClassVar = 256 * MIB
    FIELDS: ClassVar = {"offer": DIGESTS, "adverts": wire.sequence(wire.blob(Advert.LIMIT), MAX_COHORT)}
    offer: bytes
    adverts: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class EncryptedShares:
    """Shares from one dealer for one holder, encrypted, with a digest of each, so that a wrong share can be attributed.

    ``ciphertext`` holds, for each round, a share of the self-mask seed and a share of the mask key; ``digests`` are of
    these shares in the same order.
    """

    ciphertext: bytes
    digests: tuple[bytes, ...]


ENCRYPTED_SHARES: Codec[Mapping[str, EncryptedShares]] = wire.mapping(
    DEVICES,
    wire.record(
        EncryptedShares,
        {
            "ciphertext": wire.blob(MAX_ROUNDS * PAIR + AEAD_TAG),
            "digests": wire.sequence(wire.fixed(SHARE_DIGEST), 2 * MAX_ROUNDS),
        },
    ),
    MAX_COHORT,
)


@dataclass(frozen=True, slots=True)
class Shares(Message):
    """Device → coordinator: encrypted shares for each neighbor. ``context`` is the digest of offer and roster."""

    TAG: ClassVar = "shares"
    LIMIT: ClassVar = 64 * MIB
    FIELDS: ClassVar = {"context": DIGESTS, "device": DEVICES, "encrypted_shares": ENCRYPTED_SHARES}
    context: bytes
    device: str
    encrypted_shares: Mapping[str, EncryptedShares]


MAX_TRAINING = 2**20  # bytes of settings for the trainer


@dataclass(frozen=True, slots=True)
class Plan(Message):
    """A round: the same for every device in it; its digest is bound into every mask.

    ``members`` is the set U1 in ascending order; ``training`` holds settings that this package does not interpret.
    """

    TAG: ClassVar = "plan"
    LIMIT: ClassVar = 4 * MIB
    FIELDS: ClassVar = {
        "context": DIGESTS,
        "round": U32,
        "members": wire.sequence(DEVICES, MAX_COHORT),
        "adapter_version": wire.uint(64),
        "adapter_digest": HEX,
        "training": wire.blob(MAX_TRAINING),
    }
    context: bytes
    round: int
    members: tuple[str, ...]
    adapter_version: int
    adapter_digest: str
    training: bytes


@dataclass(frozen=True, slots=True)
class Assignment(Message):
    """Coordinator → one device: the plan, and, until the device has them, the encrypted shares for it, by dealer."""

    TAG: ClassVar = "assignment"
    LIMIT: ClassVar = 64 * MIB
    FIELDS: ClassVar = {"plan": Plan.codec(), "encrypted_shares": ENCRYPTED_SHARES}
    plan: Plan
    encrypted_shares: Mapping[str, EncryptedShares]


@dataclass(frozen=True, slots=True)
class MaskedInput(Message):
    """Device → coordinator, after the packed vector: the vector's SHA-256, so that the signature covers the vector."""

    TAG: ClassVar = "masked-input"
    LIMIT: ClassVar = 1024
    FIELDS: ClassVar = {"plan": DIGESTS, "device": DEVICES, "vector": DIGESTS}
    plan: bytes
    device: str
    vector: bytes


@dataclass(frozen=True, slots=True)
class Survivors(Message):
    """Coordinator → devices: the set U2, each survivor with the digest of its packed vector."""

    TAG: ClassVar = "survivors"
    LIMIT: ClassVar = 4 * MIB
    FIELDS: ClassVar = {"plan": DIGESTS, "vectors": wire.mapping(DEVICES, DIGESTS, MAX_COHORT)}
    plan: bytes
    vectors: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class ConsistencySignature(Message):
    """Device → coordinator → devices: this is the one survivor set that I was shown in this round."""

    TAG: ClassVar = "consistency-signature"
    LIMIT: ClassVar = 1024
    FIELDS: ClassVar = {"survivors": DIGESTS, "device": DEVICES}
    survivors: bytes
    device: str


@dataclass(frozen=True, slots=True)
class Unmask(Message):
    """Coordinator → devices: a request to unmask this survivor set.

    ``consistency_signatures``: device → signature on its ``ConsistencySignature``.
    """

    TAG: ClassVar = "unmask"
    LIMIT: ClassVar = 8 * MIB
    FIELDS: ClassVar = {
        "survivors": Survivors.codec(),
        "consistency_signatures": wire.mapping(DEVICES, wire.fixed(SIGNATURE), MAX_COHORT),
    }
    survivors: Survivors
    consistency_signatures: Mapping[str, bytes]


_SHARES_BY_DEALER = wire.mapping(DEVICES, wire.fixed(SHARE), MAX_COHORT)


@dataclass(frozen=True, slots=True)
class UnmaskResponse(Message):
    """Device → coordinator: by dealer, a share of the seed of each survivor, and of the mask key of each dropout."""

    TAG: ClassVar = "unmask-response"
    LIMIT: ClassVar = 4 * MIB
    FIELDS: ClassVar = {"survivors": DIGESTS, "device": DEVICES, "seeds": _SHARES_BY_DEALER, "keys": _SHARES_BY_DEALER}
    survivors: bytes
    device: str
    seeds: Mapping[str, bytes]
    keys: Mapping[str, bytes]


MESSAGES: tuple[type[Message], ...] = (
    Offer,
    Advert,
    Roster,
    Shares,
    Plan,
    Assignment,
    MaskedInput,
    Survivors,
    ConsistencySignature,
    Unmask,
    UnmaskResponse,
)
