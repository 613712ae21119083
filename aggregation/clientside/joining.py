"""Steps 1 to 4 on the device: an offer is answered with keys, and the roster with shares of its secrets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aggregation import boxes, checks, masks
from aggregation.boxes import Secrets
from aggregation.clientside.device import Device
from aggregation.clientside.ready import Ready
from aggregation.entropy import Entropy
from aggregation.errors import ProtocolError, TrustError
from aggregation.identity import PublicKey
from aggregation.messages import Advert, Offer, Roster, Shares
from aggregation.once import Once
from aggregation.session import COORDINATOR, commitment
from aggregation.spec import SessionSpec

if TYPE_CHECKING:
    from datetime import datetime


def join(device: Device, offer: bytes, entropy: Entropy, at: "datetime | None" = None) -> tuple["Advertised", bytes]:
    """Accept an offer: step 2. Makes the keys of every round; the answer is the advert.

    Args:
        device: This device.
        offer: As received.
        entropy: Draws the keys.
        at: The time at which certificates must be valid, where the device has a clock it trusts.

    Raises:
        ProtocolError: The offer is not the coordinator's, names an uncertified or repeated member, does not
            include this device, or is against this device's policy.
    """
    message = device.hear(Offer, offer)
    me, cohort = _own_place(device, message, at)
    digest, rounds = message.digest(), range(1, message.spec.rounds + 1)
    box_key = entropy.bytes(masks.KEY)
    secrets = {round_: Secrets(entropy.bytes(masks.KEY), entropy.bytes(masks.KEY)) for round_ in rounds}
    advert = Advert(
        offer=digest,
        device=me,
        box_key=masks.public_key(box_key),
        mask_keys=tuple(masks.public_key(secrets[round_].mask_key) for round_ in rounds),
        commitments=tuple(commitment(secrets[round_].seed, digest, me, round_) for round_ in rounds),
    )
    signed = device.say(advert)
    return Advertised(me, message.spec, digest, cohort, signed, box_key, secrets), signed


def _own_place(device: Device, offer: Offer, at: "datetime | None") -> tuple[str, dict[str, PublicKey]]:
    cohort = checks.members(device.root, offer.certificates, at)
    device.policy.check(offer.spec, len(cohort))
    try:
        me, key = device.root.verify(device.certificate, at)
    except TrustError as error:
        raise ProtocolError(f"this device's own certificate: {error}") from None
    if key != device.identity.public or cohort.get(me) != key:
        raise ProtocolError("offer does not include this device with its own key", COORDINATOR)
    return me, cohort


@dataclass(frozen=True, slots=True)
class Advertised:
    """The advert is out; the roster is next."""

    me: str
    spec: SessionSpec
    offer: bytes
    cohort: Mapping[str, PublicKey]
    advert: bytes
    box_key: bytes = field(repr=False)
    secrets: Mapping[int, Secrets] = field(repr=False)
    once: Once = field(default_factory=Once, repr=False, compare=False)

    def on_roster(self, device: Device, roster: bytes, entropy: Entropy) -> tuple[Ready, bytes]:
        """Check the roster and share the secrets of every round: steps 3 and 4. The answer is the boxes.

        Raises:
            ProtocolError: The roster is not the coordinator's for this offer, is too small, has an advert that
                is repeated, replayed, unsigned or of a stranger, or has not this device's own advert unchanged.
        """
        message = device.hear(Roster, roster)
        session, adverts = checks.roster(self.spec, self.offer, self.cohort, message)
        device.policy.check_roster(self.spec, len(self.cohort), len(adverts))
        if adverts.get(self.me) != self.advert:
            raise ProtocolError("roster does not have this device's own advert", COORDINATOR)
        self.once.take("roster")
        own, sealed = boxes.deal(session, self.me, self.box_key, self.secrets, entropy)
        held = {round_: {self.me: pair} for round_, pair in own.items()}
        ready = Ready(session, self.me, 0, None, self.box_key, self.secrets, held)
        return ready, device.say(Shares(session.context, self.me, sealed))
