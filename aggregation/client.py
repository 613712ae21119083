"""The device's side of the protocol: one frozen type a state, whose methods are the legal steps.

    join → Advertised → Ready → Planned → Masked → Confirmed → Ready …
                                          Masked ───────────→ Ready …      (honest-but-curious)

Each step checks the message (``checks``), then returns the next state and the answer. A refused message raises
``ProtocolError`` and leaves the state as it was. A state answers once: a second answer from the same state is
refused, because two answers to one step are what attacks are made of. A new plan may come in any state from
``Ready`` on; what was secret of the abandoned round is then gone.

A device that must survive a restart seals the new state (``sealed``) *before* it sends the answer.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from aggregation import checks, envelope, masks, ring, sharing
from aggregation.entropy import Entropy
from aggregation.envelope import M
from aggregation.errors import ProtocolError, TrustError
from aggregation.masks import Mask
from aggregation.messages import (
    Advert,
    Assignment,
    ConsistencySignature,
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
from aggregation.pki import Root
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.policy import Policy
from aggregation.ring import Ring
from aggregation.session import COORDINATOR, Session, commitment
from aggregation.sharing import Secrets, SharePair
from aggregation.singleuse import SingleUse
from aggregation.spec import Adversary, SessionSpec


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

    def open_verified(self, kind: type[M], raw: bytes) -> M:
        """Open a message of the coordinator's."""
        return envelope.open_verified(kind, raw, self.coordinator, COORDINATOR)

    def sign(self, message: Message) -> bytes:
        """Sign a message of this device's."""
        return envelope.sign(self.identity, message)


def join(device: Device, offer: bytes, entropy: Entropy, at: datetime | None = None) -> tuple["Advertised", bytes]:
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
    message = device.open_verified(Offer, offer)
    me, cohort = _own_place(device, message, at)
    digest, rounds = message.digest(), range(1, message.spec.rounds + 1)
    share_key = entropy.bytes(masks.KEY)
    secrets = {round_: Secrets(entropy.bytes(masks.KEY), entropy.bytes(masks.KEY)) for round_ in rounds}
    advert = Advert(
        offer=digest,
        device=me,
        share_key=masks.public_key(share_key),
        mask_keys=tuple(masks.public_key(secrets[round_].mask_key) for round_ in rounds),
        commitments=tuple(commitment(secrets[round_].seed, digest, me, round_) for round_ in rounds),
    )
    signed = device.sign(advert)
    return Advertised(me, message.spec, digest, cohort, signed, share_key, secrets), signed


def _own_place(device: Device, offer: Offer, at: datetime | None) -> tuple[str, dict[str, PublicKey]]:
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
    share_key: bytes = field(repr=False)
    secrets: Mapping[int, Secrets] = field(repr=False)
    single_use: SingleUse = field(default_factory=SingleUse, repr=False, compare=False)

    def on_roster(self, device: Device, roster: bytes, entropy: Entropy) -> "tuple[Ready, bytes]":
        """Check the roster and share the secrets of every round: steps 3 and 4. The answer is the boxes.

        Raises:
            ProtocolError: The roster is not the coordinator's for this offer, is too small, has an advert that
                is repeated, replayed, unsigned or of a stranger, or has not this device's own advert unchanged.
        """
        message = device.open_verified(Roster, roster)
        session, adverts = checks.roster(self.spec, self.offer, self.cohort, message)
        device.policy.check_roster(self.spec, len(self.cohort), len(adverts))
        if adverts.get(self.me) != self.advert:
            raise ProtocolError("roster does not have this device's own advert", COORDINATOR)
        self.single_use.take("roster")
        own, sealed = sharing.deal(session, self.me, self.share_key, self.secrets, entropy)
        held = {round_: {self.me: pair} for round_, pair in own.items()}
        ready = Ready(session, self.me, 0, None, self.share_key, self.secrets, held)
        return ready, device.sign(Shares(session.context, self.me, sealed))


@dataclass(frozen=True, slots=True)
class Ready:
    """Between rounds.

    Args:
        session: The public side.
        me: This device's id.
        last_round: The last round begun; 0 before the first.
        dealers: Those whose boxes arrived, or nothing before they do.
        box_key: For opening boxes; gone once they are open.
        secrets: This device's own, of rounds still to come.
        held: Round → dealer → shares, of rounds still to come.
    """

    session: Session
    me: str
    last_round: int
    dealers: frozenset[str] | None
    share_key: bytes | None = field(repr=False)
    secrets: Mapping[int, Secrets] = field(repr=False)
    held: Mapping[int, Mapping[str, SharePair]] = field(repr=False)
    single_use: SingleUse = field(default_factory=SingleUse, repr=False, compare=False)

    def on_plan(self, device: Device, plan: bytes) -> "Planned":
        """Accept the plan of a round: step 5. Skipped rounds can no longer be joined; their secrets are dropped.

        Raises:
            ProtocolError: Not the coordinator's, of another session, of a round begun before, without this
                device, with a member that shared no secrets, or too small.
        """
        message = device.open_verified(Assignment, plan)
        opened = self if self.share_key is None else self._open(message)
        dealers = opened.dealers or frozenset()
        checks.plan(self.session, self.me, dealers, self.last_round, message.plan)
        self.single_use.take("plan")
        round_ = message.plan.round
        later = Ready(
            self.session,
            self.me,
            round_,
            opened.dealers,
            opened.share_key,
            {number: secret for number, secret in self.secrets.items() if number > round_},
            {number: pairs for number, pairs in opened.held.items() if number > round_},
        )
        return Planned(later, message.plan, self.secrets[round_], opened.held[round_])

    def _open(self, message: Assignment) -> "Ready":
        checks.encrypted_shares(self.session, self.me, message.encrypted_shares)
        held = {round_: dict(pairs) for round_, pairs in self.held.items()}
        for dealer, box in message.encrypted_shares.items():
            pairs = sharing.decrypt(self.session, self.share_key or b"", dealer, self.me, box)
            for round_, pair in (pairs or {}).items():
                held[round_][dealer] = pair
        dealers = frozenset(message.encrypted_shares)
        return Ready(self.session, self.me, self.last_round, dealers, None, self.secrets, held)


@dataclass(frozen=True, slots=True)
class Planned:
    """A round has begun; the trained vector is next. Sealing this state gives up the round: see ``sealed``."""

    ready: "Ready"
    plan: Plan
    secrets: Secrets = field(repr=False)
    held: Mapping[str, SharePair] = field(repr=False)
    single_use: SingleUse = field(default_factory=SingleUse, repr=False, compare=False)

    @property
    def spec(self) -> SessionSpec:
        """The session's parameters."""
        return self.ready.session.spec

    def on_plan(self, device: Device, plan: bytes) -> "Planned":
        """Give up this round for a later one."""
        return self.ready.on_plan(device, plan)

    def contribute(self, device: Device, ring_vector: Ring, threads: int = 1) -> "tuple[Masked, bytes]":
        """Mask and sign the vector: step 6. This device's own secrets of the round end here.

        Args:
            device: This device.
            ring_vector: What ``spec.vector.encode`` gave. It is masked in place, so that the plain vector does
                not outlive this call: copy it first if it is still needed.
            threads: Those of ``masks.apply``.

        Raises:
            DataError: The vector has another size or type.
        """
        bits, context, plan = self.spec.vector.ring_bits, self.ready.session.context, self.plan.digest()
        ring.require_vector(ring_vector, self.spec.vector.size, bits)
        self.single_use.take("masked input")
        masks.apply(ring_vector, [*self.pair_masks(plan), self._self_mask(context, plan)], threads)
        packed = ring.packed_view(ring_vector, bits)
        header = MaskedInput(plan, self.ready.me, hashlib.sha256(packed).digest())
        masked = Masked(self.ready, self.plan, self.held, header.vector)
        return masked, envelope.sign_vector(device.identity, header, packed)

    def _self_mask(self, context: bytes, plan: bytes) -> Mask:
        return Mask(masks.self_key(self.secrets.seed, context, plan, self.ready.me), add=True)

    def pair_masks(self, plan: bytes) -> list[Mask]:
        """One for each neighbour in the round: added by the smaller id, subtracted by the larger."""
        session, me = self.ready.session, self.ready.me
        publics = session.mask_keys(session.neighbors(me, self.plan.members), self.plan.round)
        return masks.pair_masks(self.secrets.mask_key, me, publics, session.context, plan)


@dataclass(frozen=True, slots=True)
class Masked:
    """The masked input is out; the survivor set is next. ``vector`` is the digest of what was sent."""

    ready: "Ready"
    plan: Plan
    held: Mapping[str, SharePair] = field(repr=False)
    vector: bytes
    single_use: SingleUse = field(default_factory=SingleUse, repr=False, compare=False)

    def on_plan(self, device: Device, plan: bytes) -> "Planned":
        """Give up this round for a later one."""
        return self.ready.on_plan(device, plan)

    def on_survivors(self, device: Device, survivors: bytes) -> tuple["Confirmed", bytes]:
        """Check the survivor set and sign it, once: step 7. The answer is the agreement.

        Raises:
            ProtocolError: Not the coordinator's for this plan, without this device and its own vector, with
                one who was not in the plan, or too small; or the session runs no consistency round.
        """
        self._demand(Adversary.ACTIVE, "survivor set")
        message = device.open_verified(Survivors, survivors)
        checks.survivors(self.ready.session, self.plan, self.ready.me, self.vector, message)
        self.single_use.take("consistency-signature")
        confirmed = Confirmed(self.ready, self.plan, self.held, message)
        return confirmed, device.sign(ConsistencySignature(message.digest(), self.ready.me))

    def on_unmask(self, device: Device, unmask: bytes) -> tuple["Ready", bytes]:
        """Open the survivor set without a consistency round: step 8, honest-but-curious sessions only.

        Raises:
            ProtocolError: As ``on_survivors``; always in an active session.
        """
        self._demand(Adversary.HONEST_BUT_CURIOUS, "unmask request without an agreement")
        message = device.open_verified(Unmask, unmask)
        checks.survivors(self.ready.session, self.plan, self.ready.me, self.vector, message.survivors)
        self.single_use.take("unmask-response")
        return self.ready, _unmask_response(device, self.ready, self.plan, self.held, message.survivors)

    def _demand(self, adversary: Adversary, what: str) -> None:
        if self.ready.session.spec.adversary is not adversary:
            raise ProtocolError(f"{what} is no step of this session", COORDINATOR)


@dataclass(frozen=True, slots=True)
class Confirmed:
    """This device agreed to a survivor set; the agreements of the others are next."""

    ready: "Ready"
    plan: Plan
    held: Mapping[str, SharePair] = field(repr=False)
    survivors: Survivors
    single_use: SingleUse = field(default_factory=SingleUse, repr=False, compare=False)

    def on_plan(self, device: Device, plan: bytes) -> "Planned":
        """Give up this round for a later one."""
        return self.ready.on_plan(device, plan)

    def on_unmask(self, device: Device, unmask: bytes) -> tuple["Ready", bytes]:
        """Open the survivor set that this device agreed to: step 8. What it held of the round ends here.

        Raises:
            ProtocolError: Not the coordinator's, another survivor set, or too few valid agreements on it.
        """
        message = device.open_verified(Unmask, unmask)
        if message.survivors != self.survivors:
            raise ProtocolError("not the survivor set that this device agreed to", COORDINATOR)
        checks.consistency_signatures(self.ready.session, message.survivors, message.consistency_signatures)
        self.single_use.take("unmask-response")
        return self.ready, _unmask_response(device, self.ready, self.plan, self.held, message.survivors)


def _unmask_response(
    device: Device, ready: "Ready", plan: Plan, held: Mapping[str, SharePair], survivors: Survivors
) -> bytes:
    """One kind of share a dealer: of the seed of a survivor, of the mask key of one who dropped."""
    alive, dropped = checks.shares_to_reveal(ready.session, plan, ready.me, survivors)
    seeds = {dealer: held[dealer].seed for dealer in alive if dealer in held}
    keys = {dealer: held[dealer].key for dealer in dropped if dealer in held}
    return device.sign(UnmaskResponse(survivors.digest(), ready.me, seeds, keys))
