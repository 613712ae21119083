"""What was opened: every secret against what its owner had committed to, and every sum bit for bit.

The sum is recomputed here with code of its own, not the coordinator's: two ways must come to one result.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from aggregation import masks, ring
from aggregation.errors import DataError, ProtocolError
from aggregation.masks import Mask
from aggregation.messages import MaskedInput
from aggregation.recovery import Recovery
from aggregation.session import Session
from aggregation.transcript import Result
from coordinator.audit.history import History, Round
from coordinator.audit.report import Floats, Made, Problem, Skipped, many

Vectors = Callable[[bytes], bytes | None]


@dataclass(slots=True)
class Opened:
    """What the shares of a round open to: device → self-mask seed of a survivor, mask key of one who dropped."""

    seeds: Mapping[str, bytes] = field(repr=False)
    keys: Mapping[str, bytes] = field(repr=False)
    blamed: tuple[str, ...]
    values: Mapping[str, Floats] | None = field(default=None, repr=False)  # from ``sums``: segment → sum


def secrets(history: History, opened: dict[int, Opened]) -> str:
    """Open every secret of the rounds that have a result, into ``opened``.

    Raises:
        Problem: One cannot be opened, or is not what its owner committed to before anyone held a share of it.
    """
    for current in history.rounds:
        if history.session is not None and isinstance(current.ending, Result):
            opened[current.plan.round] = _open(history.session, history, current)
    count = sum(len(each.seeds) + len(each.keys) for each in opened.values())
    blamed = sorted({device for each in opened.values() for device in each.blamed})
    wrong = f"; wrong shares came from {', '.join(blamed)} and were left out" if blamed else ""
    opening = "1 secret was" if count == 1 else f"{count} secrets were"
    return f"{opening} opened, and each is the one that its owner had committed to beforehand{wrong}"


def _open(session: Session, history: History, current: Round) -> Opened:
    recovery = Recovery(session, current.plan, history.dealt, current.responses)
    seeds = {device: recovery.seed(device) for device in current.counted}
    keys = {device: recovery.mask_key(device) for device in current.dropped}
    closed = sorted(device for device, secret in {**seeds, **keys}.items() if secret is None)
    if closed:
        raise Problem(f"the shares in the log do not open what {closed[0]} had committed to", current.place(Result))
    return Opened(
        {device: secret for device, secret in seeds.items() if secret},
        {device: secret for device, secret in keys.items() if secret},
        tuple(sorted(recovery.blamed)),
    )


def sums(history: History, opened: Mapping[int, Opened], vectors: Vectors) -> str:
    """Add up the masked vectors that were kept, take the masks off, and compare with the results.

    Args:
        history: The session.
        opened: From ``secrets``.
        vectors: Digest of a packed vector → the vector, or nothing where it was not kept.

    Raises:
        Problem: A vector is not the one that was signed, or a sum is not the one that the result names.
        Skipped: No sum has all its vectors.
    """
    whole = {current.plan.round for current in history.rounds if _kept(current, vectors)}
    ended = [current for current in history.rounds if current.plan.round in opened]
    kept = [current for current in ended if current.plan.round in whole]
    if not ended:
        return "no sum was made"
    if not kept:
        raise Skipped("the masked updates were kept as digests only, so the sums cannot be added up again")
    for current in kept:
        _add_up(history, current, opened[current.plan.round], vectors)
    return f"{len(kept)} of {many(len(ended), 'sum')} added up again from the masked updates: the same bit for bit"


def made(history: History, opened: Mapping[int, Opened]) -> tuple[Made, ...]:
    """What came of the rounds that have a result; with the sums that ``sums`` added up."""
    return tuple(
        Made(
            place=current.place(Result),
            before=(current.plan.adapter_version, current.plan.adapter_digest),
            after=(current.ending.version, current.ending.adapter),
            survivors=current.counted,
            layout=history.offer.spec.layout_digest,
            values=opened[current.plan.round].values,
        )
        for current in history.rounds
        if isinstance(current.ending, Result)
    )


def _kept(current: Round, vectors: Vectors) -> bool:
    """Whether all vectors of a round are there, of one that was aborted too; each that is there is the one signed."""
    there = [device for device in current.inputs if _is_there(current, device, vectors)]
    return len(there) == len(current.inputs)


def _is_there(current: Round, device: str, vectors: Vectors) -> bool:
    digest = current.inputs[device].vector
    packed = vectors(digest)
    if packed is not None and hashlib.sha256(packed).digest() != digest:
        raise Problem("the vector that was kept is not the one that was signed", current.place(MaskedInput, device))
    return packed is not None


def _add_up(history: History, current: Round, opened: Opened, vectors: Vectors) -> None:
    spec = history.offer.spec.vector
    total = ring.zeros(spec.size, spec.ring_bits)
    for device in current.counted:
        packed = vectors(current.inputs[device].vector) or b""
        try:
            np.add(total, ring.unpack(packed, spec.size, spec.ring_bits), out=total)
        except ProtocolError as error:
            raise Problem(str(error), current.place(MaskedInput, device)) from None
    if history.session is not None:
        masks.apply(total, _off(history.session, current, opened))
    if isinstance(current.ending, Result) and ring.digest(total, spec.ring_bits) != current.ending.sum:
        raise Problem("the updates do not add up to the sum that the result names", current.place(Result))
    try:
        opened.values = spec.decode(total, len(current.counted))
    except DataError as error:
        raise Problem(str(error), current.place(Result)) from None


def _off(session: Session, current: Round, opened: Opened) -> list[Mask]:
    """The masks that are left in the sum of masked vectors, to be taken off."""
    plan, index = current.plan.digest(), current.plan.round - 1
    own = [
        Mask(masks.self_key(seed, session.context, plan, device), add=False) for device, seed in opened.seeds.items()
    ]
    pairs = [
        # The survivor added the mask if its id is the smaller one; what was added is subtracted now.
        Mask(
            masks.pair_key(key, session.peers[peer].mask_keys[index], session.context, plan, (device, peer)),
            add=peer > device,
        )
        for device, key in opened.keys.items()
        for peer in session.neighbors(device, current.counted)
    ]
    return [*own, *pairs]
