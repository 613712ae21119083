"""The messages of the protocol: the fields of each, and its canonical encoding (``docs/reference/protocol.md``). A
message declares its fields once, in wire order, each annotated with its codec. ``checks`` decides what a well-formed
message may say at each step; ``envelope`` adds signatures and the version. Limits are in bytes of the encoded body."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, TypeAlias, TypeVar

from aggregation import wire
from aggregation.pki import DEVICE_ID, MAX_CERTIFICATE
from aggregation.pki.identity import SIGNATURE
from aggregation.shamir import SHARE
from aggregation.spec import MAX_ROUNDS, SessionSpec
from aggregation.wire import Codec

M = TypeVar("M", bound="Message")
DIGEST = 32  # bytes of SHA-256
SHARE_DIGEST = 16  # bytes: passing a wrong share for the dealt one takes a second preimage
AEAD_TAG = 16  # bytes
PAIR = 2 * SHARE  # bytes: the shares that a holder gets from one dealer for one round
MAX_COHORT = 10_000
MAX_TRAINING = 2**20  # bytes of settings for the trainer
MIB = 2**20  # bytes

DIGESTS: Codec[bytes] = wire.fixed(DIGEST)
DEVICES: Codec[str] = wire.text(DEVICE_ID)
SERIALS: Codec[Mapping[str, int]] = wire.mapping(DEVICES, wire.uint(160), MAX_COHORT)  # RFC 5280: at most 20 bytes

Digest: TypeAlias = Annotated[bytes, DIGESTS]
DeviceId: TypeAlias = Annotated[str, DEVICES]
DeviceIds: TypeAlias = Annotated[tuple[str, ...], wire.sequence(DEVICES, MAX_COHORT)]
HexDigest: TypeAlias = wire.HexDigest
Uint32: TypeAlias = wire.Uint32
Uint64: TypeAlias = wire.Uint64
Key: TypeAlias = Annotated[bytes, wire.fixed(32)]
KeyOfEachRound: TypeAlias = Annotated[tuple[bytes, ...], wire.sequence(wire.fixed(32), MAX_ROUNDS)]
_ShareByDealer: TypeAlias = Annotated[Mapping[str, bytes], wire.mapping(DEVICES, wire.fixed(SHARE), MAX_COHORT)]

SESSION_SPEC: Codec[SessionSpec] = wire.record(SessionSpec)
_CODECS: dict[type["Message"], Codec[Any]] = {}  # each built once


class _Digested:
    __slots__ = ("_digest",)


@dataclass(frozen=True, slots=True)
class Message(_Digested):
    """Base of all messages: an encoding that follows from the annotated fields, and a digest under the tag."""

    TAG: ClassVar[str]
    LIMIT: ClassVar[int]

    @classmethod
    def codec(cls) -> Codec[Self]:
        if cls not in _CODECS:
            _CODECS[cls] = wire.record(cls)
        return _CODECS[cls]

    def encode(self) -> bytes:
        """The canonical bytes of this message. Raises ConfigError: a field is over its limit."""
        return self.codec().encode(self)

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """The message that ``raw`` encodes. Law: ``decode(raw).encode() == raw``. Raises ProtocolError: ``raw`` is not
        the canonical encoding of one such message."""
        return cls.codec().decode(raw)

    def digest(self) -> bytes:
        """SHA-256 of tag and canonical bytes."""
        known: bytes | None = getattr(self, "_digest", None)
        if known is None:
            known = hashlib.sha256(self.TAG.encode() + b"\x00" + self.encode()).digest()
            object.__setattr__(self, "_digest", known)
        return known


@dataclass(frozen=True, slots=True)
class Challenge(Message):
    """Coordinator → one node: show which device you are. ``nonce`` is 32 fresh bytes; ``node`` is Flower's id of it."""

    TAG: ClassVar = "challenge"
    LIMIT: ClassVar = 1024
    nonce: Digest
    node: Uint64


@dataclass(frozen=True, slots=True)
class CheckIn(Message):
    """Device → coordinator: its certificate, and the proof that it has the key, for one challenge. ``last_offer``:
    digest of the last offer that it joined, if it keeps a log state."""

    TAG: ClassVar = "check-in"
    LIMIT: ClassVar = 4096
    challenge: Digest
    certificate: Annotated[bytes, wire.blob(MAX_CERTIFICATE)]
    last_offer: Annotated[bytes | None, wire.optional(DIGESTS)]


@dataclass(frozen=True, slots=True)
class Offer(Message):
    """Coordinator → devices: a session to join. ``session`` is 32 fresh bytes; certificates are in device order."""

    TAG: ClassVar = "offer"
    LIMIT: ClassVar = 32 * MIB
    session: Digest
    spec: Annotated[SessionSpec, SESSION_SPEC]
    certificates: Annotated[tuple[bytes, ...], wire.sequence(wire.blob(MAX_CERTIFICATE), MAX_COHORT)]


@dataclass(frozen=True, slots=True)
class Advert(Message):
    """Device → coordinator: its X25519 keys, and a commitment to the self-mask seed of each round. ``share_key``
    encrypts shares; ``mask_keys`` has one key for each round."""

    TAG: ClassVar = "advert"
    LIMIT: ClassVar = MIB
    offer: Digest
    device: DeviceId
    share_key: Key
    mask_keys: KeyOfEachRound
    commitments: KeyOfEachRound

    @property
    def keys(self) -> frozenset[bytes]:
        """All X25519 keys: the share key and the mask keys."""
        return frozenset((self.share_key, *self.mask_keys))


@dataclass(frozen=True, slots=True)
class Roster(Message):
    """Coordinator → devices: every advert as its device signed it, in order of device id."""

    TAG: ClassVar = "roster"
    LIMIT: ClassVar = 256 * MIB
    offer: Digest
    adverts: Annotated[tuple[bytes, ...], wire.sequence(wire.blob(Advert.LIMIT), MAX_COHORT)]


@dataclass(frozen=True, slots=True)
class EncryptedShares:
    """Shares from one dealer for one holder, encrypted, with a digest of each, so that a wrong share can be attributed.
    ``ciphertext`` holds, for each round, a share of the self-mask seed and a share of the mask key; ``digests`` are of
    these shares in the same order."""

    ciphertext: Annotated[bytes, wire.blob(MAX_ROUNDS * PAIR + AEAD_TAG)]
    digests: Annotated[tuple[bytes, ...], wire.sequence(wire.fixed(SHARE_DIGEST), 2 * MAX_ROUNDS)]


_SharesByDevice: TypeAlias = Annotated[
    Mapping[str, EncryptedShares], wire.mapping(DEVICES, wire.record(EncryptedShares), MAX_COHORT)
]


@dataclass(frozen=True, slots=True)
class Shares(Message):
    """Device → coordinator: encrypted shares for each neighbor. ``context`` is the digest of offer and roster."""

    TAG: ClassVar = "shares"
    LIMIT: ClassVar = 64 * MIB
    context: Digest
    device: DeviceId
    encrypted_shares: _SharesByDevice


@dataclass(frozen=True, slots=True)
class Plan(Message):
    """A round: the same for every device in it; its digest is bound into every mask. ``members`` is the set U1 in
    ascending order; ``training`` holds settings that this package does not interpret. ``former``: devices that were
    dealt into groups with the members when the round was first planned, and are in it no more, in ascending order."""

    TAG: ClassVar = "plan"
    LIMIT: ClassVar = 4 * MIB
    context: Digest
    round: Uint32
    members: DeviceIds
    adapter_version: Uint64
    adapter_digest: HexDigest
    training: Annotated[bytes, wire.blob(MAX_TRAINING)]
    former: DeviceIds = ()


@dataclass(frozen=True, slots=True)
class Assignment(Message):
    """Coordinator → one device: the plan, and, until the device has them, the encrypted shares for it, by dealer."""

    TAG: ClassVar = "assignment"
    LIMIT: ClassVar = 64 * MIB
    plan: Annotated[Plan, Plan.codec()]
    encrypted_shares: _SharesByDevice


@dataclass(frozen=True, slots=True)
class MaskedInput(Message):
    """Device → coordinator, after the packed vector: the vector's SHA-256, so that the signature covers the vector."""

    TAG: ClassVar = "masked-input"
    LIMIT: ClassVar = 1024
    plan: Digest
    device: DeviceId
    vector: Digest


@dataclass(frozen=True, slots=True)
class Survivors(Message):
    """Coordinator → devices: the set U2, each survivor with the digest of its packed vector."""

    TAG: ClassVar = "survivors"
    LIMIT: ClassVar = 4 * MIB
    plan: Digest
    vectors: Annotated[Mapping[str, bytes], wire.mapping(DEVICES, DIGESTS, MAX_COHORT)]


@dataclass(frozen=True, slots=True)
class ConsistencySignature(Message):
    """Device → coordinator → devices: this is the one survivor set that I was shown in this round."""

    TAG: ClassVar = "consistency-signature"
    LIMIT: ClassVar = 1024
    survivors: Digest
    device: DeviceId


@dataclass(frozen=True, slots=True)
class Unmask(Message):
    """Coordinator → devices: a request to unmask this survivor set. ``consistency_signatures``: device → signature on
    its ``ConsistencySignature``."""

    TAG: ClassVar = "unmask"
    LIMIT: ClassVar = 8 * MIB
    survivors: Annotated[Survivors, Survivors.codec()]
    consistency_signatures: Annotated[Mapping[str, bytes], wire.mapping(DEVICES, wire.fixed(SIGNATURE), MAX_COHORT)]


@dataclass(frozen=True, slots=True)
class UnmaskResponse(Message):
    """Device → coordinator: by dealer, a share of the seed of each survivor, and of the mask key of each dropout."""

    TAG: ClassVar = "unmask-response"
    LIMIT: ClassVar = 4 * MIB
    survivors: Digest
    device: DeviceId
    seeds: _ShareByDealer
    keys: _ShareByDealer


MESSAGES: tuple[type[Message], ...] = (
    Challenge,
    CheckIn,
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
