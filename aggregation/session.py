"""What every party of a session knows once the roster is out: its context, its peers, and who is whose neighbor."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from aggregation import graph, wire
from aggregation.errors import ProtocolError
from aggregation.messages import DEVICES, MAX_COHORT, SESSION_SPEC, DeviceId, Digest, Key, KeyOfEachRound, Uint32
from aggregation.pki.identity import PublicKey
from aggregation.spec import SessionSpec

COORDINATOR = "coordinator"  # its name in errors


def refused(text: str, about: str) -> ProtocolError:
    """What a device raises where the coordinator sent what the protocol, or the device's policy, does not allow."""
    return ProtocolError(text, COORDINATOR, about=about)


@dataclass(frozen=True, slots=True)
class Peer:
    """A device on the roster. ``position`` counts from 1 in order of device id: the x-coordinate of the device's
    shares. ``mask_keys`` and ``commitments`` hold one entry for each round."""

    device: DeviceId
    position: Uint32
    identity: Annotated[PublicKey, wire.record(PublicKey)]
    share_key: Key
    mask_keys: KeyOfEachRound
    commitments: KeyOfEachRound


@dataclass(frozen=True, slots=True)
class Session:
    """The public state of a session. Raises ConfigError: no graph of the spec's degree exists on so many devices."""

    spec: Annotated[SessionSpec, SESSION_SPEC]  # as offered
    offer: Digest  # digest of the offer
    context: Digest  # digest of offer and roster; bound into every later message and every key
    # Device id → peer, in ascending order.
    peers: Annotated[Mapping[str, Peer], wire.mapping(DEVICES, wire.record(Peer), MAX_COHORT)]
    _neighbors: Mapping[str, frozenset[str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sparse = self.spec.degree < len(self.peers) - 1
        found = graph.harary_neighbors(graph.harary_order(self.context, self.peers), self.spec.degree) if sparse else {}
        object.__setattr__(self, "_neighbors", found)

    def neighbors(self, device: str, among: Iterable[str]) -> tuple[str, ...]:
        """The devices of ``among`` with which ``device`` shares masks and secrets, in the given order. These are all
        others on the roster if the degree reaches that far (the complete graph), else the neighbors in the Harary graph
        (``graph``)."""
        if not self._neighbors:
            return tuple(other for other in among if other != device)
        neighbors = self._neighbors[device]
        return tuple(other for other in among if other in neighbors)

    def positions(self, devices: Iterable[str]) -> list[int]:
        return [self.peers[device].position for device in devices]

    def mask_keys(self, devices: Iterable[str], round_: int) -> dict[str, bytes]:
        return {device: self.peers[device].mask_keys[round_ - 1] for device in devices}


def context_of(offer: bytes, roster: bytes) -> bytes:
    return hashlib.sha256(b"edgeadapt/context/1\x00" + offer + roster).digest()


def commitment(seed: bytes, offer: bytes, device: str, round_: int) -> bytes:
    """A device's commitment to its seed of a round, made before anyone holds a share of it. It hides the seed because
    seeds are 32 random bytes, and binds because SHA-256 is collision resistant."""
    head = b"edgeadapt/commitment/1\x00" + offer + round_.to_bytes(4, "big")
    return hashlib.sha256(head + device.encode() + b"\x00" + seed).digest()
