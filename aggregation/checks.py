"""The checks, one function each: everything a machine requires of a message before it acts on it.

They are pure and raise ``ProtocolError``; nothing is logged and ignored. Rules by step of docs/reference/protocol.md:

0. challenge: from the coordinator, for the node that this device runs as. check-in: certified, and signed with the
   certified key for this challenge.
1. offer: certified members, none repeated; this device among them with its own key; the device's policy holds.
3. roster: adverts of members, none repeated, signed, for this offer; my own unchanged; ``threshold`` of them or more.
4. encrypted shares: from neighbors on the roster; enough of them.
5. plan: this session, which has not ended; a round not begun before; I am in U1; I have shares of my neighbors in U1;
   U1 is large enough and has enough of my neighbors, and each group its minimum.
6. masked input: signed, for this plan, with exactly the vector that was signed.
7. survivors: this plan; U2 within U1; I am in U2 with my own vector; U2 is large enough and has enough of my neighbors,
   and each group its minimum.
8. unmask: a quorum of consistency signatures, from anywhere in the graph, on exactly the survivor set that I signed,
   and of each group its minimum.
"""

import itertools
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache

from aggregation import envelope, groups, masks, messages, ring
from aggregation.errors import ConfigError, ProtocolError, TrustError
from aggregation.pki import Root
from aggregation.pki.certificates import load, not_after, same_name, serial
from aggregation.pki.identity import PublicKey
from aggregation.session import COORDINATOR, Peer, Session, context_of, refused
from aggregation.spec import SessionSpec

COHORTS = 4  # of which a process keeps what it verified: the devices that it simulates are in one or two


def may_answer(peer: str, asked: Container[str], answered: Container[str], tag: str) -> None:
    """Check that ``peer`` may send the message ``tag`` now: it was asked and has not answered. Raises ProtocolError."""
    if peer not in asked:
        raise ProtocolError(f"{tag} from a device that was not asked", peer, about=f"{tag}.peer")
    if peer in answered:
        raise ProtocolError(f"second {tag} of this device", peer, about=f"{tag}.repeated")


def refers_to(peer: str, tag: str, device: str, field: str, found: bytes, expected: bytes) -> None:
    """Check that a message ``tag`` names its sender, and the offer, context, plan or survivors that it must refer to.
    Raises ProtocolError."""
    if found != expected:
        raise ProtocolError(f"{tag} message is for another {field}", peer, about=f"{tag}.{field}")
    if device != peer:
        raise ProtocolError(f"{tag} message names {device}", peer, about=f"{tag}.device")


def challenge(node: int, message: messages.Challenge) -> None:
    """Check that a device that runs as ``node`` may answer a challenge: else another node would pass for this device.
    Raises ProtocolError: it is for another node."""
    if message.node != node:
        text = f"the challenge is for node {message.node}, this device runs as node {node}"
        raise refused(text, "challenge.node")


def check_in(root: Root, asked: messages.Challenge, raw: bytes, at: datetime) -> tuple[str, messages.CheckIn]:
    """The device that answers the challenge ``asked``, and its answer. Raises ProtocolError: the authority did not
    certify a device in it for ``at``, that device did not sign it, or it answers another challenge: of another node, or
    an earlier one of this node."""
    with ProtocolError.blaming(None, TrustError):
        # Whom it claims to be from; that device's signature is then required.
        device, key = root.verify(messages.CheckIn.decode(envelope.unverified_body(raw)).certificate, at)
    message = envelope.open_verified(messages.CheckIn, raw, key, device)
    if message.challenge != asked.digest():
        raise ProtocolError("check-in is for another challenge", device, about="check-in.challenge")
    return device, message


def members(
    root: Root, certificates: Sequence[bytes], coordinator: PublicKey, at: datetime | None
) -> Mapping[str, PublicKey]:
    """Device id → identity key of a cohort, in ascending order. ``coordinator``: its key, which is no device's: a key
    has one role. Raises ProtocolError: a certificate is not the authority's, an id or key is repeated or out of order,
    or two ids differ in upper and lower case only."""
    with ProtocolError.blaming(None, TrustError):
        # Lists that are equal may differ in what an audit counts as revoked: they are no part of the key.
        cohort, numbers, begins, ends = _members(replace(root, revoked=None), tuple(certificates), coordinator)
        valid = at is None or begins <= at <= ends
        if not valid or (root.revoked is not None and not numbers.isdisjoint(root.revoked.revoked)):
            for der in certificates:
                root.verify(der, at)
    return cohort


@lru_cache(maxsize=COHORTS)
def _members(
    root: Root, certificates: tuple[bytes, ...], coordinator: PublicKey
) -> tuple[Mapping[str, PublicKey], frozenset[int], datetime, datetime]:
    """``members``, serials of certificates, and between which times all are valid: once for all devices that a
    process simulates."""
    pairs = [root.verify(der) for der in certificates]
    if not ascending(device for device, _ in pairs):
        raise ProtocolError("the cohort repeats a device, or is out of order", about="offer.order")
    if len({same_name(device) for device, _ in pairs}) != len(pairs):
        text = "two device ids of the cohort differ in upper and lower case only"
        raise ProtocolError(text, about="offer.names")
    if len({coordinator.raw, *(key.raw for _, key in pairs)}) != 1 + len(pairs):
        raise ProtocolError(
            "two devices of the cohort, or one and the coordinator, have the same key", about="offer.keys"
        )
    loaded = [load(der) for der in (*certificates, root.der)]
    numbers = frozenset(one.serial_number for one in loaded)
    begins, ends = max(one.not_valid_before_utc for one in loaded), min(one.not_valid_after_utc for one in loaded)
    return dict(pairs), numbers, begins, ends


@lru_cache(maxsize=COHORTS)
def _serials(devices: tuple[str, ...], certificates: tuple[bytes, ...]) -> Mapping[str, int]:
    return dict(zip(devices, map(serial, certificates), strict=True))


def serials(cohort: Iterable[str], certificates: Iterable[bytes]) -> Mapping[str, int]:
    """Device id → serial of its certificate, for verified certificates in the order of the cohort."""
    return _serials(tuple(cohort), tuple(certificates))


def session_end(root: Root, certificates: Iterable[bytes]) -> datetime:
    """When a session ends: with the first to expire of its cohort's certificates, the authority's own and its list."""
    listed = () if root.revoked is None else (root.revoked.next_update,)
    return min(root.not_after, *listed, _first_to_expire(tuple(certificates)))


@lru_cache(maxsize=COHORTS)
def _first_to_expire(certificates: tuple[bytes, ...]) -> datetime:
    return min(map(not_after, certificates))


def before_end(ends: datetime, at: datetime | None) -> None:
    """Check that a session that ends at ``ends`` may begin a round at ``at``. None: the device has no clock it trusts.
    Raises ProtocolError: it is over."""
    if at is not None and at > ends:
        text = f"the session ended on {ends:%Y-%m-%d at %H:%M}, when a certificate or the revocation list expired"
        raise refused(text, "plan.time")


def advert(offer: bytes, rounds: int, signer: PublicKey, device: str, raw: bytes) -> messages.Advert:
    """The advert of ``device`` for the offer with digest ``offer``. Raises ProtocolError: not signed by ``device``, for
    another offer, or without distinct valid keys for each round."""
    message = envelope.open_verified(messages.Advert, raw, signer, device)
    refers_to(device, messages.Advert.TAG, message.device, "offer", message.offer, offer)
    if not len(message.mask_keys) == len(message.commitments) == rounds:
        raise ProtocolError(
            f"advert does not have keys and commitments for {rounds} rounds", device, about="advert.mask_keys"
        )
    if len(message.keys) != 1 + rounds:
        raise ProtocolError("advert repeats a key", device, about="advert.keys")
    with ProtocolError.blaming(device, ProtocolError):
        for key in message.keys:
            masks.require_public_key(key)
    return message


def roster(
    spec: SessionSpec, offer: bytes, cohort: Mapping[str, PublicKey], message: messages.Roster
) -> tuple[Session, Mapping[str, bytes]]:
    """The session that a roster defines, and device → advert as signed. Raises ProtocolError: for another offer, below
    the threshold, an advert from outside the cohort, a device or key repeated, an advert that ``advert`` refuses, or no
    graph of the degree on so many devices."""
    return _roster(spec, offer, tuple(cohort.items()), message)


@lru_cache(maxsize=COHORTS)
def _roster(
    spec: SessionSpec, offer: bytes, members: tuple[tuple[str, PublicKey], ...], message: messages.Roster
) -> tuple[Session, Mapping[str, bytes]]:
    """``roster``: a process that simulates many devices verifies one once, and they share the session."""
    cohort = dict(members)
    if message.offer != offer:
        raise refused("roster is for another offer", "roster.offer")
    enough_devices(spec, len(message.adverts), "adverts on the roster", about="roster.size")
    signed: dict[str, bytes] = {}
    peers: dict[str, Peer] = {}
    keys: set[bytes] = set()
    for raw in message.adverts:
        # Whose advert it claims to be; ``advert`` then requires that device's signature.
        device = messages.Advert.decode(envelope.unverified_body(raw)).device
        if device not in cohort:
            raise refused(f"{device} is on the roster but not in the cohort", "roster.members")
        if peers and device <= next(reversed(peers)):
            raise refused(f"{device} is repeated on the roster, or out of order", "roster.order")
        found = advert(offer, spec.rounds, cohort[device], device, raw)
        if keys & found.keys:
            raise refused(f"{device} has a key of another device on the roster", "roster.keys")
        keys |= found.keys
        signed[device] = raw
        peers[device] = Peer(
            device, len(peers) + 1, cohort[device], found.share_key, found.mask_keys, found.commitments
        )
    with ProtocolError.blaming(COORDINATOR, ConfigError):
        return Session(spec, offer, context_of(offer, message.digest()), peers), signed


def encrypted_shares(session: Session, me: str, received: Mapping[str, messages.EncryptedShares]) -> None:
    """Check that the encrypted shares that a device receives are from neighbors only, and enough for a round. Raises
    ProtocolError."""
    strangers = set(received) - set(session.neighbors(me, session.peers))
    if strangers:
        raise refused(f"shares of {min(strangers)}, which is not a neighbor", "assignment.dealers")
    enough_neighbors(session, me, received, "sent it shares", about="assignment.neighbors")


def plan(session: Session, me: str, dealers: Collection[str], last_round: int, message: messages.Plan) -> None:
    """Check that a device may act on a plan. ``dealers``: the devices whose shares it has. Raises ProtocolError."""
    if message.context != session.context:
        raise refused("plan is for another session", "plan.context")
    if not last_round < message.round <= session.spec.rounds:
        text = f"round {message.round} is not between {last_round + 1} and {session.spec.rounds}"
        raise refused(text, "plan.round")
    if not ascending(message.members):
        raise refused("plan repeats a member, or is out of order", "plan.order")
    if me not in message.members:
        raise refused("plan does not include this device", "plan.self")
    strangers = set(message.members) - set(session.peers)
    without_shares = set(session.neighbors(me, message.members)) - set(dealers)
    if strangers or without_shares:
        device = min(strangers | without_shares)
        raise refused(f"{device} is in the plan, but this device has no shares of it", "plan.members")
    enough_devices(session.spec, len(message.members), "members of the plan", about="plan.size")
    enough_neighbors(session, me, message.members, "are in the plan", about="plan.neighbors")
    grouped(session.spec, message)


def grouped(spec: SessionSpec, message: messages.Plan) -> None:
    """Check that the groups of a plan are well-formed, and each has its minimum of members. Raises ProtocolError."""
    if message.former and spec.grouping is None:
        raise refused("plan names former members without groups", "plan.former")
    if not ascending(message.former) or not set(message.former).isdisjoint(message.members):
        raise refused("plan repeats a former member, has it out of order, or also as a member", "plan.former")
    groups.require_minimum(spec, message, message.members, "members of the plan", about="plan.group")


@dataclass(frozen=True, slots=True)
class CheckedInput:
    """A device's masked vector for a plan, not in the sum yet. ``plan`` and ``vector`` are digests; ``packed`` is a
    view of the message."""

    device: str
    plan: bytes
    vector: bytes
    packed: memoryview = field(repr=False)


def masked_input(session: Session, plan: bytes, peer: str, body: bytes) -> CheckedInput:
    """The masked vector of ``peer`` for the plan with digest ``plan``. Raises ProtocolError: not its signed vector, for
    another plan, or of another size."""
    size = ring.packed_size(session.spec.vector.size, session.spec.vector.ring_bits)
    header, packed = envelope.open_vector(body, size, session.peers[peer].identity, peer)
    refers_to(peer, messages.MaskedInput.TAG, header.device, "plan", header.plan, plan)
    return CheckedInput(peer, header.plan, header.vector, packed)


def survivors(session: Session, current: messages.Plan, me: str, vector: bytes, message: messages.Survivors) -> None:
    """Check that a device may sign and unmask a survivor set. ``vector``: digest of its own masked vector. Raises
    ProtocolError."""
    if message.plan != current.digest():
        raise refused("survivor set is for another plan", "survivors.plan")
    strangers = set(message.vectors) - set(current.members)
    if strangers:
        raise refused(f"survivor {min(strangers)} is not in the plan", "survivors.members")
    if message.vectors.get(me) != vector:
        raise refused("survivor set does not include this device with its own vector", "survivors.self")
    enough_devices(session.spec, len(message.vectors), "survivors", about="survivors.size")
    enough_neighbors(session, me, message.vectors, "survived", about="survivors.neighbors")
    groups.require_minimum(session.spec, current, message.vectors, "survivors", about="survivors.group")


def shares_to_reveal(
    session: Session, current: messages.Plan, me: str, message: messages.Survivors
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The dealers whose seed, and those whose mask key, a device reveals shares of: survivors and dropouts. No device
    is in both. The dealers are the device itself and its neighbors in the plan."""
    dealers = (me, *session.neighbors(me, current.members))
    return (
        tuple(sorted(device for device in dealers if device in message.vectors)),
        tuple(sorted(device for device in dealers if device not in message.vectors)),
    )


def consistency_signatures(
    session: Session, current: messages.Plan, message: messages.Survivors, signatures: Mapping[str, bytes]
) -> None:
    """Check that a quorum of survivors signed this set. No other set has a quorum, since a device signs one. Raises
    ProtocolError: fewer signed, also in a group; one of them is not a survivor, or a signature is not valid."""
    if strangers := [device for device in signatures if device not in message.vectors]:
        raise refused(f"{strangers[0]} signed the survivor set but is not in it", "unmask.signers")
    quorum(session.spec, current, signatures)
    with ProtocolError.blaming(COORDINATOR, ProtocolError):
        _signed(message.digest(), tuple((d, session.peers[d].identity, raw) for d, raw in signatures.items()))


def quorum(spec: SessionSpec, current: messages.Plan, signers: Collection[str]) -> None:
    """Check that enough survivors signed their set, in all and in each group. Raises ProtocolError."""
    if len(signers) < spec.quorum:
        raise refused(f"{len(signers)} consistency signatures, {spec.quorum} are needed", "unmask.quorum")
    groups.require_minimum(spec, current, signers, "consistency signatures", about="unmask.group")


@lru_cache(maxsize=COHORTS)
def _signed(survivors: bytes, signatures: tuple[tuple[str, PublicKey, bytes], ...]) -> None:
    for device, key, signature in signatures:
        envelope.verify(
            key, messages.ConsistencySignature.TAG, messages.ConsistencySignature(survivors, device).encode(), signature
        )


def enough_devices(spec: SessionSpec, count: int, what: str, *, about: str = "devices") -> None:
    """Check that ``count`` is neither below the threshold nor below the minimum of survivors. Raises ProtocolError: it
    is. ``what`` names the counted devices."""
    least = max(spec.threshold, spec.minimum_survivors)
    if count < least:
        raise refused(f"{count} {what}, {least} are needed", about)


def enough_neighbors(session: Session, me: str, present: Iterable[str], what: str, *, about: str = "neighbors") -> None:
    """Check that the neighbors of ``me`` in ``present``, and ``me`` itself, can reconstruct its secrets. Raises
    ProtocolError: they are fewer than the threshold. ``what`` says what they did."""
    count, least = 1 + len(session.neighbors(me, present)), session.spec.threshold
    if count < least:
        raise refused(f"{count} devices of this device's neighborhood {what}, {least} are needed", about)


def ascending(devices: Iterable[str]) -> bool:
    """Whether ``devices`` are strictly ascending: in order, and none repeated."""
    return all(left < right for left, right in itertools.pairwise(devices))
