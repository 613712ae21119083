"""This project's side of the comparison: one round of a session with n devices, k neighbors and d elements.

The session has real keys and shares, but neither certificates nor encrypted shares: devices make those once per
session. The benchmark times the code that runs in every round, signatures and digests included.
"""

import dataclasses
import datetime as dt
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from aggregation import graph, masks, ring, rotation, shamir, sharing
from aggregation.client import Device, Planned, Ready
from aggregation.entropy import SystemEntropy
from aggregation.messages import ConsistencySignature, EncryptedShares, Plan, UnmaskResponse
from aggregation.pki import Authority
from aggregation.pki.identity import IdentityKey
from aggregation.policy import Policy
from aggregation.ring import Ring
from aggregation.server import Collecting, Confirming, Coordinator, Established, RoundAborted, RoundResult, Unmasking
from aggregation.session import Peer, Session, commitment
from aggregation.sharing import Secrets, SharePair
from aggregation.singleuse import SingleUse
from aggregation.spec import CORRUPT_FRACTION, Adversary, SessionSpec
from aggregation.vector import Floats, Segment, VectorSpec
from edgeadapt.formats.cores import ahead

T = TypeVar("T")
BITS = 16  # of an element, as in a session; the peer's modulus has 32
ENTROPY = SystemEntropy()
_OFFER, _DIGEST = hashlib.sha256(b"benchmark").digest(), hashlib.sha256(b"benchmark").hexdigest()
_BEGIN, _END = dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.datetime(2126, 1, 1, tzinfo=dt.UTC)


@dataclass(frozen=True, slots=True)
class EdgeAdaptFleet:
    """An established session: its devices, their secrets of round 1, and dealer → holder → shares."""

    established: Established
    devices: Mapping[str, Device]
    secrets: Mapping[str, Secrets]
    share_keys: Mapping[str, bytes]
    pairs: Mapping[str, Mapping[str, SharePair]]

    @property
    def session(self) -> Session:
        return self.established.session

    @property
    def order(self) -> tuple[str, ...]:
        """The devices in the order of the Harary graph: neighbors are close to each other."""
        return graph.harary_order(self.session.context, self.devices)

    def deal(self, device: str) -> None:
        """Make a device's shares: split both secrets and encrypt them for each neighbor."""
        sharing.deal(self.session, device, self.share_keys[device], {1: self.secrets[device]}, ENTROPY)

    def begin(self) -> Collecting:
        return _finished(self.established.plan(adapter_version=1, adapter_digest=_DIGEST, training=b"", cohort=None))[0]

    def planned(self, device: str, plan: Plan) -> Planned:
        dealers = (device, *self.session.neighbors(device, self.devices))
        held = {dealer: self.pairs[dealer][device] for dealer in dealers}
        ready = Ready(self.session, {}, self.established.ends, device, 1, frozenset(held), None, {}, {})
        return Planned(ready, plan, self.secrets[device], held)

    def rotated(
        self, planned: Planned, values: Mapping[str, Floats], rng: np.random.Generator, threads: int = 1
    ) -> Ring:
        """Rotate a device's vector before ``masked``. The values stay within their bound, as those of an update do."""
        bound = self.session.spec.vector.segment("delta").bound
        turned = rotation.rotate(np.asarray(values["delta"], np.float64), bytes(32))
        return self.masked(planned, {"delta": np.clip(turned, -bound, bound)}, rng, threads)

    def masked(
        self, planned: Planned, values: Mapping[str, Floats], rng: np.random.Generator, threads: int = 1
    ) -> Ring:
        """Encode and mask a device's vector, key agreement included: ``upload`` without packing and signing."""
        vector = self.session.spec.vector.encode(values, rng)
        masks.apply(vector, planned.round_masks(planned.plan.digest()), threads)
        return vector

    def upload(
        self, planned: Planned, values: Mapping[str, Floats], rng: np.random.Generator, threads: int = 1
    ) -> bytes:
        """A device's masked input as it is sent: encode, mask, pack, hash, sign."""
        vector = self.session.spec.vector.encode(values, rng)
        return planned.contribute(self.devices[planned.ready.me], vector, threads)[1]

    def consistency_signature(self, device: str, confirming: Confirming) -> bytes:
        """A survivor's signature on the survivor set."""
        return self.devices[device].sign(ConsistencySignature(confirming.survivor_set.survivors.digest(), device))

    def unmask_response(self, device: str, unmasking: Unmasking) -> bytes:
        """A survivor's shares: seeds of survivors, mask keys of dropouts."""
        survivors = unmasking.survivor_set.survivors
        held = {d: self.pairs[d][device] for d in (device, *self.session.neighbors(device, self.devices))}
        seeds = {dealer: pair.seed for dealer, pair in held.items() if dealer in survivors.vectors}
        keys = {dealer: pair.key for dealer, pair in held.items() if dealer not in survivors.vectors}
        return self.devices[device].sign(UnmaskResponse(survivors.digest(), device, seeds, keys))


def make(devices: int, degree: int, threshold: int, size: int) -> EdgeAdaptFleet:
    """Make a session of ``devices`` devices with ``degree`` neighbors each and vectors of ``size`` elements."""
    spec = SessionSpec(
        rounds=1,
        threshold=threshold,
        minimum_survivors=max(threshold, graph.quorum(devices, CORRUPT_FRACTION)),
        degree=degree,
        vector=VectorSpec((Segment("delta", size, 1.0),), ring_bits=BITS, max_clients=devices),
        clip_norm=1.0,
        weight_cap=1,
        privacy=None,
        base_digest=_DIGEST,
        layout_digest=_DIGEST,
        adversary=Adversary.ACTIVE,
    )
    names = [f"device-{number:05d}" for number in range(devices)]
    identities = {name: IdentityKey.generate(ENTROPY) for name in names}
    secrets = {name: Secrets(ENTROPY.bytes(32), ENTROPY.bytes(32)) for name in names}
    share_keys = {name: ENTROPY.bytes(32) for name in names}
    peers = {
        name: Peer(
            name,
            place,
            identities[name].public,
            masks.public_key(share_keys[name]),
            (masks.public_key(secrets[name].mask_key),),
            (commitment(secrets[name].seed, _OFFER, name, 1),),
        )
        for place, name in enumerate(names, 1)
    }
    session = Session(spec, _OFFER, hashlib.sha256(ENTROPY.bytes(32)).digest(), peers)
    key = IdentityKey.generate(ENTROPY)
    root = Authority.create("benchmark", ENTROPY, _BEGIN, _END).root
    fleet = {name: Device(identities[name], b"", root, key.public, Policy()) for name in names}
    dealt: dict[str, dict[str, EncryptedShares]] = {name: {} for name in names}
    established = Established(Coordinator(key), session, _END, dealt, delivered=frozenset(names))
    pairs = {name: _split(session, name, secrets[name]) for name in names}
    return EdgeAdaptFleet(established, fleet, secrets, share_keys, pairs)


def _split(session: Session, dealer: str, secret: Secrets) -> dict[str, SharePair]:
    holders = (dealer, *session.neighbors(dealer, session.peers))
    points, threshold = session.positions(holders), session.spec.threshold
    seeds = shamir.split(secret.seed, threshold, points, ENTROPY)
    keys = shamir.split(secret.mask_key, threshold, points, ENTROPY)
    return {holder: SharePair(seed, key) for holder, seed, key in zip(holders, seeds, keys, strict=True)}


@dataclass(frozen=True, slots=True)
class Uploads:
    """A round that collects masked inputs, and the masked inputs by device."""

    fleet: EdgeAdaptFleet
    collecting: Collecting
    bodies: Mapping[str, bytes]

    def without(self, dropouts: frozenset[str]) -> "Uploads":
        """The same round from its beginning, with a sum of its own, in which ``dropouts`` send nothing."""
        begun = dataclasses.replace(
            self.collecting, totals=(np.zeros_like(self.collecting.totals[0]),), single_use=SingleUse()
        )
        return Uploads(self.fleet, begun, {name: body for name, body in self.bodies.items() if name not in dropouts})

    def sum_up(self) -> None:
        """Add the uploads without the checks of signatures and digests (``receive`` has them), as the peer does."""
        total, size = self.collecting.totals[0], self.fleet.session.spec.vector.size
        for body in self.bodies.values():
            ring.add(total, memoryview(body)[: ring.packed_size(size, BITS)], BITS)

    def receive(self, threads: int = 1) -> Collecting:
        """Check every upload and add it, as in a round."""
        collecting = self.collecting
        for (name, _), checked in ahead(lambda each: self.collecting.check(*each), self.bodies.items(), threads):
            collecting = collecting.add(name, checked())
        return collecting

    def until_unmask(self) -> Unmasking:
        """Run the round up to the last unmask response."""
        confirming = close_collecting(self.receive())
        for name in self.bodies:
            confirming = confirming.on_consistency_signature(name, self.fleet.consistency_signature(name, confirming))
        unmasking = close_confirming(confirming)
        for name in self.bodies:
            unmasking = unmasking.on_unmask_response(name, self.fleet.unmask_response(name, unmasking))
        return unmasking


def close_collecting(collecting: Collecting) -> Confirming:
    closed = _finished(collecting.close())[0]
    assert isinstance(closed, Confirming)  # noqa: S101 - the session's adversary is active
    return closed


def close_confirming(confirming: Confirming) -> Unmasking:
    return _finished(confirming.close())[0]


def unmask(unmasking: Unmasking, threads: int = 1) -> RoundResult:
    """Recover the secrets, subtract the masks, decode the sum."""
    return _finished(unmasking.close(threads))[1]


def _finished(outcome: T | RoundAborted) -> T:
    if isinstance(outcome, RoundAborted):
        raise ValueError(outcome.detail)
    return outcome
