"""The checks, one function each: whatever a machine demands of a message before it acts on it.

They are pure and raise ``ProtocolError``; none logs and goes on. Rules by step (docs/reference/protocol.md):

1. offer: certified members, each once; this device among them with its own key; the device's policy holds.
3. roster: adverts of members, each once, signed, for this offer; my own unchanged; ``threshold`` of them or more.
4. boxes: from neighbours on the roster; enough of them.
5. plan: this session; a round not begun before; me in U1; my neighbours in U1 among those whose shares I have; U1 large
   enough, and enough of my neighbourhood in it.
7. survivors: this plan; U2 within U1; me in U2 with my own vector; U2 large enough, my neighbourhood in it too.
8. unmask: a quorum of agreements, wherever they stand on the graph, on the very survivor set that I agreed to.
"""

import itertools
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from datetime import datetime

from aggregation import envelope, masks
from aggregation.errors import ConfigError, ProtocolError, TrustError
from aggregation.messages import Advert, ConsistencySignature, EncryptedShares, Plan, Roster, Survivors
from aggregation.pki import Root
from aggregation.pki.identity import PublicKey
from aggregation.session import COORDINATOR, Peer, Session, context_of
from aggregation.spec import SessionSpec


def may_answer(peer: str, asked: Container[str], answered: Container[str], step: str) -> None:
    """Return if ``peer`` may answer a step now: it was asked and has not answered.

    Raises:
        ProtocolError: Otherwise, with the name of the peer.
    """
    if peer not in asked:
        raise ProtocolError(f"{step} from a device that was not asked", peer)
    if peer in answered:
        raise ProtocolError(f"second {step}", peer)


def members(root: Root, certificates: Sequence[bytes], at: datetime | None) -> dict[str, PublicKey]:
    """The devices of a cohort by id, in ascending order, each certified and each once.

    Raises:
        ProtocolError: A certificate is not the authority's, or an id or key is repeated or out of order.
    """
    try:
        pairs = [root.verify(der, at) for der in certificates]
    except TrustError as error:
        raise ProtocolError(str(error)) from None
    if any(left[0] >= right[0] for left, right in itertools.pairwise(pairs)):
        raise ProtocolError("cohort has a device twice, or is out of order")
    if len({key.raw for _, key in pairs}) != len(pairs):
        raise ProtocolError("two devices of the cohort share an identity key")
    return dict(pairs)


def advert(offer: bytes, rounds: int, signer: PublicKey, device: str, raw: bytes) -> Advert:
    """The advert of ``device`` for the offer with digest ``offer``.

    Raises:
        ProtocolError: Not signed by ``device``, for another offer, or without a good key of its own for each round.
    """
    message = envelope.open_verified(Advert, raw, signer, device)
    if message.offer != offer:
        raise ProtocolError("advert is for another offer", device)
    if message.device != device:
        raise ProtocolError(f"advert is of {message.device}", device)
    if not len(message.mask_keys) == len(message.commitments) == rounds:
        raise ProtocolError(f"advert does not have keys for {rounds} rounds", device)
    if len(message.keys) != 1 + rounds:
        raise ProtocolError("advert has a key twice", device)
    for key in message.keys:
        try:
            masks.require_public_key(key)
        except ProtocolError as error:
            raise ProtocolError(str(error), device) from None
    return message


def roster(
    spec: SessionSpec, offer: bytes, known: Mapping[str, PublicKey], message: Roster
) -> tuple[Session, dict[str, bytes]]:
    """The session that a roster makes, and the adverts in it as signed.

    Raises:
        ProtocolError: For another offer, below the threshold, an advert that is no member's, a device or key
            twice, an advert that ``advert`` refuses, or no graph of the degree on so many devices.
    """
    if message.offer != offer:
        raise ProtocolError("roster is for another offer", COORDINATOR)
    if len(message.adverts) < max(spec.threshold, spec.minimum_survivors):
        raise ProtocolError(f"roster of {len(message.adverts)} is too small to end a round", COORDINATOR)
    signed: dict[str, bytes] = {}
    peers: dict[str, Peer] = {}
    keys: set[bytes] = set()
    for raw in message.adverts:
        device = _claimed(raw)
        if device not in known:
            raise ProtocolError(f"{device} is on the roster but not in the cohort", COORDINATOR)
        if peers and device <= next(reversed(peers)):
            raise ProtocolError(f"{device} is on the roster twice, or out of order", COORDINATOR)
        found = advert(offer, spec.rounds, known[device], device, raw)
        if keys & found.keys:
            raise ProtocolError(f"{device} has a key that another device on the roster has", COORDINATOR)
        keys |= found.keys
        signed[device] = raw
        peers[device] = Peer(device, len(peers) + 1, known[device], found.share_key, found.mask_keys, found.commitments)
    try:
        return Session(spec, offer, context_of(offer, message.digest()), peers), signed
    except ConfigError as error:
        raise ProtocolError(str(error), COORDINATOR) from None


def _claimed(raw: bytes) -> str:
    """Whose advert it says it is; ``advert`` then demands that device's signature."""
    return Advert.decode(envelope.unverified_body(raw)).device


def encrypted_shares(session: Session, me: str, given: Mapping[str, EncryptedShares]) -> None:
    """The boxes that a device gets: from neighbours only, and enough of them for a round.

    Raises:
        ProtocolError: Otherwise.
    """
    strangers = set(given) - set(session.neighbors(me, session.peers))
    if strangers:
        raise ProtocolError(f"shares of {min(strangers)}, who is no neighbour", COORDINATOR)
    enough_neighbors(session, me, given, "near this device shared their secrets")


def plan(session: Session, me: str, dealers: Collection[str], last_round: int, message: Plan) -> None:
    """A plan that a device may act on. ``dealers``: those whose shares it has.

    Raises:
        ProtocolError: Otherwise.
    """
    if message.context != session.context:
        raise ProtocolError("plan is for another session", COORDINATOR)
    if not last_round < message.round <= session.spec.rounds:
        raise ProtocolError(f"round {message.round} is over, or beyond the session", COORDINATOR)
    if not ascending(message.members):
        raise ProtocolError("plan has a member twice, or out of order", COORDINATOR)
    if me not in message.members:
        raise ProtocolError("plan does not include this device", COORDINATOR)
    strangers = set(message.members) - set(session.peers)
    without = set(session.neighbors(me, message.members)) - set(dealers)
    if strangers or without:
        raise ProtocolError(f"{min(strangers | without)} is in the plan but shared no secrets", COORDINATOR)
    enough_devices(session.spec, len(message.members), "members of the plan")
    enough_neighbors(session, me, message.members, "near this device are in the plan")


def survivors(session: Session, current: Plan, me: str, vector: bytes, message: Survivors) -> None:
    """A survivor set that a device may open. ``vector``: digest of its own masked vector.

    Raises:
        ProtocolError: Otherwise.
    """
    if message.plan != current.digest():
        raise ProtocolError("survivor set is for another plan", COORDINATOR)
    if not set(message.vectors) <= set(current.members):
        raise ProtocolError("a survivor was not in the plan", COORDINATOR)
    if message.vectors.get(me) != vector:
        raise ProtocolError("survivor set does not have this device with its own vector", COORDINATOR)
    enough_devices(session.spec, len(message.vectors), "survivors")
    enough_neighbors(session, me, message.vectors, "near this device survived")


def shares_to_reveal(
    session: Session, current: Plan, me: str, message: Survivors
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Whose seed and whose mask key a device opens: survivors and dropped, never one device in both."""
    near = (me, *session.neighbors(me, current.members))
    return (
        tuple(sorted(device for device in near if device in message.vectors)),
        tuple(sorted(device for device in near if device not in message.vectors)),
    )


def consistency_signatures(session: Session, message: Survivors, signatures: Mapping[str, bytes]) -> None:
    """A quorum of survivors or more signed this very set: no other set has a quorum, since a device signs one.

    Raises:
        ProtocolError: Fewer, one that is no survivor, or a signature that is not valid.
    """
    if len(signatures) < session.spec.quorum:
        raise ProtocolError(f"{len(signatures)} agreements, {session.spec.quorum} are needed", COORDINATOR)
    digest = message.digest()
    for device, signature in signatures.items():
        if device not in message.vectors:
            raise ProtocolError(f"{device} agreed but is no survivor", COORDINATOR)
        body = ConsistencySignature(digest, device).encode()
        envelope.verify(session.peers[device].identity, ConsistencySignature.TAG, body, signature)


def enough_devices(spec: SessionSpec, count: int, what: str) -> None:
    """Return if ``count`` is neither below the threshold nor below the minimum of survivors.

    Raises:
        ProtocolError: It is.
    """
    least = max(spec.threshold, spec.minimum_survivors)
    if count < least:
        raise ProtocolError(f"{count} {what}, {least} are needed", COORDINATOR)


def enough_neighbors(session: Session, me: str, present: Iterable[str], what: str) -> None:
    """Return if those of ``present`` near ``me``, itself included, can open its secrets.

    Raises:
        ProtocolError: They are fewer than the threshold.
    """
    count = 1 + len(session.neighbors(me, present))
    if count < session.spec.threshold:
        raise ProtocolError(f"{count} devices {what}, {session.spec.threshold} are needed", COORDINATOR)


def ascending(devices: Iterable[str]) -> bool:
    """Whether each is after the one before it."""
    return all(left < right for left, right in itertools.pairwise(devices))
