"""What a device trains with in one session: the examples that it had when it joined, and a secret of that session.

Two answers to one plan carry the same masks, so that their difference is that of the two updates. A device whose state
directory is rolled back therefore answers a plan again byte for byte as before, or not at all: training depends on
nothing but the snapshot, the plan and the adapter, and a snapshot opens only for the session in which it was taken.

The secret orders the examples, rounds the update and draws its noise. It is drawn for each session, so that an earlier
copy of the state directory does not give it, and replaced after each round, so that a later one gives nothing of a
finished round. The coordinator knows all else that training depends on, and would otherwise make the other devices
repeat their updates, and subtract two sums that differ by one device."""

import hashlib
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Annotated

import numpy as np

from aggregation import sealed, wire
from aggregation.errors import TrustError
from aggregation.masks import KEY, derive
from aggregation.messages import DIGEST, Plan, Uint32
from aggregation.wire import Codec
from client.inference.usage import USAGE_DAYS, UsageDay
from client.training.examples import MAX_FILE

_MAGIC = b"edgeadapt/snapshot/3\x00"


class Draw(Enum):
    ORDER = "order"  # the examples' order
    ROUNDING = "rounding"  # rounds the update to whole steps
    NOISE = "noise"  # in a session with differential privacy


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A device's training inputs for the rounds of a session that are still to come.

    Law: ``open(seal(s, k, j), k, j) == s``. ``examples``: content of the examples file, b"" if it could not be read;
    ``first``: the first round that is still to come; ``usage``: what the device counted of its answers on past days,
    nothing if its owner contributes nothing of it."""

    secret: Annotated[bytes, wire.fixed(KEY)] = field(repr=False)
    examples: Annotated[bytes, wire.blob(MAX_FILE)] = field(repr=False)
    first: Uint32 = 1
    usage: Annotated[tuple[UsageDay, ...], USAGE_DAYS] = field(default=(), repr=False)

    def seal(self, key: bytes, share_key: bytes) -> bytes:
        """Encrypt the snapshot with the device's sealing key. ``share_key``: the public share encryption key with which
        the device joined; it is fresh for each join."""
        return _MAGIC + sealed.encrypt(_CODEC.encode(self), key, _MAGIC + share_key)

    @classmethod
    def open(cls, raw: bytes, key: bytes, share_key: bytes) -> "Snapshot":
        """Decrypt a snapshot. ``key``, ``share_key``: as for ``seal``. Raises TrustError: it was altered, or taken when
        the device joined with another key."""
        return _CODEC.decode(sealed.decrypt(raw.removeprefix(_MAGIC), key, _MAGIC + share_key))

    def since(self, round_: int) -> "Snapshot":
        """Keep the snapshot for a round and later ones; the secrets of earlier rounds do not follow from it. Raises
        TrustError: the round is over."""
        if round_ < self.first:
            raise TrustError(f"the secret of round {round_} of this session is deleted", about="snapshot.round")
        secret = self.secret
        for _ in range(self.first, round_):
            secret = derive(secret, b"edgeadapt/next-round/1")
        return replace(self, secret=secret, first=round_)

    def key(self, plan: Plan, draw: Draw) -> bytes:
        """Derive the secret (32 bytes) of one draw in one round. Raises as ``since``. Guarantee: it is the same for the
        same plan, whatever its former members, and unrelated to that of any other plan or session."""
        # Without the context, which begins with fresh bytes of the coordinator: the secret already belongs to one
        # session, and runs with given secrets can be repeated. Groups make no difference to what a device trains.
        digest = hashlib.sha256(b"plan\x00" + _TRAINED.encode(replace(plan, context=bytes(DIGEST)))).digest()
        return derive(self.since(plan.round).secret, b"edgeadapt/training/1", draw.value.encode(), digest)

    def generator(self, plan: Plan, draw: Draw) -> np.random.Generator:
        return np.random.default_rng(int.from_bytes(self.key(plan, draw), "big"))


_CODEC: Codec[Snapshot] = wire.record(Snapshot)
_TRAINED: Codec[Plan] = wire.record(Plan, {k: codec for k, codec in wire.annotated(Plan).items() if k != "former"})
