"""The rules of the protocol, checked on a history. Each returns sentences for the report, or raises a ``Problem``.
Every secret that a session unmasked is compared with its owner's commitment, and every sum recomputed bit for bit by
other code than the coordinator's."""

import bisect
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from aggregation import checks, envelope, graph, groups, masks, ring
from aggregation.errors import DataError
from aggregation.groups import GroupSum
from aggregation.masks import Mask
from aggregation.messages import Assignment, ConsistencySignature, MaskedInput, Survivors, Unmask, UnmaskResponse
from aggregation.recovery import Recovery
from aggregation.ring import Ring
from aggregation.session import Session
from aggregation.spec import CORRUPT_FRACTION, Adversary, SessionSpec
from aggregation.transcript.entries import EVERYONE, Abort, AdapterId, Checkpoint, Place, Result
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
    """Add up the masked vectors that were kept, subtract the masks, and compare with the results. The recomputed sums
    are put into ``unmasked``, which ``secrets`` filled. Raises Problem: a vector is not the one that was signed, or
    only some of a round are there; or a sum is not the one that the result names; Skipped: a sum lacks its vectors."""
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
    """Check whether a round's vectors, of ``size`` bytes, were kept, also if it was aborted. A coordinator keeps all of
    a session or none: else removing one would take a sum that does not hold out of the audit."""
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
        with Problem.at(current.place(MaskedInput, device)):
            np.add(total, ring.unpack(packed, spec.size, spec.ring_bits), out=total)
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


def thresholds(history: History) -> str:
    """Check that no step of a round continued with too few devices. The session's parameters must protect devices at
    least if all the others are honest."""
    spec, present = history.offer.spec, _present(history)
    holders, active = min(spec.degree + 1, present), spec.adversary is Adversary.ACTIVE
    tolerated = _tolerated(history)
    if tolerated < 0:
        text = f"{spec.threshold} of {holders} devices recover a secret: two disjoint groups could do so"
        raise Problem("spec.threshold", text)
    if active:  # two quorums share a device, despite corrupt ones an honest one (``graph.quorum``)
        tolerated = min(tolerated, 2 * spec.quorum - present - 1)
    if tolerated < 0:
        text = f"{spec.quorum} of {present} devices sign a survivor set: two groups could sign different ones"
        raise Problem("spec.minimum_survivors", text)
    for current in history.rounds:
        _enough_devices(history, current)
    signatures = f" and {spec.quorum} signatures on its survivor set" if active else ""
    trusted = "" if active else ". The session is honest-but-curious: nothing shows that all devices were shown one set"
    if spec.grouping:
        signatures += f", with {spec.grouping.minimum} or more devices and signatures of each of {spec.groups} groups"
    both = "both secrets of a device, or signatures on two survivor sets," if active else "both secrets of a device"
    chance = "" if spec.degree >= present - 1 else " (except by chance, at most 2^-40)"
    return (
        f"{spec.threshold} of {holders} devices recover a secret; a sum needs {spec.minimum_survivors} devices or more"
        f"{signatures}. No round continued with fewer. With these numbers, {both} take "
        f"{count(tolerated + 1, 'colluding device')} or more{chance}{trusted}"
    )


def _present(history: History) -> int:
    return len(history.session.peers) if history.session else len(history.cohort)


def _tolerated(history: History) -> int:
    """Return how many corrupt devices can recover no secret; negative if none at all already can."""
    spec, present = history.offer.spec, _present(history)
    if spec.degree >= present - 1:
        return 2 * spec.threshold - present - 1
    bits = graph.SIGMA + (graph.GRINDING if spec.adversary is Adversary.ACTIVE else 0)
    counts = range(present)
    insecure_from = bisect.bisect_left(
        counts, True, key=lambda corrupt: not graph.is_secure(present, corrupt, spec.degree, spec.threshold, bits)
    )
    return insecure_from - 1


def _enough_devices(history: History, current: Round) -> None:
    spec = history.offer.spec
    planned = len(current.plan.members)
    with Problem.at(current.place(Assignment), "plan.size"):
        checks.enough_devices(spec, planned, "in the plan")
    with Problem.at(current.place(Assignment), "plan.groups"):
        checks.grouped(spec, current.plan)
    if current.survivor_set is None:
        return
    place, survived = _named(history, current), len(current.survivors)
    with Problem.at(place, "survivors.size"):
        checks.enough_devices(spec, survived, "survivors")
    with Problem.at(place, "survivors.group"):
        groups.require_minimum(spec, current.plan, current.survivors, "survivors", about="group")
    if isinstance(current.ending, Result) and history.session is not None:
        _enough_responses(history.session, current)


def _enough_responses(session: Session, current: Round) -> None:
    """Check that ``threshold`` devices revealed shares in every member's neighborhood, itself included."""
    threshold = session.spec.threshold
    for device in current.plan.members:
        holders = (device, *session.neighbors(device, current.responses))
        revealed = sum(each in current.responses for each in holders)
        if revealed < threshold:
            text = f"{revealed} devices revealed shares of {device}, {threshold} are needed"
            raise Problem("unmask-response.size", text, current.place(Result))


def _named(history: History, current: Round) -> Place:
    if history.offer.spec.adversary is Adversary.ACTIVE:
        return current.place(Survivors)
    return current.place(Unmask, next(iter(current.unmasks), EVERYONE))


def survivors(history: History) -> str:
    """Check that the survivors are the members whose updates arrived, and that a quorum of them signed that."""
    for current in history.rounds:
        if current.survivor_set is None:
            continue
        active = history.offer.spec.adversary is Adversary.ACTIVE
        place = _named(history, current)
        arrived = {device: header.vector for device, header in current.inputs.items()}
        for device in sorted({*arrived, *current.survivors}):
            if current.survivor_set.vectors.get(device) != arrived.get(device):
                text = f"{device} is not counted with the update that it sent in this round"
                raise Problem("survivors.members", text, place)
        if active and current.responses and not current.unmasks:
            text = "it answers no unmask request, so nothing shows which devices signed the survivor set"
            raise Problem("unmask", text, current.place(UnmaskResponse, next(iter(current.responses))))
        for peer, unmask in current.unmasks.items() if active else ():
            _signed_by_quorum(history, current, peer, unmask)
    return "each sum is over devices of its plan, with the updates that they sent; none is both counted and dropped"


def _signed_by_quorum(history: History, current: Round, peer: str, unmask: Unmask) -> None:
    place, digest, quorum = current.place(Unmask, peer), unmask.survivors.digest(), history.offer.spec.quorum
    signatures = unmask.consistency_signatures
    if len(signatures) < quorum:
        text = f"{count(len(signatures), 'consistency signature')}, {quorum} are needed"
        raise Problem("unmask.quorum", text, place)
    spec, plan = history.offer.spec, current.plan
    with Problem.at(place, "unmask.group"):
        checks.quorum(spec, plan, tuple(signatures))
    for device, signature in signatures.items():
        if device not in current.signed:
            raise Problem("unmask.signers", f"the consistency signature of {device} is not in the log", place)
        body = ConsistencySignature(digest, device).encode()
        with Problem.at(place, "unmask.signature"):
            envelope.verify(history.cohort[device], ConsistencySignature.TAG, body, signature)


def shares(history: History) -> str:
    """Check that each device has one kind of secret recovered: the seed of its own mask, or its mask key."""
    revealed = 0
    for current in history.rounds:
        for device, response in current.responses.items():
            if history.session is None or current.survivor_set is None:
                break
            alive, dropped = checks.shares_to_reveal(history.session, current.plan, device, current.survivor_set)
            wrong = (set(response.seeds) - set(alive)) | (set(response.keys) - set(dropped))
            if wrong:
                text = f"it reveals a share of {min(wrong)} that would show its update to the coordinator"
                raise Problem("unmask-response.shares", text, current.place(UnmaskResponse, device))
            revealed += len(response.seeds) + len(response.keys)
    return f"{count(revealed, 'share')} revealed, in each round of one kind for each device"


def results(history: History, checkpoints: Sequence[Checkpoint]) -> str:
    """Check that each round starts from the newest adapter, a result is the next one, and checkpoints name it."""
    adapters = _named_adapters(history, checkpoints)
    newest = adapters[0].adapter if adapters else (0, "")
    for named in adapters:
        if named.about == "result.version" and named.adapter[0] == newest[0] + 1:
            newest = named.adapter
        elif named.adapter != newest:
            text = f"it names adapter {named.adapter[0]}, and the newest one before it is another: {newest[0]}"
            raise Problem(named.about, text, named.place)
    return "; ".join(f"round {logged.plan.round}: {ending(logged)}" for logged in history.rounds) or "no round began"


@dataclass(frozen=True, slots=True)
class _NamedAdapter:
    """Holds an adapter that the field ``about`` of a message names."""

    place: Place
    about: str
    adapter: AdapterId


def _named_adapters(history: History, checkpoints: Sequence[Checkpoint]) -> list[_NamedAdapter]:
    """List what checkpoints, plans and results say about adapters, in the order of the log."""
    named = [
        _NamedAdapter(Place(each.size, Checkpoint.TAG, 0, EVERYONE), "checkpoint.adapter", each.newest)
        for each in checkpoints
    ]
    for current in history.rounds:
        named.append(_NamedAdapter(current.place(Assignment), "plan.adapter", adapter(current)))
        if isinstance(current.ending, Result):
            named.append(_NamedAdapter(current.place(Result), "result.version", current.ending.produced))
    return sorted(named, key=lambda each: each.place.index)


def adapter(current: Round) -> AdapterId:
    return current.plan.adapter_version, current.plan.adapter_digest


def ending(current: Round) -> str:
    match current.ending:
        case Result(version=version, adapter=adapter):
            return f"produced adapter {version} ({adapter[:12]})"
        case Abort(reason=reason):
            return f"aborted ({reason})"
        case _:
            return "did not end"


def unmasked(spec: SessionSpec, current: Round) -> tuple[str, ...]:
    """List the devices in the sum that the coordinator learned, or could learn; empty if it could learn none.

    Nothing makes it log the unmask request and the answers of a round that it then aborts, or the signatures of devices
    that it needs no more. A device that was asked to unmask continues only if the log has its own signature. Two sums
    that differ by few devices have such a device in common: one signature is enough for a sum that could be unmasked.
    In a session without signatures the coordinator is trusted to log the updates that arrived."""
    if isinstance(current.ending, Result) or current.unmasks or current.responses:
        return current.survivors
    if spec.adversary is Adversary.ACTIVE:
        return current.survivors if current.signed else ()
    return tuple(sorted(current.inputs)) if len(current.inputs) >= spec.minimum_survivors else ()


def participation(history: History) -> dict[str, int]:
    counted = Counter(
        device for current in history.rounds if isinstance(current.ending, Result) for device in current.survivors
    )
    return {device: counted[device] for device in history.cohort}
