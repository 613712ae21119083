"""Who a device is and whom it trusts, whatever state it is in."""

from dataclasses import dataclass

from aggregation import envelope
from aggregation.certificates import Root
from aggregation.envelope import M
from aggregation.identity import IdentityKey, PublicKey
from aggregation.messages import Message
from aggregation.policy import Policy
from aggregation.session import COORDINATOR


@dataclass(frozen=True, slots=True)
class Device:
    """Who a device is and whom it trusts.

    Args:
        identity: Its signing key.
        certificate: The authority's word on it, DER.
        root: The pinned authority.
        coordinator: The pinned key of the coordinator.
        policy: What it demands of an offer.
    """

    identity: IdentityKey
    certificate: bytes
    root: Root
    coordinator: PublicKey
    policy: Policy

    def hear(self, kind: type[M], raw: bytes) -> M:
        """Open a message of the coordinator's."""
        return envelope.open_as(kind, raw, self.coordinator, COORDINATOR)

    def say(self, message: Message) -> bytes:
        """Sign a message of this device's."""
        return envelope.seal(self.identity, message)
