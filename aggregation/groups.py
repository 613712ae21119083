"""Groups: the devices of a round in several sums, of which one device can spoil one only.

The groups of a round follow from the adapter that it begins with and from the devices that are dealt: in order of the
SHA-256 of adapter and id, one to each group in turn. Every adapter deals again, and the bytes of an adapter follow from
the devices' own sums. A round that is repeated from an adapter has the groups of the first one, also without a device
that is gone (``Plan.former``): the difference of two sums would show the devices that are in one only.

A device masks with the others of its group. Its secrets are shared as in a session without groups, so one survivor set
and one unmask request serve all sums of a round. What protects a device is not the deal, which a coordinator can repeat
until all corrupt devices are with it, but the minimum of each group (``spec.Grouping``)."""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from aggregation import ring
from aggregation.errors import DataError
from aggregation.messages import Plan
from aggregation.ring import Ring
from aggregation.session import Session, refused
from aggregation.spec import SessionSpec

_TAG, _SUMS = b"edgeadapt/group/1\x00", b"edgeadapt/sums/1\x00"
_PLANS = 4  # of which a process keeps the groups


@dataclass(frozen=True, slots=True)
class GroupSum:
    survivors: tuple[str, ...]  # devices whose contributions are in it, in ascending order
    # Segment name → sum, float64 of shape ``(segment.size,)``, in the segment's unit.
    values: Mapping[str, NDArray[np.float64]] = field(repr=False)
    spoiled: str | None = None  # why ``values`` are all zero: honest survivors cannot have the sum. None if it counts

    @classmethod
    def of(cls, spec: SessionSpec, survivors: tuple[str, ...], total: Ring) -> "GroupSum":
        try:
            return cls(survivors, spec.vector.decode(total, len(survivors)))
        except DataError as error:
            return cls(survivors, spec.vector.zeros(), str(error))


def deal(adapter: str, devices: Iterable[str], count: int) -> Mapping[str, int]:
    """Device → number of its group, from 0. The sizes of two groups differ by at most one.

    >>> deal("ab" * 32, ["a", "b", "c", "d", "e"], 2)
    {'b': 0, 'c': 1, 'a': 0, 'd': 1, 'e': 0}

    ``adapter``: SHA-256 of the adapter that the round begins with, hex. ``count``: of groups."""
    seed = _TAG + bytes.fromhex(adapter)
    order = sorted(devices, key=lambda device: hashlib.sha256(seed + device.encode()).digest())
    return {device: place % count for place, device in enumerate(order)}


def of_plan(spec: SessionSpec, plan: Plan) -> Mapping[str, int]:
    """Device → its group, for all that were dealt: the members of a plan and its former ones."""
    return _dealt(plan.adapter_digest, (*plan.members, *plan.former), spec.groups)


@lru_cache(maxsize=_PLANS)
def _dealt(adapter: str, devices: tuple[str, ...], count: int) -> Mapping[str, int]:
    return deal(adapter, devices, count)


def split(spec: SessionSpec, plan: Plan, devices: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """``devices`` by group, each group in ascending order; one group if the session has no others. Devices that the
    plan does not deal are in none."""
    found: list[list[str]] = [[] for _ in range(spec.groups)]
    group_of = of_plan(spec, plan)
    for device in sorted(group_of.keys() & set(devices)):
        found[group_of[device]].append(device)
    return tuple(map(tuple, found))


def mask_peers(session: Session, plan: Plan, device: str, among: Collection[str]) -> tuple[str, ...]:
    """The devices of ``among`` with which a device masks: its neighbors or, with groups, the others of its group."""
    if session.spec.grouping is None:
        return session.neighbors(device, among)
    group_of = of_plan(session.spec, plan)
    return tuple(other for other in among if other != device and group_of.get(other) == group_of[device])


def require_minimum(spec: SessionSpec, plan: Plan, present: Iterable[str], what: str, *, about: str) -> None:
    """Check that each group has its minimum of devices that are ``present``; nothing to check without groups. Raises
    ProtocolError: one has not. ``what`` names the counted devices."""
    if spec.grouping is None:
        return
    for number, devices in enumerate(split(spec, plan, present)):
        if len(devices) < spec.grouping.minimum:
            text = f"group {number + 1} has {len(devices)} {what}, {spec.grouping.minimum} are needed"
            raise refused(text, about)


def digest_of(spec: SessionSpec, totals: Sequence[Ring]) -> bytes:
    """The digest that a result names: of the one unmasked vector or, with groups, of their digests in order."""
    digests = [ring.digest(total, spec.vector.ring_bits) for total in totals]
    return digests[0] if spec.grouping is None else hashlib.sha256(_SUMS + b"".join(digests)).digest()


def spoiled(sums: Sequence[GroupSum]) -> str | None:
    """Why sums count as zero, for people; None if all of them count."""
    if len(sums) == 1:
        return sums[0].spoiled
    return "; ".join(f"group {at}: {each.spoiled}" for at, each in enumerate(sums, 1) if each.spoiled) or None


def total(sums: Sequence[GroupSum]) -> dict[str, NDArray[np.float64]]:
    """Segment name → the sums of all groups added up, in their order."""
    first, *others = (dict(each.values) for each in sums)
    for other in others:
        first = {name: first[name] + other[name] for name in first}
    return first
