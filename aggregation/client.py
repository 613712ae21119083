"""The device's side of the protocol: one frozen type for each state, whose methods are the legal steps.

    join → Advertised → Ready → Planned → Masked → Confirmed → Ready …
                                          Masked ───────────→ Ready …      (honest-but-curious)

Each step checks the message (``checks``), then returns the next state and the answer. A refused message raises
``ProtocolError`` and leaves the state unchanged. A state answers once: a second answer from the same state is refused,
because attacks need two answers to one step. A new plan may arrive in any state from ``Ready`` on; the secrets of the
abandoned round are then dropped.

A device that must survive a restart stores the new state (``sealed``) *before* it sends the answer."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Annotated, TypeAlias

from aggregation import checks, envelope, groups, masks, messages, ring, sharing, wire
from aggregation.entropy import Entropy
from aggregation.errors import ProtocolError, TrustError
from aggregation.masks import Mask
from aggregation.pki import Root
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.policy import Policy
from aggregation.ring import Ring
from aggregation.session import COORDINATOR, Session, commitment, refused
from aggregation.sharing import Secrets, SharePair
from aggregation.singleuse import SingleUse
from aggregation.spec import MAX_ROUNDS, Adversary, SessionSpec
from aggregation.transcript.logstate import LogState
from aggregation.wire import Codec

_SECONDS, _DEVICE_SET = wire.uint(64), wire.mapping(messages.DEVICES, wire.fixed(0), messages.MAX_COHORT)
_TIME: Codec[datetime] = Codec(  # X.509 has whole seconds
    lambda out, value: _SECONDS.write(out, int(value.timestamp())),
    lambda source: datetime.fromtimestamp(_SECONDS.read(source), UTC),
)
_DEALERS: Codec[frozenset[str]] = Codec(
    lambda out, value: _DEVICE_SET.write(out, dict.fromkeys(value, b"")),
    lambda source: frozenset(_DEVICE_SET.read(source)),
)
_PAIRS = wire.mapping(messages.DEVICES, wire.record(SharePair), messages.MAX_COHORT)
_COHORT = wire.mapping(messages.DEVICES, wire.record(PublicKey), messages.MAX_COHORT)
_Spec: TypeAlias = Annotated[SessionSpec, messages.SESSION_SPEC]
_Plan: TypeAlias = Annotated[messages.Plan, messages.Plan.codec()]
_Held: TypeAlias = Annotated[Mapping[str, SharePair], _PAIRS]
_Ends: TypeAlias = Annotated[datetime, _TIME]
_Serials: TypeAlias = Annotated[Mapping[str, int], messages.SERIALS]
_Secrets: TypeAlias = Annotated[Mapping[int, Secrets], wire.mapping(wire.uint(32), wire.record(Secrets), MAX_ROUNDS)]


@dataclass(frozen=True, slots=True)
class Device:
    """The identity of a device, the keys and limits it relies on, and what it does with keys, shares and masks."""

    identity: IdentityKey  # its signing key
    certificate: bytes  # its certificate from the authority, DER
    root: Root  # the pinned authority
    coordinator: PublicKey  # the pinned key of the coordinator
    policy: Policy  # what it requires of an offer

    def open_verified(self, kind: type[messages.M], raw: bytes) -> messages.M:
        """The message in ``raw``, if the coordinator signed it."""
        return envelope.open_repeated(kind, raw, self.coordinator, COORDINATOR)

    def sign(self, message: messages.Message) -> bytes:
        return envelope.sign(self.identity, message)

    def public_key(self, private: bytes) -> bytes:
        return masks.public_key(private)

    def deal(
        self, session: Session, me: str, share_key: bytes, secrets: Mapping[int, Secrets], entropy: Entropy
    ) -> tuple[dict[int, SharePair], dict[str, messages.EncryptedShares]]:
        return sharing.deal(session, me, share_key, secrets, entropy)

    def decrypt(
        self, session: Session, me: str, share_key: bytes, dealt: Mapping[str, messages.EncryptedShares]
    ) -> Iterator[tuple[str, Mapping[int, SharePair]]]:
        """Dealer → round → pair, of the dealers whose shares ``sharing.decrypt`` accepts."""
        key = masks.private_key(share_key)
        for dealer, encrypted in dealt.items():
            yield dealer, sharing.decrypt(session, key, dealer, me, encrypted) or {}

    def mask(self, vector: Ring, planned: "Planned", threads: int) -> None:
        """Mask a vector in place, for the plan of ``planned``."""
        masks.apply(vector, planned.round_masks(planned.plan.digest()), threads)

    def log_state_of(
        self, joined: "Advertised", known: LogState | None, proof: bytes, *, other_base: bool = False
    ) -> LogState:
        """Verify that the log of an offered session follows the log that this device knows. Raises ProtocolError.
        ``other_base``: as of ``LogState.on_session_chain_proof``."""
        if known is None:
            return LogState.initial(self.coordinator, proof, joined.offer, joined.me)
        return known.on_session_chain_proof(self.coordinator, proof, joined.offer, other_base=other_base)

    def followed(self, known: LogState, receipt: bytes, plan: messages.Plan) -> LogState:
        """Verify the log: this device's messages of its last round are in it, and its newest adapter is the plan's.
        Raises ProtocolError."""
        after = known.on_receipt(self.coordinator, receipt)
        after.require_newest(plan)
        return after


def check_in(
    identity: IdentityKey,
    certificate: bytes,
    coordinator: PublicKey,
    challenge: bytes,
    *,
    node: int,
    last_offer: bytes | None,
) -> bytes:
    """Answer a challenge (step 0): the certificate, signed with its key. No state changes. ``node``: Flower's id of the
    node that this device runs as. ``last_offer``: digest of the last offer that this device joined, if it keeps a log
    state. Raises ProtocolError: the challenge is not the coordinator's, or is for another node."""
    message = envelope.open_verified(messages.Challenge, challenge, coordinator, COORDINATOR)
    checks.challenge(node, message)
    return envelope.sign(identity, messages.CheckIn(message.digest(), certificate, last_offer))


def join(device: Device, offer: bytes, entropy: Entropy, at: datetime | None = None) -> tuple["Advertised", bytes]:
    """Accept an offer (step 2) and generate the keys of every round; the answer is the advert.

    ``at``: the time at which certificates must be valid, if the device has a clock it trusts. Raises ProtocolError: the
    offer is not the coordinator's, names an uncertified or repeated member, does not include this device, or breaks
    this device's policy."""
    message = device.open_verified(messages.Offer, offer)
    me, cohort = _find_self(device, message, at)
    digest, rounds = message.digest(), range(1, message.spec.rounds + 1)
    share_key = entropy.bytes(masks.KEY)
    secrets = {round_: Secrets(entropy.bytes(masks.KEY), entropy.bytes(masks.KEY)) for round_ in rounds}
    advert = messages.Advert(
        offer=digest,
        device=me,
        share_key=device.public_key(share_key),
        mask_keys=tuple(device.public_key(secrets[round_].mask_key) for round_ in rounds),
        commitments=tuple(commitment(secrets[round_].seed, digest, me, round_) for round_ in rounds),
    )
    signed = device.sign(advert)
    ends = checks.session_end(device.root, message.certificates)
    serials = checks.serials(cohort, message.certificates)
    return Advertised(me, message.spec, digest, cohort, serials, ends, signed, share_key, secrets), signed


def _find_self(device: Device, offer: messages.Offer, at: datetime | None) -> tuple[str, Mapping[str, PublicKey]]:
    cohort = checks.members(device.root, offer.certificates, device.coordinator, at)
    device.policy.check(offer.spec, len(cohort))
    try:
        me, key = device.root.verify(device.certificate, at)
    except TrustError as error:
        raise ProtocolError(f"this device's own certificate: {error}", about="device.certificate") from None
    if key != device.identity.public or cohort.get(me) != key:
        raise refused("offer does not include this device with its own key", "offer.self")
    return me, cohort


@dataclass(frozen=True, slots=True)
class Advertised:
    """The advert is sent; the roster is next. ``serials`` and ``ends``: see ``Ready``."""

    me: messages.DeviceId
    spec: _Spec
    offer: messages.Digest
    cohort: Annotated[Mapping[str, PublicKey], _COHORT]
    serials: _Serials
    ends: _Ends
    advert: Annotated[bytes, wire.blob(2 * messages.Advert.LIMIT)]
    share_key: messages.Key = field(repr=False)
    secrets: _Secrets = field(repr=False)
    single_use: SingleUse = field(default_factory=SingleUse, repr=False, compare=False)

    def on_roster(self, device: Device, roster: bytes, entropy: Entropy) -> "tuple[Ready, bytes]":
        """Check the roster and share the secrets of every round (steps 3 and 4); the answer is the encrypted shares.
        Raises ProtocolError: the roster is not the coordinator's for this offer, is too small, has an advert that is
        repeated, replayed, unsigned or from outside the cohort, or lacks this device's own advert."""
        message = device.open_verified(messages.Roster, roster)
        session, adverts = checks.roster(self.spec, self.offer, self.cohort, message)
        device.policy.check_roster(self.spec, len(self.cohort), len(adverts))
        if adverts.get(self.me) != self.advert:
            raise refused("roster does not have this device's own advert", "roster.self")
        self.single_use.take("shares")
        own, encrypted = device.deal(session, self.me, self.share_key, self.secrets, entropy)
        held = {round_: {self.me: pair} for round_, pair in own.items()}
        ready = Ready(session, self.serials, self.ends, self.me, 0, None, self.share_key, self.secrets, held)
        return ready, device.sign(messages.Shares(session.context, self.me, encrypted))


@dataclass(frozen=True, slots=True)
class Ready:
    session: Annotated[Session, wire.record(Session)]
    serials: _Serials  # device id → serial of its certificate, of the whole cohort
    # When the first certificate of the cohort, or the revocation list, expires; no round begins after that.
    ends: _Ends
    me: messages.DeviceId
    last_round: messages.Uint32  # the last round begun; 0 before the first
    # Devices whose encrypted shares arrived; None before they arrive.
    dealers: Annotated[frozenset[str] | None, wire.optional(_DEALERS)]
    # Decrypts the shares; None once they are decrypted.
    share_key: Annotated[bytes | None, wire.optional(wire.fixed(32))] = field(repr=False)
    secrets: _Secrets = field(repr=False)  # this device's own, of rounds still to come
    # Round → dealer → shares that this device holds, of rounds still to come.
    held: Annotated[Mapping[int, _Held], wire.mapping(wire.uint(32), _PAIRS, MAX_ROUNDS)] = field(repr=False)
    single_use: SingleUse = field(default_factory=SingleUse, repr=False, compare=False)

    def on_plan(self, device: Device, plan: bytes, at: datetime | None = None) -> "Planned":
        """Accept the plan of a round (step 5). Skipped rounds can no longer be joined; their secrets are dropped.

        ``at``: the time now, if the device has a clock it trusts. Raises ProtocolError: not the coordinator's, of
        another session or one that has ended, of a round begun before, without this device, with a neighbor that sent
        no shares, or too small."""
        message = device.open_verified(messages.Assignment, plan)
        checks.before_end(self.ends, at)
        current = self if self.share_key is None else self._decrypt(device, message)
        dealers = current.dealers or frozenset()
        checks.plan(self.session, self.me, dealers, self.last_round, message.plan)
        self.single_use.take("round")
        round_ = message.plan.round
        secrets = {number: secret for number, secret in self.secrets.items() if number > round_}
        held = {number: pairs for number, pairs in current.held.items() if number > round_}
        later = replace(current, last_round=round_, secrets=secrets, held=held, single_use=SingleUse())
        return Planned(later, message.plan, self.secrets[round_], current.held[round_])

    def _decrypt(self, device: Device, message: messages.Assignment) -> "Ready":
        checks.encrypted_shares(self.session, self.me, message.encrypted_shares)
        held = {round_: dict(pairs) for round_, pairs in self.held.items()}
        if message.encrypted_shares:
            decrypted = device.decrypt(self.session, self.me, self.share_key or b"", message.encrypted_shares)
            for dealer, pairs in decrypted:
                for round_, pair in pairs.items():
                    held[round_][dealer] = pair
        dealers = frozenset(message.encrypted_shares)
        return replace(self, dealers=dealers, share_key=None, held=held, single_use=SingleUse())


@dataclass(frozen=True, slots=True)
class Planned:
    """A round has begun; the trained vector is next. Storing this state abandons the round (``sealed``)."""

    ready: "Ready"
    plan: messages.Plan
    secrets: Secrets = field(repr=False)
    held: Mapping[str, SharePair] = field(repr=False)
    single_use: SingleUse = field(default_factory=SingleUse, repr=False, compare=False)

    @property
    def spec(self) -> SessionSpec:
        return self.ready.session.spec

    def on_plan(self, device: Device, plan: bytes, at: datetime | None = None) -> "Planned":
        """Abandon this round for a later one."""
        return self.ready.on_plan(device, plan, at)

    def contribute(self, device: Device, ring_vector: Ring, threads: int = 1) -> "tuple[Masked, bytes]":
        """Mask and sign the vector (step 6). This device's own secrets of the round are dropped. ``ring_vector``:
        result of ``spec.vector.encode``. It is masked in place, so that the plain vector does not outlive this call;
        copy it first if it is still needed. Raises DataError: the vector has another size or type."""
        bits, plan = self.spec.vector.ring_bits, self.plan.digest()
        ring.require_vector(ring_vector, self.spec.vector.size, bits)
        self.single_use.take("masked-input")
        device.mask(ring_vector, self, threads)
        packed = ring.packed_view(ring_vector, bits)
        header = messages.MaskedInput(plan, self.ready.me, hashlib.sha256(packed).digest())
        masked = Masked(self.ready, self.plan, self.held, header.vector)
        return masked, envelope.sign_vector(device.identity, header, packed)

    def round_masks(self, plan: bytes) -> list[Mask]:
        """The masks of this device for the plan with digest ``plan``: one for each peer, and the self mask."""
        session, me = self.ready.session, self.ready.me
        publics = session.mask_keys(groups.mask_peers(session, self.plan, me, self.plan.members), self.plan.round)
        pairs = masks.pair_masks(self.secrets.mask_key, me, publics, session.context, plan)
        return [*pairs, Mask(masks.self_key(self.secrets.seed, session.context, plan, me), add=True)]


@dataclass(frozen=True, slots=True)
class Masked:
    """The masked input is sent; the survivor set is next. ``vector`` is the digest of the sent vector."""

    ready: Annotated[Ready, wire.record(Ready)]
    plan: _Plan
    held: _Held = field(repr=False)
    vector: messages.Digest
    single_use: SingleUse = field(default_factory=SingleUse, repr=False, compare=False)

    def on_plan(self, device: Device, plan: bytes, at: datetime | None = None) -> "Planned":
        return self.ready.on_plan(device, plan, at)

    def on_survivors(self, device: Device, survivors: bytes) -> tuple["Confirmed", bytes]:
        """Check the survivor set and sign it, once (step 7); the answer is the consistency signature. Raises
        ProtocolError: not the coordinator's for this plan, without this device and its own vector, with a device from
        outside the plan, or too small; or the session runs no consistency check."""
        self._require_adversary(Adversary.ACTIVE, "survivor set")
        message = device.open_verified(messages.Survivors, survivors)
        checks.survivors(self.ready.session, self.plan, self.ready.me, self.vector, message)
        self.single_use.take("consistency-signature")
        confirmed = Confirmed(self.ready, self.plan, self.held, message)
        return confirmed, device.sign(messages.ConsistencySignature(message.digest(), self.ready.me))

    def on_unmask(self, device: Device, unmask: bytes) -> tuple["Ready", bytes]:
        """Reveal shares for a survivor set without a consistency check (step 8, honest-but-curious sessions only).
        Raises ProtocolError as ``on_survivors``; always in an active session."""
        self._require_adversary(Adversary.HONEST_BUT_CURIOUS, "unmask request without consistency signatures")
        message = device.open_verified(messages.Unmask, unmask)
        checks.survivors(self.ready.session, self.plan, self.ready.me, self.vector, message.survivors)
        self.single_use.take("unmask-response")
        return self.ready, _unmask_response(device, self.ready, self.plan, self.held, message.survivors)

    def _require_adversary(self, adversary: Adversary, what: str) -> None:
        model = self.ready.session.spec.adversary
        if model is not adversary:
            text = f"a session against an {model.value} coordinator has no step with a {what}"
            raise refused(text, "session.adversary")


@dataclass(frozen=True, slots=True)
class Confirmed:
    """This device signed a survivor set; the signatures of the others are next."""

    ready: Annotated[Ready, wire.record(Ready)]
    plan: _Plan
    held: _Held = field(repr=False)
    survivors: Annotated[messages.Survivors, messages.Survivors.codec()]
    single_use: SingleUse = field(default_factory=SingleUse, repr=False, compare=False)

    def on_plan(self, device: Device, plan: bytes, at: datetime | None = None) -> "Planned":
        return self.ready.on_plan(device, plan, at)

    def on_unmask(self, device: Device, unmask: bytes) -> tuple["Ready", bytes]:
        """Reveal shares for the survivor set that this device signed (step 8). The shares of the round are dropped.
        Raises ProtocolError: not the coordinator's, another survivor set, or too few valid signatures on it."""
        message = device.open_verified(messages.Unmask, unmask)
        if message.survivors != self.survivors:
            raise refused("unmask request is for another survivor set than this device signed", "unmask.survivors")
        session, signatures = self.ready.session, message.consistency_signatures
        checks.consistency_signatures(session, self.plan, message.survivors, signatures)
        self.single_use.take("unmask-response")
        return self.ready, _unmask_response(device, self.ready, self.plan, self.held, message.survivors)


def _unmask_response(
    device: Device, ready: "Ready", plan: messages.Plan, held: Mapping[str, SharePair], survivors: messages.Survivors
) -> bytes:
    """One kind of share for each dealer: of the seed of a survivor, of the mask key of a dropout."""
    survived, dropped = checks.shares_to_reveal(ready.session, plan, ready.me, survivors)
    seeds = {dealer: held[dealer].seed for dealer in survived if dealer in held}
    keys = {dealer: held[dealer].key for dealer in dropped if dealer in held}
    return device.sign(messages.UnmaskResponse(survivors.digest(), ready.me, seeds, keys))
