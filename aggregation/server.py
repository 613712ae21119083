"""The coordinator's side of the protocol: one frozen type for each state, whose methods are the legal steps.

    open_session → Offering → Sharing → Established → Collecting → Confirming → Unmasking → Established …
                                                      Collecting ─────────────→ Unmasking     (honest-but-curious)

``on_…`` takes one device's answer and returns the next state. A bad answer raises ``ProtocolError`` with the peer's
name and leaves the state unchanged; the caller counts that peer as dropped out. ``close`` ends a step with the devices
that have answered: the caller decides when. If too few answered it returns ``RoundAborted``, with the session for the
next round. A round ends with the sum of its survivors, or of each group of them, or without; never with another sum."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum
from functools import partial

import numpy as np
from numpy.typing import NDArray

from aggregation import checks, envelope, groups, masks, messages, ring, sharing
from aggregation.checks import CheckedInput
from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, ProtocolError
from aggregation.groups import GroupSum
from aggregation.masks import Mask
from aggregation.pki import Root
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.recovery import Recovery, masks_to_remove
from aggregation.ring import Ring
from aggregation.session import Session
from aggregation.singleuse import SingleUse
from aggregation.spec import Adversary, SessionSpec


class AbortReason(Enum):
    TOO_FEW = "too-few"  # too few devices are left, at any step
    UNRECOVERABLE = "unrecoverable"  # shares are wrong, and too few good ones are left
    SESSION_OVER = "session-over"  # the session has no round left, or a certificate of its cohort expired


@dataclass(frozen=True, slots=True)
class RoundAborted:
    """A round without a result. ``session`` begins the next round; None if no session was established.

    ``blamed``: devices found to have dealt or revealed a wrong share. ``unmasked``: the survivors, if devices were
    asked to unmask their sum, or with groups to sign: they help to another one from the same adapter over the same
    devices. ``named``: the survivors, if they were named to devices; a sum with noise counts as revealed from then on.
    """

    reason: AbortReason
    detail: str
    session: "Established | None"
    blamed: tuple[str, ...] = ()
    unmasked: tuple[str, ...] = ()
    named: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RoundResult:
    round: int  # its number in the session, from 1
    sums: tuple[GroupSum, ...]  # in the order of the groups; one without groups
    dropped: tuple[str, ...]  # devices of the plan that are in no sum
    blamed: tuple[str, ...]  # devices found to have dealt or revealed a wrong share
    digest: bytes  # see ``groups.digest_of``

    @property
    def survivors(self) -> tuple[str, ...]:
        """Devices whose contributions are in a sum, in ascending order."""
        return tuple(sorted(device for each in self.sums for device in each.survivors))

    @property
    def values(self) -> dict[str, NDArray[np.float64]]:
        """Segment name → total of all sums that count."""
        return groups.total(self.sums)


def too_few(spec: SessionSpec, count: int, what: str, session: "Established | None") -> RoundAborted | None:
    """The abort of a round with fewer devices than its session requires, or None if there are enough."""
    try:
        checks.enough_devices(spec, count, what)
    except ProtocolError as error:
        return RoundAborted(AbortReason.TOO_FEW, str(error), session)
    return None


def _too_few_of(
    session: "Established", plan: messages.Plan, present: Collection[str], what: str
) -> RoundAborted | None:
    """As ``too_few``, also for a group that has fewer devices than its minimum."""
    spec = session.session.spec
    try:
        checks.enough_devices(spec, len(present), what)
        groups.require_minimum(spec, plan, present, what, about="group")
    except ProtocolError as error:
        return RoundAborted(AbortReason.TOO_FEW, str(error), session)
    return None


@dataclass(frozen=True, slots=True)
class Coordinator:
    """The coordinator's signing key, and what it does with shares and masks."""

    key: IdentityKey

    def sign(self, message: messages.Message) -> bytes:
        return envelope.sign(self.key, message)

    def accepts(self, shares: Mapping[str, messages.EncryptedShares], rounds: int) -> bool:
        """Whether all shares of a dealer have the size of shares for ``rounds`` rounds."""
        return all(sharing.fits(encrypted, rounds) for encrypted in shares.values())

    def recovery(
        self,
        session: Session,
        plan: messages.Plan,
        dealt: Mapping[str, Mapping[str, messages.EncryptedShares]],
        responses: Mapping[str, messages.UnmaskResponse],
        corrupt: int | None,
    ) -> Recovery:
        return Recovery(session, plan, dealt, responses, corrupt)

    def unmask(self, total: Ring, remove: Iterable[Mask], threads: int) -> None:
        masks.apply(total, remove, threads)


def open_session(
    coordinator: Coordinator,
    root: Root,
    spec: SessionSpec,
    certificates: Mapping[str, bytes],
    entropy: Entropy,
    at: datetime | None = None,
) -> tuple["Offering", bytes]:
    """Offer a session to a cohort (step 1).

    Args:
        spec: Parameters; the degree is the cohort size less one, or even and below that (``graph.graph_parameters``).
        certificates: Device id → certificate, DER.

    Returns:
        The first state, and the signed offer for every device of the cohort.

    Raises ProtocolError: a certificate is not the authority's, or is filed under another device's id; ConfigError: the
    spec's degree does not fit a cohort of this size."""
    offer = messages.Offer(entropy.bytes(32), spec, tuple(der for _, der in sorted(certificates.items())))
    cohort = checks.members(root, offer.certificates, coordinator.key.public, at)
    if list(cohort) != sorted(certificates):
        raise ProtocolError("a certificate is filed under another device's id", about="offer.certificates")
    if spec.degree >= len(cohort) or (spec.degree < len(cohort) - 1 and spec.degree % 2):
        raise ConfigError(
            f"degree {spec.degree} with {len(cohort)} devices: it must be {len(cohort) - 1}, or even and below that",
            about="spec.degree",
        )
    ends = checks.session_end(root, offer.certificates)
    return Offering(coordinator, spec, offer.digest(), cohort, ends), coordinator.sign(offer)


@dataclass(frozen=True, slots=True)
class Offering:
    """The offer is sent; adverts arrive. ``ends``: see ``checks.session_end``. ``keys``: the X25519 keys in the adverts
    so far."""

    coordinator: Coordinator
    spec: SessionSpec
    offer: bytes
    cohort: Mapping[str, PublicKey]
    ends: datetime
    adverts: Mapping[str, bytes] = field(default_factory=dict)
    keys: frozenset[bytes] = field(default=frozenset(), repr=False)

    def on_advert(self, peer: str, body: bytes) -> "Offering":
        """Accept one device's advert (step 2). Raises ProtocolError: not its signed advert for this offer, its second,
        or with a key of another device. The device that copies is refused, so that it cannot spoil the session of
        all."""
        checks.may_answer(peer, self.cohort, self.adverts, messages.Advert.TAG)
        keys = checks.advert(self.offer, self.spec.rounds, self.cohort[peer], peer, body).keys
        if keys & self.keys:
            raise ProtocolError("advert has a key of another device", peer, about="advert.copied")
        return replace(self, adverts={**self.adverts, peer: body}, keys=self.keys | keys)

    def close(self) -> "tuple[Sharing, bytes] | RoundAborted":
        """End step 2; the bytes are the roster, for every device on it."""
        if aborted := too_few(self.spec, len(self.adverts), "adverts", None):
            return aborted
        roster = messages.Roster(self.offer, tuple(raw for _, raw in sorted(self.adverts.items())))
        session, _ = checks.roster(self.spec, self.offer, self.cohort, roster)
        return Sharing(self.coordinator, session, self.ends), self.coordinator.sign(roster)


@dataclass(frozen=True, slots=True)
class Sharing:
    """The roster is sent; encrypted shares arrive. ``encrypted_shares``: dealer → holder → shares."""

    coordinator: Coordinator
    session: Session
    ends: datetime
    encrypted_shares: Mapping[str, Mapping[str, messages.EncryptedShares]] = field(default_factory=dict)

    def on_shares(self, peer: str, body: bytes) -> "Sharing":
        """Accept one device's encrypted shares (step 4). Raises ProtocolError: not its signed shares of this session,
        for each neighbor and no other device."""
        checks.may_answer(peer, self.session.peers, self.encrypted_shares, messages.Shares.TAG)
        message = envelope.open_verified(messages.Shares, body, self.session.peers[peer].identity, peer)
        checks.refers_to(peer, messages.Shares.TAG, message.device, "context", message.context, self.session.context)
        shares = message.encrypted_shares
        if set(shares) != set(self.session.neighbors(peer, self.session.peers)):
            raise ProtocolError("shares are not for exactly its neighbors", peer, about="shares.holders")
        if not self.coordinator.accepts(shares, self.session.spec.rounds):
            raise ProtocolError("encrypted shares have the wrong size", peer, about="shares.size")
        return replace(self, encrypted_shares={**self.encrypted_shares, peer: shares})

    def close(self) -> "Established | RoundAborted":
        """End step 4. A device that sent no shares is in no round of this session."""
        aborted = too_few(self.session.spec, len(self.encrypted_shares), "devices that sent shares", None)
        return aborted or Established(self.coordinator, self.session, self.ends, self.encrypted_shares)


@dataclass(frozen=True, slots=True)
class Established:
    coordinator: Coordinator
    session: Session
    # When the first certificate of the cohort, or the revocation list, expires; no round begins after that.
    ends: datetime
    encrypted_shares: Mapping[str, Mapping[str, messages.EncryptedShares]]  # dealer → holder → shares
    last_round: int = 0  # the last round begun
    delivered: frozenset[str] = frozenset()  # devices known to have their encrypted shares
    # Devices whose secrets could not be reconstructed by their own fault: in no further round.
    excluded: frozenset[str] = frozenset()

    @property
    def rounds_left(self) -> int:
        return self.session.spec.rounds - self.last_round

    def is_over(self, at: datetime | None) -> bool:
        """Whether no round may begin any more at the time ``at``: none is left, or a certificate has expired."""
        return not self.rounds_left or (at is not None and at > self.ends)

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices that may take part, in ascending order."""
        return tuple(sorted(set(self.encrypted_shares) - self.excluded))

    def plan(
        self,
        *,
        adapter_version: int,
        adapter_digest: str,
        training: bytes,
        cohort: Collection[str] | None,
        dealt: Collection[str] = (),
        at: datetime | None = None,
    ) -> "tuple[Collecting, dict[str, bytes]] | RoundAborted":
        """Begin a round (step 5).

        Args:
            training: Settings for the trainer, not interpreted here.
            cohort: The devices of ``devices`` that take part; None for all.
            dealt: All that were dealt into groups in an earlier round from this adapter, if it must be repeated.
            at: The time at which the certificates of the session must be valid.

        Returns:
            The next state, and the signed assignment for each member.
        """
        if self.is_over(at):
            text = "the session has no round left, or a certificate of its cohort expired: open a new one"
            return RoundAborted(AbortReason.SESSION_OVER, text, self)
        members = tuple(device for device in self.devices if cohort is None or device in cohort)
        begun = replace(self, last_round=self.last_round + 1)
        former = tuple(sorted(set(dealt).difference(members)))
        plan = messages.Plan(
            self.session.context, begun.last_round, members, adapter_version, adapter_digest, training, former
        )
        if aborted := _too_few_of(self, plan, members, "members of the plan"):
            return aborted
        alike = self.coordinator.sign(messages.Assignment(plan, {}))  # for all that have their shares
        out = {device: alike if device in self.delivered else self._assignment(plan, device) for device in members}
        spec = self.session.spec
        totals = tuple(ring.zeros(spec.vector.size, spec.vector.ring_bits) for _ in range(spec.groups))
        return Collecting(begun, plan, plan.digest(), totals), out

    def _assignment(self, plan: messages.Plan, device: str) -> bytes:
        dealers = self.session.neighbors(device, self.encrypted_shares)
        encrypted = {dealer: self.encrypted_shares[dealer][device] for dealer in dealers}
        return self.coordinator.sign(messages.Assignment(plan, encrypted))


@dataclass(frozen=True, slots=True)
class Collecting:
    """The plan is sent; masked inputs arrive and are added as they arrive, so that none is kept. ``totals`` has one
    buffer for each group, which all successors share: a state that has a successor refuses further inputs. ``digest``
    is the plan's; ``vectors`` holds the digest of each device's vector."""

    established: "Established"
    plan: messages.Plan
    digest: bytes
    totals: tuple[Ring, ...] = field(repr=False, compare=False)
    vectors: Mapping[str, bytes] = field(default_factory=dict)
    single_use: SingleUse = field(default_factory=SingleUse, repr=False, compare=False)

    def on_masked_input(self, peer: str, body: bytes) -> "Collecting":
        """Accept one device's masked vector (step 6): ``check`` it and ``add`` it. Raises ProtocolError: not its signed
        vector for this plan, of another size, or its second."""
        return self.add(peer, self.check(peer, body))

    def check(self, peer: str, body: bytes) -> CheckedInput:
        """Check one device's masked vector: most of the work. Any state of the round may do so, in any thread. Raises
        ProtocolError: not its signed vector for this plan, or of another size."""
        checks.may_answer(peer, self.plan.members, (), messages.MaskedInput.TAG)
        return checks.masked_input(self.established.session, self.digest, peer, body)

    def add(self, peer: str, checked: CheckedInput) -> "Collecting":
        """Add a device's masked vector to the sum of its group. Raises ProtocolError: it is the second of its device,
        was checked for another device or plan, or has unused bits that are not zero."""
        checks.may_answer(peer, self.plan.members, self.vectors, messages.MaskedInput.TAG)
        checks.refers_to(peer, messages.MaskedInput.TAG, checked.device, "plan", checked.plan, self.digest)
        spec = self.established.session.spec
        with ProtocolError.blaming(peer, ProtocolError):
            self.single_use.require("successor")
            ring.add(self.totals[groups.of_plan(spec, self.plan)[peer]], checked.packed, spec.vector.ring_bits)
        self.single_use.take("successor")
        return replace(self, vectors={**self.vectors, peer: checked.vector}, single_use=SingleUse())

    def close(self) -> "tuple[Confirming | Unmasking, dict[str, bytes]] | RoundAborted":
        """End step 6: the devices that answered are the survivors. Returns the message for each of them."""
        if aborted := _too_few_of(self.established, self.plan, self.vectors, "masked inputs"):
            return aborted
        self.single_use.take("survivor set")
        # A masked input proves that its sender has its encrypted shares.
        proven = replace(self.established, delivered=self.established.delivered | set(self.vectors))
        message = messages.Survivors(self.digest, self.vectors)
        survivor_set = SurvivorSet(proven, self.plan, message, message.digest(), self.totals)
        if proven.session.spec.adversary is Adversary.HONEST_BUT_CURIOUS:
            body = survivor_set.unmask({})
            return Unmasking(survivor_set, survivor_set.devices), dict.fromkeys(survivor_set.devices, body)
        return Confirming(survivor_set), dict.fromkeys(survivor_set.devices, proven.coordinator.sign(message))


@dataclass(frozen=True, slots=True)
class SurvivorSet:
    """The survivors of a round, the digest of that message, and the sum of their vectors by group, still masked."""

    established: "Established"
    plan: messages.Plan
    survivors: messages.Survivors
    digest: bytes
    totals: tuple[Ring, ...] = field(repr=False, compare=False)

    @property
    def session(self) -> Session:
        return self.established.session

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(sorted(self.survivors.vectors))

    @property
    def dropped(self) -> tuple[str, ...]:
        return tuple(device for device in self.plan.members if device not in self.survivors.vectors)

    def open_verified(self, kind: type[messages.M], peer: str, body: bytes) -> messages.M:
        """The message in ``body``, if the survivor ``peer`` signed it."""
        return envelope.open_verified(kind, body, self.session.peers[peer].identity, peer)

    def unmask(self, signatures: Mapping[str, bytes]) -> bytes:
        """The signed request to unmask the sum, with the consistency signatures in it."""
        return self.established.coordinator.sign(messages.Unmask(self.survivors, signatures))

    def aborted(
        self, reason: AbortReason, detail: str, blamed: Collection[str] = (), excluded: Collection[str] = ()
    ) -> RoundAborted:
        """The abort after the unmask request. ``excluded``: devices that are in no further round of the session."""
        after = replace(self.established, excluded=self.established.excluded.union(excluded))
        return RoundAborted(reason, detail, after, tuple(sorted(blamed)), self.devices, self.devices)


@dataclass(frozen=True, slots=True)
class Confirming:
    """The survivor set is sent; consistency signatures arrive."""

    survivor_set: SurvivorSet
    consistency_signatures: Mapping[str, bytes] = field(default_factory=dict)

    def on_consistency_signature(self, peer: str, body: bytes) -> "Confirming":
        """Accept one survivor's consistency signature (step 7). Raises ProtocolError: not its signature on this
        survivor set, or its second."""
        survivor_set, tag = self.survivor_set, messages.ConsistencySignature.TAG
        checks.may_answer(peer, survivor_set.survivors.vectors, self.consistency_signatures, tag)
        message = survivor_set.open_verified(messages.ConsistencySignature, peer, body)
        checks.refers_to(peer, tag, message.device, "survivors", message.survivors, survivor_set.digest)
        return replace(self, consistency_signatures={**self.consistency_signatures, peer: envelope.signature(body)})

    def close(self) -> "tuple[Unmasking, dict[str, bytes]] | RoundAborted":
        """End step 7: the unmask request, with a quorum of signatures (with groups: all), for all that signed."""
        signers, survivor_set = tuple(sorted(self.consistency_signatures)), self.survivor_set
        spec, named = survivor_set.session.spec, survivor_set.devices
        try:
            checks.quorum(spec, survivor_set.plan, signers)
        except ProtocolError as error:
            bound, session = named if spec.grouping else (), survivor_set.established
            return RoundAborted(AbortReason.TOO_FEW, str(error), session, unmasked=bound, named=named)
        shown = signers if spec.grouping else signers[: spec.quorum]
        body = survivor_set.unmask({device: self.consistency_signatures[device] for device in shown})
        return Unmasking(survivor_set, signers), dict.fromkeys(signers, body)


@dataclass(frozen=True, slots=True)
class Unmasking:
    """The unmask request is sent; responses arrive. ``asked``: devices that may answer."""

    survivor_set: SurvivorSet
    asked: tuple[str, ...]
    responses: Mapping[str, messages.UnmaskResponse] = field(default_factory=dict)
    single_use: SingleUse = field(default_factory=SingleUse, repr=False, compare=False)

    def on_unmask_response(self, peer: str, body: bytes) -> "Unmasking":
        """Accept one survivor's shares (step 8). Raises ProtocolError: not its signed response for this survivor set,
        its second, or with a share that it must not reveal."""
        survivor_set, tag = self.survivor_set, messages.UnmaskResponse.TAG
        checks.may_answer(peer, self.asked, self.responses, tag)
        message = survivor_set.open_verified(messages.UnmaskResponse, peer, body)
        checks.refers_to(peer, tag, message.device, "survivors", message.survivors, survivor_set.digest)
        plan, survivors = survivor_set.plan, survivor_set.survivors
        survived, dropped = checks.shares_to_reveal(survivor_set.session, plan, peer, survivors)
        if not (set(message.seeds) <= set(survived) and set(message.keys) <= set(dropped)):
            text = "response has a share that this device must not reveal"
            raise ProtocolError(text, peer, about="unmask-response.shares")
        return replace(self, responses={**self.responses, peer: message})  # shares ``single_use``: one sum

    def close(self, threads: int = 1, corrupt: int | None = None) -> "tuple[Established, RoundResult] | RoundAborted":
        """End step 8: unmask the sum, or reveal nothing. ``threads``: of ``masks.apply``; ``corrupt``: ``Recovery``."""
        survivor_set, session = self.survivor_set, self.survivor_set.session
        if len(self.responses) < (least := session.spec.threshold):
            detail = f"{len(self.responses)} unmask responses, {least} are needed"
            return survivor_set.aborted(AbortReason.TOO_FEW, detail)
        coordinator, dealt = survivor_set.established.coordinator, survivor_set.established.encrypted_shares
        recovery = coordinator.recovery(session, survivor_set.plan, dealt, self.responses, corrupt)
        seeds = {device: seed for device in survivor_set.devices if (seed := recovery.seed(device))}
        keys = {device: key for device in survivor_set.dropped if (key := recovery.mask_key(device))}
        missing = sorted({*survivor_set.devices, *survivor_set.dropped} - {*seeds, *keys})
        if missing:
            devices = f"{', '.join(missing[:3])}{' …' if missing[3:] else ''}"
            detail = f"too few good shares to reconstruct the secrets of {devices}"
            reason = AbortReason.UNRECOVERABLE if recovery.blamed else AbortReason.TOO_FEW
            # Their secrets could not be reconstructed in the next round either.
            return survivor_set.aborted(reason, detail, recovery.blamed, recovery.blamed.intersection(missing))
        self.single_use.take("sum")
        plan, totals, blamed = survivor_set.plan, survivor_set.totals, tuple(sorted(recovery.blamed))
        by_group = groups.split(session.spec, plan, survivor_set.devices)
        for survivors, total in zip(by_group, totals, strict=True):
            coordinator.unmask(total, masks_to_remove(session, plan, survivors, seeds, keys), threads)
        sums = tuple(map(partial(GroupSum.of, session.spec), by_group, totals))
        result = RoundResult(plan.round, sums, survivor_set.dropped, blamed, groups.digest_of(session.spec, totals))
        return survivor_set.established, result
