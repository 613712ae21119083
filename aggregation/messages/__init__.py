"""The messages of the protocol: what each carries, and its one encoding (docs/reference/protocol.md gives the steps).

A message declares its fields once, in wire order. What a well-formed message may say, and to whom, is decided in
``checks``; signatures and versions are in ``envelope``. Limits are in bytes of the encoded body.
"""

from aggregation.messages.base import DEVICES, DIGESTS, MAX_COHORT, Message
from aggregation.messages.joining import (
    AEAD_TAG,
    PAIR,
    SESSION_SPEC,
    SHARE_DIGEST,
    Advert,
    EncryptedShares,
    Offer,
    Roster,
    Shares,
)
from aggregation.messages.rounds import (
    Assignment,
    ConsistencySignature,
    MaskedInput,
    Plan,
    Survivors,
    Unmask,
    UnmaskResponse,
)

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

__all__ = [
    "AEAD_TAG",
    "DEVICES",
    "DIGESTS",
    "MAX_COHORT",
    "MESSAGES",
    "PAIR",
    "SESSION_SPEC",
    "SHARE_DIGEST",
    "Advert",
    "Assignment",
    "ConsistencySignature",
    "EncryptedShares",
    "MaskedInput",
    "Message",
    "Offer",
    "Plan",
    "Roster",
    "Shares",
    "Survivors",
    "Unmask",
    "UnmaskResponse",
]
