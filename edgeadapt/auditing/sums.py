"""What a session unmasked: every secret compared with its owner's commitment, and every sum recomputed bit for bit.

The sum is recomputed by other code than the coordinator's: two implementations must give one result.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from aggregation import graph, groups, masks, ring
from aggregation.errors import DataError, ProtocolError
from aggregation.groups import GroupSum
from aggregation.masks import Mask
from aggregation.messages import MaskedInput
from aggregation.recovery import Recovery
from aggregation.ring import Ring
from aggregation.session import Session
from aggregation.spec import CORRUPT_FRACTION, SessionSpec
from aggregation.transcript.entries import Result
from edgeadapt.auditing.findings import Problem, ProducedAdapter, Skipped, count
from edgeadapt.auditing.history import History, Round
from edgeadapt.rounds.taskkinds import kind_of

# Digest and length in bytes → packed masked vector; None where it was not kept, DataError where it is longer.
Vectors = Callable[[bytes, int], bytes | None]


@dataclass(slots=True)
class UnmaskedRound:
    """Holds what the shares of a round recover. ``sums``: the survivors' contributions by group, decoded, once ``sums``
    has recomputed them; zeros where honest survivors cannot have one."""

    seeds: Mapping[str, bytes] = field(repr=False)  # survivor → seed of its own mask
    keys: Mapping[str, bytes] = field(repr=False)  # device of the plan that is not a survivor → its mask key
    blamed: tuple[str, ...]  # devices that revealed wrong shares
    sums: tuple[GroupSum, ...] | None = field(default=None, repr=False)


def secrets(history: History, unmasked: dict[int, UnmaskedRound]) -> str:
    """Recover every secret of the rounds that have a result, into ``unmasked`` by round. Raises Problem: one cannot be
    recovered, or differs from what its owner committed to before any share was revealed."""
    for current in history.rounds:
        if history.session is not None and isinstance(current.ending, Result):
            unmasked[current.plan.round] = _recover(history.session, history, current)
    recovered = sum(len(each.seeds) + len(each.keys) for each in unmasked.values())
    blamed = sorted({device for each in unmasked.values() for device in each.blamed})
    wrong = f"; wrong shares of {', '.join(blamed)} were left out" if blamed else ""
    return f"{count(recovered, 'secret')} recovered, each the one that its owner had committed to{wrong}"


def _recover(session: Session, history: History, current: Round) -> UnmaskedRound:
    corrupt = graph.count_of(len(history.cohort), CORRUPT_FRACTION)
    recovery = Recovery(session, current.plan, history.encrypted_shares, current.responses, corrupt)
    seeds = {device: recovery.seed(device) for device in current.survivors}
    keys = {device: recovery.mask_key(device) for device in current.absent}
    hidden = sorted(device for device, secret in {**seeds, **keys}.items() if secret is None)
    if hidden:
        text = f"the shares in the log do not recover the secret that {hidden[0]} committed to"
        raise Problem("unmask-response.shares", text, current.place(Result))
    return UnmaskedRound(
        {device: secret for device, secret in seeds.items() if secret},
        {device: secret for device, secret in keys.items() if secret},
        tuple(sorted(recovery.blamed)),
    )


def sums(history: History, unmasked: Mapping[int, UnmaskedRound], vectors: Vectors) -> str:
    """Add up the masked vectors that were kept, subtract the masks, and compare with the results.

    The recomputed sums are put into ``unmasked``, which ``secrets`` filled. Raises Problem: a vector is not the one
    that was signed, or only some of a round are there; or a sum is not the one that the result names; Skipped: a sum
    lacks its vectors.
    """
    size = _packed_size(history)
    kept = {current.plan.round for current in history.rounds if _all_kept(current, vectors, size)}
    ended = [current for current in history.rounds if current.plan.round in unmasked]
    complete = [current for current in ended if current.plan.round in kept]
    if not ended:
        return "no round has a result"
    for current in complete:
        _recompute(history, current, unmasked[current.plan.round], vectors)
    text = f"{len(complete)} of {count(len(ended), 'sum')} recomputed from the masked updates, equal bit for bit"
    made = {current.plan.round: unmasked[current.plan.round].sums or () for current in complete}
    if spoiled := [number for number, found in made.items() if any(each.spoiled for each in found)]:
        text += f"; honest devices cannot have one of round {', '.join(map(str, spoiled))}, which counts as zero"
    if len(complete) < len(ended):
        raise Skipped("vectors", f"{text}. Of the others only digests of the masked updates were kept")
    return text


def produced(history: History, unmasked: Mapping[int, UnmaskedRound]) -> tuple[ProducedAdapter, ...]:
    """Return the adapters of the rounds that have a result, with the sums that ``sums`` recomputed."""
    return tuple(
        ProducedAdapter(
            place=current.place(Result),
            before=(current.plan.adapter_version, current.plan.adapter_digest),
            after=current.ending.produced,
            plan=current.plan.digest().hex(),
            survivors=current.survivors,
            spec=history.offer.spec,
            training=current.plan.training,
            sums=unmasked[current.plan.round].sums,
        )
        for current in history.rounds
        if isinstance(current.ending, Result)
    )


def _all_kept(current: Round, vectors: Vectors, size: int) -> bool:
    """Check whether a round's vectors, of ``size`` bytes, were kept, also if it was aborted; each is the one signed.

    A coordinator keeps all vectors of a session or none. Without this check, removing one of them would take a sum that
    does not hold out of the audit.
    """
    missing = [device for device in current.inputs if not _is_kept(current, device, vectors, size)]
    if 0 < len(missing) < len(current.inputs):
        text = "its vector is missing, and others of the round were kept"
        raise Problem("vectors", text, current.place(MaskedInput, missing[0]))
    return not missing


def _packed_size(history: History) -> int:
    spec = history.offer.spec.vector
    return ring.packed_size(spec.size, spec.ring_bits)


def _is_kept(current: Round, device: str, vectors: Vectors, size: int) -> bool:
    digest = current.inputs[device].vector
    packed = vectors(digest, size)
    if packed is not None and hashlib.sha256(packed).digest() != digest:
        text = "the vector that was kept is not the one that was signed"
        raise Problem("masked-input.vector", text, current.place(MaskedInput, device))
    return packed is not None


def _recompute(history: History, current: Round, unmasked: UnmaskedRound, vectors: Vectors) -> None:
    spec = history.offer.spec
    by_group = groups.split(spec, current.plan, current.survivors)
    totals = [_total(history, current, devices, unmasked, vectors) for devices in by_group]
    if isinstance(current.ending, Result) and groups.digest_of(spec, totals) != current.ending.sum:
        text = "the updates do not add up to the sum that the result names"
        raise Problem("result.sum", text, current.place(Result))
    unmasked.sums = tuple(_decoded(spec, devices, total) for devices, total in zip(by_group, totals, strict=True))


def _decoded(spec: SessionSpec, survivors: tuple[str, ...], total: Ring) -> GroupSum:
    try:
        values = spec.vector.decode(total, len(survivors))
        kind_of(spec.vector).check_sum(spec, values, len(survivors))
    except DataError as error:
        return GroupSum(survivors, spec.vector.zeros(), str(error))
    return GroupSum(survivors, values)


def _total(
    history: History, current: Round, survivors: tuple[str, ...], unmasked: UnmaskedRound, vectors: Vectors
) -> Ring:
    spec = history.offer.spec.vector
    total = ring.zeros(spec.size, spec.ring_bits)
    for device in survivors:
        packed = vectors(current.inputs[device].vector, _packed_size(history)) or b""
        try:
            np.add(total, ring.unpack(packed, spec.size, spec.ring_bits), out=total)
        except ProtocolError as error:
            raise Problem.of(error, current.place(MaskedInput, device)) from None
    if history.session is not None:
        masks.apply(total, _remaining_masks(history.session, current, survivors, unmasked))
    return total


def _remaining_masks(
    session: Session, current: Round, survivors: tuple[str, ...], unmasked: UnmaskedRound
) -> list[Mask]:
    """Return the masks that the sum of a group's masked vectors still contains, with the sign that removes them."""
    plan, index = current.plan.digest(), current.plan.round - 1
    own = [
        Mask(masks.self_key(unmasked.seeds[device], session.context, plan, device), add=False) for device in survivors
    ]
    pairs = [
        # A survivor added the mask if its id is the smaller one; what was added is subtracted now.
        Mask(
            masks.pair_key(key, session.peers[peer].mask_keys[index], session.context, plan, (device, peer)),
            add=peer > device,
        )
        for device, key in unmasked.keys.items()
        for peer in groups.mask_peers(session, current.plan, device, survivors)
    ]
    return [*own, *pairs]
