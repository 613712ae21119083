"""What everyone in a session knows alike once the roster is out: its context, its peers, who is whose neighbour."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from aggregation import graph
from aggregation.pki.identity import PublicKey
from aggregation.spec import SessionSpec

COORDINATOR = "coordinator"  # its name in errors


@dataclass(frozen=True, slots=True)
class Peer:
    """A device on the roster.

    ``position`` counts from 1 in order of device id: the x-coordinate of its shares. ``mask_keys`` and
    ``commitments`` hold one entry a round.
    """

    device: str
    position: int
    identity: PublicKey
    share_key: bytes
    mask_keys: tuple[bytes, ...]
    commitments: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Session:
    """The public side of a session.

    Args:
        spec: As offered.
        offer: Digest of the offer.
        context: Digest of offer and roster; in every later message and every key.
        peers: By device id, in ascending order.
    """

    spec: SessionSpec
    offer: bytes
    context: bytes
    peers: Mapping[str, Peer]
    _near: Mapping[str, frozenset[str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sparse = self.spec.degree < len(self.peers) - 1
        found = graph.harary_neighbors(graph.harary_order(self.context, self.peers), self.spec.degree) if sparse else {}
        object.__setattr__(self, "_near", found)

    def neighbors(self, device: str, among: Iterable[str]) -> tuple[str, ...]:
        """Those of ``among`` with whom ``device`` shares masks and secrets, in the order given.

        Everyone else on the roster where ``degree`` reaches that far, else the neighbours on the circle (``graph``).
        """
        if not self._near:
            return tuple(other for other in among if other != device)
        near = self._near[device]
        return tuple(other for other in among if other in near)

    def positions(self, devices: Iterable[str]) -> list[int]:
        """The x-coordinates of ``devices``."""
        return [self.peers[device].position for device in devices]

    def mask_keys(self, devices: Iterable[str], round_: int) -> dict[str, bytes]:
        """The public mask keys of ``devices`` in a round."""
        return {device: self.peers[device].mask_keys[round_ - 1] for device in devices}


def context_of(offer: bytes, roster: bytes) -> bytes:
    """The context of a session from the digests of offer and roster."""
    return hashlib.sha256(b"edgeadapt/context/1\x00" + offer + roster).digest()


def commitment(seed: bytes, offer: bytes, device: str, round_: int) -> bytes:
    """Commit ``device`` to its seed of a round before anyone holds a share of it. Hidden: seeds are random."""
    head = b"edgeadapt/commitment/1\x00" + offer + round_.to_bytes(4, "big")
    return hashlib.sha256(head + device.encode() + b"\x00" + seed).digest()
