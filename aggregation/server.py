"""The coordinator's side of the protocol: one frozen type a state, whose methods are the legal steps.

    open_session → Offering → Sharing → Established → Collecting → Confirming → Unmasking → Established …
                                                      Collecting ─────────────→ Unmasking     (honest-but-curious)

``on_…`` takes one device's answer and returns the next state; a bad answer raises ``ProtocolError`` with the
peer's name, leaves the state as it was, and whoever drives the round counts that peer as lost. ``close`` ends a
step with whoever answered: time is the caller's. Where too few are left it returns ``RoundAborted``, with the
session for the next round. A round ends with the sum of its survivors or without one, never with another sum.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from aggregation import checks, envelope, masks, ring, sharing
from aggregation.entropy import Entropy
from aggregation.envelope import M
from aggregation.errors import ConfigError, DataError, ProtocolError
from aggregation.masks import Mask
from aggregation.messages import (
    Assignment,
    ConsistencySignature,
    EncryptedShares,
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
from aggregation.recovery import Recovery
from aggregation.ring import Ring
from aggregation.session import Session
from aggregation.singleuse import SingleUse
from aggregation.spec import Adversary, SessionSpec


class AbortReason(Enum):
    """Why a round ended without a sum."""

    TOO_FEW = "too-few"  # devices left, at any step
    UNRECOVERABLE = "unrecoverable"  # wrong shares, and too few good ones left
    OUT_OF_RANGE = "out-of-range"  # a sum that honest survivors cannot have
    SESSION_OVER = "session-over"  # no round left in the session


@dataclass(frozen=True, slots=True)
class RoundAborted:
    """A round that revealed nothing. ``session`` is where the next round begins; none before a session stands."""

    reason: AbortReason
    detail: str
    session: "Established | None"
    blamed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RoundResult:
    """A round's sum.

    Args:
        round: Its number in the session, from 1.
        values: Segment name → sum over the survivors, shape ``(segment.size,)``.
        survivors: Whose contributions are in the sum.
        dropped: Who was in the plan and is not in the sum.
        blamed: Who sent or encrypted_shares a share that was found to be wrong.
        digest: SHA-256 of the summed vector, packed as it would travel.
    """

    round: int
    values: dict[str, NDArray[np.float64]]
    survivors: tuple[str, ...]
    dropped: tuple[str, ...]
    blamed: tuple[str, ...]
    digest: bytes


def too_few(spec: SessionSpec, count: int, what: str, session: "Established | None") -> RoundAborted | None:
    """The end of a round with fewer than its session takes, or nothing where there are enough."""
    try:
        checks.enough_devices(spec, count, what)
    except ProtocolError as error:
        return RoundAborted(AbortReason.TOO_FEW, str(error), session)
    return None


def open_session(
    key: IdentityKey,
    root: Root,
    spec: SessionSpec,
    certificates: Mapping[str, bytes],
    entropy: Entropy,
    at: datetime | None = None,
) -> tuple["Offering", bytes]:
    """Offer a session to a cohort: step 1.

    Args:
        key: The coordinator's.
        root: The pinned authority.
        spec: Parameters; its degree is the cohort less one, or even and less (``graph.graph_parameters``).
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
    return Offering(key, spec, offer.digest(), cohort), envelope.sign(key, offer)


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
        checks.may_answer(peer, self.cohort, self.adverts, "advert")
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
        return Sharing(self.key, session), envelope.sign(self.key, roster)


@dataclass(frozen=True, slots=True)
class Sharing:
    """The roster is out; share boxes come in."""

    key: IdentityKey
    session: Session
    encrypted_shares: Mapping[str, Mapping[str, EncryptedShares]] = field(default_factory=dict)

    def on_shares(self, peer: str, body: bytes) -> "Sharing":
        """Take one device's boxes: step 4.

        Raises:
            ProtocolError: Not its signed boxes of this session, one box for each neighbour.
        """
        checks.may_answer(peer, self.session.peers, self.encrypted_shares, "shares")
        message = envelope.open_verified(Shares, body, self.session.peers[peer].identity, peer)
        if (message.context, message.device) != (self.session.context, peer):
            raise ProtocolError("shares are of another session or device", peer)
        if set(message.encrypted_shares) != set(self.session.neighbors(peer, self.session.peers)):
            raise ProtocolError("shares are not for exactly its neighbours", peer)
        if not all(sharing.fits(box, self.session.spec.rounds) for box in message.encrypted_shares.values()):
            raise ProtocolError("a box has not the size of one", peer)
        return replace(self, encrypted_shares={**self.encrypted_shares, peer: message.encrypted_shares})

    def close(self) -> "Established | RoundAborted":
        """End step 4. Who sent no shares is in no round of this session."""
        aborted = too_few(self.session.spec, len(self.encrypted_shares), "devices that sent shares", None)
        return aborted or Established(self.key, self.session, self.encrypted_shares)


@dataclass(frozen=True, slots=True)
class Established:
    """A session between rounds.

    Args:
        key: The coordinator's.
        session: The public side.
        encrypted_shares: Dealer → holder → box.
        last_round: The last round begun.
        delivered: Devices known to have their boxes.
        excluded: Devices whose secrets did not open, and by their own fault: in no further round.
    """

    key: IdentityKey
    session: Session
    encrypted_shares: Mapping[str, Mapping[str, EncryptedShares]]
    last_round: int = 0
    delivered: frozenset[str] = frozenset()
    excluded: frozenset[str] = frozenset()

    @property
    def rounds_left(self) -> int:
        """Rounds that may still begin."""
        return self.session.spec.rounds - self.last_round

    @property
    def devices(self) -> tuple[str, ...]:
        """Who may take part, in ascending order."""
        return tuple(sorted(set(self.encrypted_shares) - self.excluded))

    def plan(
        self, *, adapter_version: int, adapter_digest: str, training: bytes, cohort: Collection[str] | None
    ) -> "tuple[Collecting, dict[str, bytes]] | RoundAborted":
        """Begin a round: step 5.

        Args:
            adapter_version: Number of the adapter that training starts from.
            adapter_digest: Its SHA-256, in hex.
            training: Settings for the trainer, opaque here.
            cohort: Who takes part, of ``devices``; everyone where none.

        Returns:
            The next state, and what to send to each member.
        """
        if not self.rounds_left:
            return RoundAborted(AbortReason.SESSION_OVER, "the session has no round left: open a new one", self)
        members = tuple(device for device in self.devices if cohort is None or device in cohort)
        aborted = too_few(self.session.spec, len(members), "members of the plan", self)
        if aborted:
            return aborted
        begun = replace(self, last_round=self.last_round + 1)
        plan = Plan(self.session.context, begun.last_round, members, adapter_version, adapter_digest, training)
        out = {device: self._assignment(plan, device) for device in members}
        vector = self.session.spec.vector
        return Collecting(begun, plan, plan.digest(), ring.zeros(vector.size, vector.ring_bits)), out

    def _assignment(self, plan: Plan, device: str) -> bytes:
        dealers = () if device in self.delivered else self.session.neighbors(device, self.encrypted_shares)
        return envelope.sign(
            self.key, Assignment(plan, {dealer: self.encrypted_shares[dealer][device] for dealer in dealers})
        )


@dataclass(frozen=True, slots=True)
class Collecting:
    """The plan is out; masked inputs come in and are added up as they come, so that none is kept.

    ``total`` is one buffer that moves on with the state: a state that was moved on from refuses further inputs.
    ``digest`` is the plan's.
    """

    established: "Established"
    plan: Plan
    digest: bytes
    total: Ring = field(repr=False, compare=False)
    vectors: Mapping[str, bytes] = field(default_factory=dict)
    single_use: SingleUse = field(default_factory=SingleUse, repr=False, compare=False)

    def on_masked_input(self, peer: str, body: bytes) -> "Collecting":
        """Take one device's masked vector: step 6.

        Raises:
            ProtocolError: Not its signed vector for this plan, of another size, or its second.
        """
        session = self.established.session
        checks.may_answer(peer, self.plan.members, self.vectors, "masked input")
        signer = session.peers[peer].identity
        size, bits = session.spec.vector.size, session.spec.vector.ring_bits
        header, packed = envelope.open_vector(body, ring.packed_size(size, bits), signer, peer)
        if (header.plan, header.device) != (self.digest, peer):
            raise ProtocolError("masked input is for another plan or of another device", peer)
        try:
            self.single_use.require("next state")
            ring.add(self.total, packed, bits)
        except ProtocolError as error:
            raise ProtocolError(str(error), peer) from None
        self.single_use.take("next state")
        return replace(self, vectors={**self.vectors, peer: header.vector}, single_use=SingleUse())

    def close(self) -> "tuple[Confirming | Unmasking, dict[str, bytes]] | RoundAborted":
        """End step 6: who answered are the survivors. The bytes go to each of them."""
        aborted = too_few(self.established.session.spec, len(self.vectors), "masked inputs", self.established)
        if aborted:
            return aborted
        self.single_use.take("end of the step")
        # A masked input proves that its sender has its boxes.
        proven = replace(self.established, delivered=self.established.delivered | set(self.vectors))
        message = Survivors(self.digest, self.vectors)
        survivor_set = SurvivorSet(proven, self.plan, message, message.digest(), self.total)
        if proven.session.spec.adversary is Adversary.HONEST_BUT_CURIOUS:
            return Unmasking(survivor_set, survivor_set.devices), dict.fromkeys(
                survivor_set.devices, survivor_set.unmask({})
            )
        return Confirming(survivor_set), dict.fromkeys(survivor_set.devices, envelope.sign(proven.key, message))


@dataclass(frozen=True, slots=True)
class SurvivorSet:
    """Who survived, with the digest of that message, and the sum of what they sent, still masked."""

    established: "Established"
    plan: Plan
    survivors: Survivors
    digest: bytes
    total: Ring = field(repr=False, compare=False)

    @property
    def session(self) -> Session:
        """The public side."""
        return self.established.session

    @property
    def devices(self) -> tuple[str, ...]:
        """The survivors, in ascending order."""
        return tuple(sorted(self.survivors.vectors))

    @property
    def dropped(self) -> tuple[str, ...]:
        """Who is in the plan and is no survivor."""
        return tuple(device for device in self.plan.members if device not in self.survivors.vectors)

    def open_verified(self, kind: type[M], peer: str, body: bytes) -> M:
        """Open a message of a survivor's."""
        return envelope.open_verified(kind, body, self.session.peers[peer].identity, peer)

    def unmask(self, signatures: Mapping[str, bytes]) -> bytes:
        """The request to open the sum, with the agreements in it."""
        return envelope.sign(self.established.key, Unmask(self.survivors, signatures))

    def aborted(
        self, reason: AbortReason, detail: str, blamed: Collection[str] = (), excluded: Collection[str] = ()
    ) -> RoundAborted:
        """The end of this round without a sum. ``excluded``: who is in no further round of the session."""
        after = replace(self.established, excluded=self.established.excluded.union(excluded))
        return RoundAborted(reason, detail, after, tuple(sorted(blamed)))


@dataclass(frozen=True, slots=True)
class Confirming:
    """The survivor set is out; agreements come in."""

    survivor_set: SurvivorSet
    consistency_signatures: Mapping[str, bytes] = field(default_factory=dict)

    def on_consistency_signature(self, peer: str, body: bytes) -> "Confirming":
        """Take one survivor's agreement: step 7.

        Raises:
            ProtocolError: Not its signature on this survivor set, or its second.
        """
        checks.may_answer(
            peer, self.survivor_set.survivors.vectors, self.consistency_signatures, "consistency-signature"
        )
        message = self.survivor_set.open_verified(ConsistencySignature, peer, body)
        if message != ConsistencySignature(self.survivor_set.digest, peer):
            raise ProtocolError("agreement is on another survivor set or of another device", peer)
        return replace(self, consistency_signatures={**self.consistency_signatures, peer: envelope.signature(body)})

    def close(self) -> "tuple[Unmasking, dict[str, bytes]] | RoundAborted":
        """End step 7. The bytes, a quorum of agreements, go to each that agreed."""
        agreed, quorum = tuple(sorted(self.consistency_signatures)), self.survivor_set.session.spec.quorum
        if len(agreed) < quorum:
            detail = f"{len(agreed)} agreements, {quorum} are needed"
            return self.survivor_set.aborted(AbortReason.TOO_FEW, detail)
        body = self.survivor_set.unmask({device: self.consistency_signatures[device] for device in agreed[:quorum]})
        return Unmasking(self.survivor_set, agreed), dict.fromkeys(agreed, body)


@dataclass(frozen=True, slots=True)
class Unmasking:
    """The unmask request is out; openings come in. ``asked``: who may answer."""

    survivor_set: SurvivorSet
    asked: tuple[str, ...]
    responses: Mapping[str, UnmaskResponse] = field(default_factory=dict)
    single_use: SingleUse = field(default_factory=SingleUse, repr=False, compare=False)

    def on_unmask_response(self, peer: str, body: bytes) -> "Unmasking":
        """Take one survivor's shares: step 8.

        Raises:
            ProtocolError: Not its signed opening of this survivor set, its second, or with a share that it does
                not owe.
        """
        checks.may_answer(peer, self.asked, self.responses, "opening")
        message = self.survivor_set.open_verified(UnmaskResponse, peer, body)
        if (message.survivors, message.device) != (self.survivor_set.digest, peer):
            raise ProtocolError("opening is of another survivor set or device", peer)
        alive, dropped = checks.shares_to_reveal(
            self.survivor_set.session, self.survivor_set.plan, peer, self.survivor_set.survivors
        )
        if not (set(message.seeds) <= set(alive) and set(message.keys) <= set(dropped)):
            raise ProtocolError("opening has a share that it does not owe", peer)
        return replace(self, responses={**self.responses, peer: message})  # with the same latch: one sum

    def close(self, threads: int = 1) -> "tuple[Established, RoundResult] | RoundAborted":
        """End step 8: open the sum, or nothing. ``threads`` are those of ``masks.apply``."""
        survivor_set, least = self.survivor_set, self.survivor_set.session.spec.threshold
        if len(self.responses) < least:
            return survivor_set.aborted(AbortReason.TOO_FEW, f"{len(self.responses)} openings, {least} are needed")
        recovery = Recovery(
            survivor_set.session, survivor_set.plan, survivor_set.established.encrypted_shares, self.responses
        )
        seeds = {device: seed for device in survivor_set.devices if (seed := recovery.seed(device))}
        keys = {device: key for device in survivor_set.dropped if (key := recovery.mask_key(device))}
        closed = sorted({*survivor_set.devices, *survivor_set.dropped} - {*seeds, *keys})
        if closed:
            detail = f"too few good shares to open {', '.join(closed[:3])}{' …' if closed[3:] else ''}"
            reason = AbortReason.UNRECOVERABLE if recovery.blamed else AbortReason.TOO_FEW
            # Its secrets would not open in the next round either.
            return survivor_set.aborted(reason, detail, recovery.blamed, recovery.blamed.intersection(closed))
        self.single_use.take("sum")
        masks.apply(survivor_set.total, _masks_to_remove(survivor_set, seeds, keys), threads)
        return _outcome(survivor_set, tuple(sorted(recovery.blamed)))


def _masks_to_remove(
    survivor_set: SurvivorSet, seeds: Mapping[str, bytes], keys: Mapping[str, bytes]
) -> Iterator[Mask]:
    """Each survivor's self mask, and what survivors share with those who dropped: the opposite of what was added."""
    session, plan = survivor_set.session, survivor_set.plan.digest()
    for device, seed in seeds.items():
        yield Mask(masks.self_key(seed, session.context, plan, device), add=False)
    for device, private in keys.items():
        publics = session.mask_keys(session.neighbors(device, seeds), survivor_set.plan.round)
        yield from masks.pair_masks(private, device, publics, session.context, plan)


def _outcome(survivor_set: SurvivorSet, blamed: tuple[str, ...]) -> "tuple[Established, RoundResult] | RoundAborted":
    """The sum, now that no mask is on it; none where honest survivors cannot have it."""
    spec = survivor_set.session.spec.vector
    try:
        values = spec.decode(survivor_set.total, len(survivor_set.devices))
    except DataError as error:
        return survivor_set.aborted(AbortReason.OUT_OF_RANGE, str(error), blamed)
    digest = ring.digest(survivor_set.total, spec.ring_bits)
    result = RoundResult(survivor_set.plan.round, values, survivor_set.devices, survivor_set.dropped, blamed, digest)
    return survivor_set.established, result
