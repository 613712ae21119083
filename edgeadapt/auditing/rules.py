"""The rules of the protocol, checked on a history: how many devices, which ones, and which shares they revealed.

Each rule returns sentences for the report, or raises a ``Problem``.
"""

import bisect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from aggregation import checks, envelope, graph, groups
from aggregation.errors import ProtocolError
from aggregation.messages import Assignment, ConsistencySignature, Survivors, Unmask, UnmaskResponse
from aggregation.session import Session
from aggregation.spec import Adversary, SessionSpec
from aggregation.transcript.entries import EVERYONE, Abort, AdapterId, Checkpoint, Place, Result
from edgeadapt.auditing.findings import Problem, count
from edgeadapt.auditing.history import History, Round


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
    _hold("plan.size", current.place(Assignment), lambda: checks.enough_devices(spec, planned, "in the plan"))
    _hold("plan.groups", current.place(Assignment), lambda: checks.grouped(spec, current.plan))
    if current.survivor_set is None:
        return
    place, survived = _named(history, current), len(current.survivors)
    _hold("survivors.size", place, lambda: checks.enough_devices(spec, survived, "survivors"))
    in_groups = partial(groups.require_minimum, spec, current.plan, current.survivors, "survivors", about="group")
    _hold("survivors.group", place, in_groups)
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
    """Return where the coordinator named the survivors to the devices."""
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
    """Check that a quorum signed the survivors that an unmask request names."""
    place, digest, quorum = current.place(Unmask, peer), unmask.survivors.digest(), history.offer.spec.quorum
    signatures = unmask.consistency_signatures
    if len(signatures) < quorum:
        text = f"{count(len(signatures), 'consistency signature')}, {quorum} are needed"
        raise Problem("unmask.quorum", text, place)
    spec, plan = history.offer.spec, current.plan
    _hold("unmask.group", place, lambda: checks.quorum(spec, plan, tuple(signatures)))
    for device, signature in signatures.items():
        if device not in current.signed:
            raise Problem("unmask.signers", f"the consistency signature of {device} is not in the log", place)
        body = ConsistencySignature(digest, device).encode()
        verify = partial(envelope.verify, history.cohort[device], ConsistencySignature.TAG, body, signature)
        _hold("unmask.signature", place, verify)


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
    """Holds an adapter that a message names. ``about``: the field that does."""

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
    """Return the adapter from which the devices of a round trained."""
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
    In a session without signatures the coordinator is trusted to log the updates that arrived.
    """
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


def _hold(about: str, place: Place, check: Callable[[], None]) -> None:
    try:
        check()
    except ProtocolError as error:
        raise Problem(about, str(error), place) from None
