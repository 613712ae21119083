"""Steps 1 to 4 at the coordinator: an offer goes out, adverts come in; a roster goes out, share boxes come in."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from aggregation import boxes, checks, envelope
from aggregation.certificates import Root
from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, ProtocolError
from aggregation.identity import IdentityKey, PublicKey
from aggregation.messages import Box, Offer, Roster, Shares
from aggregation.serverside.established import Established
from aggregation.serverside.outcomes import RoundAborted, too_few
from aggregation.session import Session
from aggregation.spec import SessionSpec

if TYPE_CHECKING:
    from datetime import datetime


def open_session(
    key: IdentityKey,
    root: Root,
    spec: SessionSpec,
    certificates: Mapping[str, bytes],
    entropy: Entropy,
    at: "datetime | None" = None,
) -> tuple["Offering", bytes]:
    """Offer a session to a cohort: step 1.

    Args:
        key: The coordinator's.
        root: The pinned authority.
        spec: Parameters; its degree is the cohort less one, or even and less (``graph.choose``).
        certificates: Device id → DER.
        entropy: Draws the session's id.
        at: The time at which certificates must be valid.

    Raises:
        ProtocolError: A certificate is not the authority's, or not of the device it is filed under.
        ConfigError: The spec does not fit a cohort of this size.
    """
    offer = Offer(entropy.bytes(32), spec, tuple(der for _, der in sorted(certificates.items())))
    cohort = checks.members(root, offer.certificates, at)
    if list(cohort) != sorted(certificates):
        raise ProtocolError("a certificate is not of the device that it is filed under")
    if spec.degree >= len(cohort) or (spec.degree < len(cohort) - 1 and spec.degree % 2):
        raise ConfigError(
            f"degree {spec.degree} with {len(cohort)} devices: it must be {len(cohort) - 1}, or even and below that"
        )
    return Offering(key, spec, offer.digest(), cohort), envelope.seal(key, offer)


@dataclass(frozen=True, slots=True)
class Offering:
    """The offer is out; adverts come in. ``keys``: those in the adverts so far."""

    key: IdentityKey
    spec: SessionSpec
    offer: bytes
    cohort: Mapping[str, PublicKey]
    adverts: Mapping[str, bytes] = field(default_factory=dict)
    keys: frozenset[bytes] = field(default=frozenset(), repr=False)

    def on_advert(self, peer: str, body: bytes) -> "Offering":
        """Take one device's advert: step 2.

        Raises:
            ProtocolError: Not its signed advert for this offer, its second, or with a key of another device: who
                copies is refused, so that one device cannot spoil the session of all.
        """
        checks.turn(peer, self.cohort, self.adverts, "advert")
        keys = checks.advert(self.offer, self.spec.rounds, self.cohort[peer], peer, body).keys
        if keys & self.keys:
            raise ProtocolError("advert has a key of another device", peer)
        return replace(self, adverts={**self.adverts, peer: body}, keys=self.keys | keys)

    def close(self) -> "tuple[Sharing, bytes] | RoundAborted":
        """End step 2; the bytes are the roster, for everyone on it."""
        aborted = too_few(self.spec, len(self.adverts), "adverts", None)
        if aborted:
            return aborted
        roster = Roster(self.offer, tuple(raw for _, raw in sorted(self.adverts.items())))
        session, _ = checks.roster(self.spec, self.offer, self.cohort, roster)
        return Sharing(self.key, session), envelope.seal(self.key, roster)


@dataclass(frozen=True, slots=True)
class Sharing:
    """The roster is out; share boxes come in."""

    key: IdentityKey
    session: Session
    dealt: Mapping[str, Mapping[str, Box]] = field(default_factory=dict)

    def on_shares(self, peer: str, body: bytes) -> "Sharing":
        """Take one device's boxes: step 4.

        Raises:
            ProtocolError: Not its signed boxes of this session, one box for each neighbour.
        """
        checks.turn(peer, self.session.peers, self.dealt, "shares")
        message = envelope.open_as(Shares, body, self.session.peers[peer].identity, peer)
        if (message.context, message.device) != (self.session.context, peer):
            raise ProtocolError("shares are of another session or device", peer)
        if set(message.boxes) != set(self.session.neighbours(peer, self.session.peers)):
            raise ProtocolError("shares are not for exactly its neighbours", peer)
        if not all(boxes.fits(box, self.session.spec.rounds) for box in message.boxes.values()):
            raise ProtocolError("a box has not the size of one", peer)
        return replace(self, dealt={**self.dealt, peer: message.boxes})

    def close(self) -> "Established | RoundAborted":
        """End step 4. Who sent no shares is in no round of this session."""
        aborted = too_few(self.session.spec, len(self.dealt), "devices that sent shares", None)
        return aborted or Established(self.key, self.session, self.dealt)
