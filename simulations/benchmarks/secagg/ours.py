"""This project's side of the comparison: one round of a session with n devices, k neighbours and d elements.

The session is put together from real keys and shares without certificates and boxes, which are made once a session
and not once a round. What is timed is the code that runs in a round, signatures and digests included.
"""

import dataclasses
import datetime as dt
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from aggregation import envelope, graph, masks, ring, shamir, sharing
from aggregation.client import Device, Planned, Ready
from aggregation.entropy import SystemEntropy
from aggregation.messages import ConsistencySignature, EncryptedShares, MaskedInput, Plan, UnmaskResponse
from aggregation.pki import Authority
from aggregation.pki.identity import IdentityKey
from aggregation.policy import Policy
from aggregation.ring import Ring
from aggregation.server import Collecting, Confirming, Established, RoundAborted, RoundResult, Unmasking
from aggregation.session import Peer, Session, commitment
from aggregation.sharing import Secrets, SharePair
from aggregation.singleuse import SingleUse
from aggregation.spec import CORRUPT_FRACTION, Adversary, SessionSpec
from aggregation.vector import Floats, Segment, VectorSpec

BITS = 32  # of an element: the peer's modulus
ENTROPY = SystemEntropy()
_OFFER, _DIGEST = hashlib.sha256(b"benchmark").digest(), hashlib.sha256(b"benchmark").hexdigest()
_BEGIN, _END = dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.datetime(2126, 1, 1, tzinfo=dt.UTC)


@dataclass(frozen=True, slots=True)
class Fleet:
    """A session that stands: devices, their secrets of round 1, and dealer → holder → shares."""

    established: Established
    devices: Mapping[str, Device]
    secrets: Mapping[str, Secrets]
    box_keys: Mapping[str, bytes]
    pairs: Mapping[str, Mapping[str, SharePair]]

    @property
    def session(self) -> Session:
        """The public side."""
        return self.established.session

    def deal(self, device: str) -> None:
        """A device's shares: split both secrets and seal a box for each neighbour."""
        sharing.deal(self.session, device, self.box_keys[device], {1: self.secrets[device]}, ENTROPY)

    def begin(self) -> Collecting:
        """A round with everyone in it."""
        begun = self.established.plan(adapter_version=1, adapter_digest=_DIGEST, training=b"", cohort=None)
        if isinstance(begun, RoundAborted):
            raise ValueError(begun.detail)
        return begun[0]

    def planned(self, device: str, plan: Plan) -> Planned:
        """A device that was told to train."""
        held = {dealer: self.pairs[dealer][device] for dealer in self.session.neighbors(device, self.devices)}
        held[device] = self.pairs[device][device]
        ready = Ready(self.session, device, 1, frozenset(held), None, {}, {})
        return Planned(ready, plan, self.secrets[device], held)

    def masked(
        self, planned: Planned, values: Mapping[str, Floats], rng: np.random.Generator, threads: int = 1
    ) -> Ring:
        """A device's vector, encoded and masked, key agreement included: ``upload`` without packing and signing."""
        vector, digest = self.session.spec.vector.encode(values, rng), planned.plan.digest()
        masks.apply(vector, planned.round_masks(digest), threads)
        return vector

    def upload(
        self, planned: Planned, values: Mapping[str, Floats], rng: np.random.Generator, threads: int = 1
    ) -> bytes:
        """A device's masked input, ready to be sent: encode, mask, pack, digest, sign."""
        vector = self.session.spec.vector.encode(values, rng)
        return planned.contribute(self.devices[planned.ready.me], vector, threads)[1]

    def opening(self, device: str, opened: "Unmasking") -> bytes:
        """The shares that a survivor owes."""
        survivors = opened.survivor_set.survivors
        near = (device, *self.session.neighbors(device, self.devices))
        seeds = {dealer: self.pairs[dealer][device].seed for dealer in near if dealer in survivors.vectors}
        keys = {dealer: self.pairs[dealer][device].key for dealer in near if dealer not in survivors.vectors}
        return self.devices[device].sign(UnmaskResponse(survivors.digest(), device, seeds, keys))

    def agreement(self, device: str, confirming: Confirming) -> bytes:
        """A survivor's signature on the survivor set."""
        return self.devices[device].sign(ConsistencySignature(confirming.survivor_set.survivors.digest(), device))

    def closed(self, collecting: Collecting) -> Confirming:
        """The end of step 6."""
        closed = collecting.close()
        if isinstance(closed, RoundAborted) or not isinstance(closed[0], Confirming):
            raise ValueError("the round did not get its masked inputs")
        return closed[0]


def make(devices: int, degree: int, threshold: int, size: int) -> Fleet:
    """A session of ``devices`` with vectors of ``size`` elements."""
    vector = VectorSpec((Segment("delta", size, 1.0),), ring_bits=BITS, max_clients=devices)
    least = max(threshold, graph.quorum(devices, CORRUPT_FRACTION))
    spec = SessionSpec(
        1, threshold, least, degree, vector, 1.0, 1, "none", _DIGEST, _DIGEST, Adversary.ACTIVE
    )  # rounds, threshold, minimum_survivors, degree, vector, clip_norm, weight_cap, privacy, digests, adversary
    names = [f"device-{number:05d}" for number in range(devices)]
    identities = {name: IdentityKey.generate(ENTROPY) for name in names}
    secrets = {name: Secrets(ENTROPY.bytes(32), ENTROPY.bytes(32)) for name in names}
    box_keys = {name: ENTROPY.bytes(32) for name in names}
    peers = {
        name: Peer(
            name,
            place + 1,
            identities[name].public,
            masks.public_key(box_keys[name]),
            (masks.public_key(secrets[name].mask_key),),
            (commitment(secrets[name].seed, _OFFER, name, 1),),
        )
        for place, name in enumerate(names)
    }
    session = Session(spec, _OFFER, hashlib.sha256(ENTROPY.bytes(32)).digest(), peers)
    key = IdentityKey.generate(ENTROPY)
    root = Authority.create("benchmark", ENTROPY, _BEGIN, _END).root
    made = {name: Device(identities[name], b"", root, key.public, Policy()) for name in names}
    dealt: dict[str, dict[str, EncryptedShares]] = {name: {} for name in names}
    established = Established(key, session, dealt, delivered=frozenset(names))
    pairs = {name: _pairs(session, name, secrets[name]) for name in names}
    return Fleet(established, made, secrets, box_keys, pairs)


def _pairs(session: Session, dealer: str, secret: Secrets) -> dict[str, SharePair]:
    holders = (dealer, *session.neighbors(dealer, session.peers))
    points, threshold = session.positions(holders), session.spec.threshold
    seeds = shamir.split(secret.seed, threshold, points, ENTROPY)
    keys = shamir.split(secret.mask_key, threshold, points, ENTROPY)
    return {holder: SharePair(seed, key) for holder, seed, key in zip(holders, seeds, keys, strict=True)}


def lost(fleet: Fleet, fraction: float) -> frozenset[str]:
    """So many devices, spread evenly over the circle, so that every neighbourhood keeps its threshold."""
    order = graph.harary_order(fleet.session.context, fleet.devices)
    count = round(fraction * len(order))
    return frozenset(order[i * len(order) // count] for i in range(count)) if count else frozenset()


@dataclass(frozen=True, slots=True)
class Uploads:
    """A round under way and what its survivors sent."""

    fleet: Fleet
    collecting: Collecting
    bodies: Mapping[str, bytes]


def collect(fleet: Fleet, uploads: Mapping[str, bytes], collecting: Collecting, gone: frozenset[str]) -> Uploads:
    """A round in which ``gone`` sent nothing, on a total of its own."""
    fresh = dataclasses.replace(collecting, total=np.zeros_like(collecting.total), single_use=SingleUse())
    return Uploads(fleet, fresh, {name: body for name, body in uploads.items() if name not in gone})


def sum_up(given: Uploads) -> None:
    """The sum over the uploads, without the checks of signatures and digests (``receive``): what the peer does."""
    total, size = given.collecting.total, given.fleet.session.spec.vector.size
    for body in given.bodies.values():
        ring.add(total, memoryview(body)[: ring.packed_size(size, BITS)], BITS)


def receive(given: Uploads) -> Collecting:
    """Every upload through the checks into the sum, as in a round."""
    collecting = given.collecting
    for name, body in given.bodies.items():
        collecting = collecting.on_masked_input(name, body)
    return collecting


def ask(given: Uploads) -> Unmasking:
    """The round up to the last opening."""
    fleet, confirming = given.fleet, given.fleet.closed(receive(given))
    for name in given.bodies:
        confirming = confirming.on_consistency_signature(name, fleet.agreement(name, confirming))
    unmasking = asked(confirming)
    for name in given.bodies:
        unmasking = unmasking.on_unmask_response(name, fleet.opening(name, unmasking))
    return unmasking


def asked(confirming: Confirming) -> Unmasking:
    """The end of step 7."""
    closed = confirming.close()
    if isinstance(closed, RoundAborted):
        raise ValueError(closed.detail)
    return closed[0]


def finish(unmasking: Unmasking, threads: int = 1) -> RoundResult:
    """Open the secrets, take the masks off, decode."""
    result = unmasking.close(threads)
    if isinstance(result, RoundAborted):
        raise ValueError(result.detail)
    return result[1]


def overhead(plan: Plan, device: str) -> int:
    """Bytes of an upload beside the packed vector."""
    header = MaskedInput(plan.digest(), device, bytes(32))
    return len(envelope.sign_vector(IdentityKey.generate(ENTROPY), header, b""))
