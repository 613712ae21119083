"""What a device remembers of the sums without noise for which it revealed shares: from which adapters, over whom.

Two sums from adapters that hardly differ are as two from one adapter: over different devices, their difference is what
a few of them contributed. So without noise an adapter that is less than ``RoundTask.least_movement`` from another one
counts as the same. A device helps to a sum from it only over the devices of the last one, less those whose certificates
were revoked since, with the same task, clip norm and weight cap; and to none if the sum from the other one was over
devices before those, or with groups, which other bytes would deal again. Every such adapter is remembered, so that
small steps do not add up to a large one, and none returns. Sums over the same devices have no limit: they move the
adapter.

Sums on two bases are not compared: the owner names the bases, so a coordinator cannot take one that hardly differs.
Updates and second moments are compared with each other as well, because sums of both say how many held-out examples the
adapter answers rightly. With noise, as of every evaluation, the privacy ledger counts. Equal bytes are subject to
``adapterstate`` besides. What is refused follows from what the coordinator sent and from a secret key of the sketches.
The file is encrypted."""

import hashlib
import math
from collections.abc import Collection, Container, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Annotated, ClassVar

import numpy as np

from aggregation import sealed, wire
from aggregation.entropy import Entropy
from aggregation.keystream import Keystream
from aggregation.messages import SERIALS, Digest, HexDigest, Plan
from aggregation.session import refused
from aggregation.spec import SessionSpec
from aggregation.wire import Codec
from client.node.adapterstate import EARLIER, differing, terms
from edgeadapt.formats import jsontext
from edgeadapt.formats.layout import Tensors
from edgeadapt.methods.parts import Part, part_of
from edgeadapt.rounds.roundtask import RoundTask

BUCKETS = 32  # numbers of a sketch for each part
_PLACES = tuple(Part)
SIZE = len(_PLACES) * BUCKETS * 4  # bytes


class SumKind(StrEnum):
    UPDATES = "updates"
    MOMENTS = "moments"


@dataclass(frozen=True, slots=True)
class Point:
    kind: Annotated[SumKind, wire.choice(SumKind)]
    base: HexDigest
    adapter: Digest  # SHA-256 of its file
    form: Digest  # digest of layout, method and labels
    terms: Digest  # from ``adapterstate.terms``
    sketch: Annotated[bytes, wire.blob(SIZE)] = field(repr=False)


_POINT: Codec[Point] = wire.record(Point)
_POINTS = wire.sequence(_POINT, EARLIER)


@dataclass(frozen=True, slots=True)
class SameDevices:
    """The last sums of a kind, all over the same devices. ``survivors``: device → serial of the certificate that it had
    in the last of them."""

    kind: Annotated[SumKind, wire.choice(SumKind)]
    survivors: Annotated[Mapping[str, int], SERIALS]
    points: Annotated[tuple[Point, ...], _POINTS]


@dataclass(frozen=True, slots=True)
class PlannedSum:
    """The round without noise that the device trained for last. ``bound``: the kinds of earlier sums over whose devices
    this one has to be."""

    point: Annotated[Point, _POINT]
    bound: Annotated[tuple[SumKind, ...], wire.sequence(wire.choice(SumKind), len(SumKind))]
    movement: Annotated[float, wire.real]  # distance to the nearest adapter of them, weight units
    least: Annotated[float, wire.real]  # limit for ``movement``


@dataclass(frozen=True, slots=True)
class SumHistory(sealed.SealedRecord):
    """The sums without noise to which a device helped. ``earlier``: the last ``EARLIER`` sums that were over other
    devices than these, the oldest first; ``round``: the one under way."""

    MAGIC: ClassVar[bytes] = b"edgeadapt/sum-history/2\x00"

    key: Annotated[bytes, wire.fixed(32)] = field(repr=False)
    last: Annotated[tuple[SameDevices, ...], wire.sequence(wire.record(SameDevices), len(SumKind))] = ()
    earlier: Annotated[tuple[Point, ...], _POINTS] = ()
    round: Annotated[PlannedSum | None, wire.optional(wire.record(PlannedSum))] = None

    @classmethod
    def new(cls, entropy: Entropy) -> "SumHistory":
        return cls(entropy.bytes(32))


def on_plan(
    known: SumHistory, plan: Plan, task: RoundTask, spec: SessionSpec, adapter: Tensors, share: float
) -> SumHistory:
    """Make the history to save before the contribution to a round leaves; unchanged in a session with noise. ``share``:
    as of ``RoundTask.least_movement``. Raises ProtocolError: the adapter is too near to one from which there was a sum
    over earlier devices, on other terms, or in other groups."""
    if spec.privacy is not None:
        return known
    version = plan.adapter_version
    if task.EXACT is None:
        raise refused("such a round has no sums without noise", "offer.spec.vector")
    now = _point(known, plan, spec, task, adapter)
    least = task.least_movement(spec.clip_norm, spec.vector.segments[0].size, share)
    for point in known.earlier:
        if (far := _separation(point, now, task)) < least:
            text = f"adapter {version} is {far:.1g} from an earlier one, less than {least:.1g}, and the sum from that "
            raise refused(f"{text}was over other devices", "plan.movement")
    bound, movement = list[SumKind](), least
    for sums in known.last:
        near = {point: far for point in sums.points if (far := _separation(point, now, task)) < least}
        if near:
            bound.append(sums.kind)
            movement = min(movement, *near.values())
        for point in near:
            if point.kind is now.kind and point.terms != now.terms:
                text = f"adapter {version} has moved by {near[point]:.1g} since it was trained with other settings, "
                raise refused(f"{text}clip norm or weight cap, less than {least:.1g}", "plan.terms")
            if spec.grouping and point.adapter != now.adapter:
                text = f"adapter {version} has moved by {near[point]:.1g} since the last sum, less than {least:.1g}"
                raise refused(f"{text}, and has other groups", "plan.groups")
    return replace(known, round=PlannedSum(now, tuple(bound), movement, least))


def on_survivors(
    known: SumHistory | None, plan: Plan, spec: SessionSpec, survivors: Mapping[str, int], revoked: Container[int]
) -> SumHistory | None:
    """Make the history after the device reveals shares for a sum or, with groups, signs its survivor set.

    ``survivors`` and ``revoked`` are those of ``adapterstate.on_survivors``; with noise, nothing changes. Raises
    ProtocolError: the device trained for another plan since, or the adapter is near to one from which the last sum was
    over other devices."""
    if spec.privacy is not None:
        return known
    if known is None or (now := known.round) is None or now.point.adapter.hex() != plan.adapter_digest:
        text = f"adapter {plan.adapter_version} of the sum is not the one that this device trained from last"
        raise refused(text, "survivors.adapter")
    for sums in known.last:
        if sums.kind in now.bound and (changed := sum(differing(sums.survivors, survivors, revoked))):
            text = f"adapter {plan.adapter_version} has moved by {now.movement:.1g} since a sum over other devices, "
            text += f"less than {now.least:.1g}, and this sum differs in {changed}: without noise it has to have the "
            text += "same ones; keep the cohort, raise server.learning_rate, or set privacy.epsilon"
            raise refused(text, "survivors.movement")
    others = tuple(sums for sums in known.last if sums.kind is not now.point.kind)
    before = next((sums for sums in known.last if sums.kind is now.point.kind), None)
    if before is None or any(differing(before.survivors, survivors, revoked)):
        earlier = (*known.earlier, *(before.points if before else ()))[-EARLIER:]
        return replace(known, last=(*others, SameDevices(now.point.kind, survivors, (now.point,))), earlier=earlier)
    points = before.points if now.point in before.points else (*before.points, now.point)[-EARLIER:]
    return replace(known, last=(*others, SameDevices(now.point.kind, survivors, points)))


def _point(known: SumHistory, plan: Plan, spec: SessionSpec, task: RoundTask, adapter: Tensors) -> Point:
    digest, now = bytes.fromhex(plan.adapter_digest), terms(plan, spec)
    form = hashlib.sha256(jsontext.encode([spec.layout_digest, asdict(task.peft_config), list(task.labels)])).digest()
    return Point(SumKind(task.EXACT or ""), spec.base_digest, digest, form, now, sketch(adapter, known.key))


def _separation(before: Point, now: Point, task: RoundTask) -> float:
    """Measure the distance between the adapters of two sums; 0 if they cannot be compared, though of one base."""
    if before.base != now.base:
        return math.inf
    if before.form != now.form:
        return 0.0
    parts = task.influencing()
    if now.kind is SumKind.MOMENTS and before.kind is SumKind.UPDATES:
        parts |= {Part.HEAD}  # the score, which both have, depends on the head
    return separation(before.sketch, now.sketch, parts)


def sketch(tensors: Tensors, key: bytes) -> bytes:
    """Sketch an adapter: float32, little-endian, ``BUCKETS`` numbers for each part.

    A device keeps no adapters to compare others with: a sketch adds the numbers of each part up, in places and with
    signs that a secret key chooses (Charikar, Chen and Farach-Colton 2002, "Finding Frequent Items in Data Streams").
    The squared norm of the difference of two sketches has that of the difference of the adapters as its mean, and a
    relative variance of at most 2 / ``BUCKETS`` (Alon, Matias and Szegedy 1999). Who does not know the key cannot
    choose an adapter that only seems to be far away. ``key``: 32 secret bytes, the same for sketches that are compared.
    """
    sums = np.zeros((len(_PLACES), BUCKETS))
    for name, tensor in tensors.items():
        drawn = np.empty(tensor.size, np.uint8)
        Keystream(hashlib.sha256(b"edgeadapt/sketch/1\x00" + key + name.encode()).digest()).read_into(drawn.data)
        signed = np.where(drawn & 0x80, -1.0, 1.0) * tensor.ravel()
        sums[_PLACES.index(part_of(name))] += np.bincount(drawn % BUCKETS, signed, BUCKETS)
    return sums.astype("<f4").tobytes()


def separation(one: bytes, other: bytes, parts: Collection[Part]) -> float:
    """Measure the distance between two adapters over some parts, from their sketches."""
    left, right = (np.frombuffer(each, "<f4").astype(float).reshape(-1, BUCKETS) for each in (one, other))
    chosen = [part in parts for part in _PLACES]
    return float(np.linalg.norm((left - right)[chosen]))
