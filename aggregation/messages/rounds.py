"""Steps 5 to 8: a round from its plan to the shares that open its sum."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from aggregation import wire
from aggregation.messages.base import DEVICES, DIGESTS, HEX, MAX_COHORT, MIB, U32, Message
from aggregation.messages.joining import ENCRYPTED_SHARES, EncryptedShares
from aggregation.pki.identity import SIGNATURE
from aggregation.shamir import SHARE

MAX_TRAINING = 2**20  # bytes of settings for the trainer


@dataclass(frozen=True, slots=True)
class Plan(Message):
    """What a round is: the same for everyone in it; its digest is in every mask.

    ``members`` is the set U1 in ascending order; ``training`` is opaque here.
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
    """Coordinator → one device: the plan, and until the device has them the boxes addressed to it, by dealer."""

    TAG: ClassVar = "assignment"
    LIMIT: ClassVar = 64 * MIB
    FIELDS: ClassVar = {"plan": Plan.codec(), "encrypted_shares": ENCRYPTED_SHARES}
    plan: Plan
    encrypted_shares: Mapping[str, EncryptedShares]


@dataclass(frozen=True, slots=True)
class MaskedInput(Message):
    """Device → coordinator, before the packed vector: its SHA-256, so that a signature covers 3 MB at no cost."""

    TAG: ClassVar = "masked-input"
    LIMIT: ClassVar = 1024
    FIELDS: ClassVar = {"plan": DIGESTS, "device": DEVICES, "vector": DIGESTS}
    plan: bytes
    device: str
    vector: bytes


@dataclass(frozen=True, slots=True)
class Survivors(Message):
    """Coordinator → devices: the set U2, each with the digest of its packed vector."""

    TAG: ClassVar = "survivors"
    LIMIT: ClassVar = 4 * MIB
    FIELDS: ClassVar = {"plan": DIGESTS, "vectors": wire.mapping(DEVICES, DIGESTS, MAX_COHORT)}
    plan: bytes
    vectors: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class ConsistencySignature(Message):
    """Device → coordinator → devices: "this is the one survivor set that I was shown in this round"."""

    TAG: ClassVar = "consistency-signature"
    LIMIT: ClassVar = 1024
    FIELDS: ClassVar = {"survivors": DIGESTS, "device": DEVICES}
    survivors: bytes
    device: str


@dataclass(frozen=True, slots=True)
class Unmask(Message):
    """Coordinator → devices: unmask this survivor set.

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
    """Device → coordinator: by dealer, a share of the seed of each survivor and of the mask key of each dropped."""

    TAG: ClassVar = "unmask-response"
    LIMIT: ClassVar = 4 * MIB
    FIELDS: ClassVar = {"survivors": DIGESTS, "device": DEVICES, "seeds": _SHARES_BY_DEALER, "keys": _SHARES_BY_DEALER}
    survivors: bytes
    device: str
    seeds: Mapping[str, bytes]
    keys: Mapping[str, bytes]
