"""The rules of the protocol, held against a history: how many, who, and which share of whom."""

import bisect
from collections import Counter
from collections.abc import Callable
from functools import partial

from aggregation import checks, envelope, graph
from aggregation.errors import ProtocolError
from aggregation.messages import Assignment, ConsistencySignature, Survivors, Unmask, UnmaskResponse
from aggregation.session import Session
from aggregation.spec import Adversary
from aggregation.transcript import EVERYONE, Abort, Place, Result
from coordinator.audit.history import History, Round
from coordinator.audit.report import Problem, many


def thresholds(history: History) -> str:
    """No step of a round went on with too few.

    Raises:
        Problem: One did, or parameters protect a device not even if all others are honest.
    """
    spec, present = history.offer.spec, _present(history)
    near, active = min(spec.degree + 1, present), spec.adversary is Adversary.ACTIVE
    withstands = _withstands(history)
    if withstands < 0:
        raise Problem(f"{spec.threshold} of {near} devices open a secret: two groups apart from each other could do so")
    if active:  # two quorums have a device in common, and with this many corrupt ones an honest one (``graph.quorum``)
        withstands = min(withstands, 2 * spec.quorum - present - 1)
    if withstands < 0:
        raise Problem(
            f"{spec.quorum} of {present} devices agree on survivors: two groups could agree on different ones"
        )
    for current in history.rounds:
        _large_enough(history, current)
    agreed = f", and {spec.quorum} must agree on who is in it" if active else ""
    others = "1 other sides" if withstands == 1 else f"{withstands} others side"
    return (
        f"{spec.threshold} of {near} devices must answer to open a secret; a sum is of {spec.minimum_survivors} "
        f"devices or more{agreed}. No round went on with fewer. A device's update stays hidden even if {others} with "
        "the coordinator"
    )


def _present(history: History) -> int:
    return len(history.session.peers) if history.session else len(history.cohort)


def _withstands(history: History) -> int:
    """How many devices may be corrupt before secrets open; below zero where not even none (``policy``)."""
    spec, present = history.offer.spec, _present(history)
    if spec.degree >= present - 1:
        return 2 * spec.threshold - present - 1
    bits = graph.SIGMA + (graph.GRINDING if spec.adversary is Adversary.ACTIVE else 0)
    counts = range(present)
    fails = bisect.bisect_left(
        counts, True, key=lambda count: not graph.is_secure(present, count, spec.degree, spec.threshold, bits)
    )
    return fails - 1


def _large_enough(history: History, current: Round) -> None:
    spec = history.offer.spec
    _hold(current.place(Assignment), lambda: checks.enough_devices(spec, len(current.plan.members), "in the plan"))
    if current.survivors is None:
        return
    where = _told(history, current)
    count = len(current.survivors.vectors)
    _hold(where, lambda: checks.enough_devices(spec, count, "survivors"))
    if isinstance(current.ending, Result) and history.session is not None:
        _opened_nearby(history.session, current)


def _opened_nearby(session: Session, current: Round) -> None:
    """Near every device of the plan, itself included, so many opened as its secrets take."""
    threshold = session.spec.threshold
    for device in current.plan.members:
        near = (device, *session.neighbors(device, current.responses))
        count = sum(each in current.responses for each in near)
        if count < threshold:
            raise Problem(f"{count} devices near {device} opened, {threshold} are needed", current.place(Result))


def _told(history: History, current: Round) -> Place:
    """Where devices were told the survivors."""
    if history.offer.spec.adversary is Adversary.ACTIVE:
        return current.place(Survivors)
    return current.place(Unmask, next(iter(current.unmasks), EVERYONE))


def survivors(history: History) -> str:
    """The survivors are those of the plan whose updates arrived, and enough of them agreed to that.

    Raises:
        Problem: Otherwise.
    """
    for current in history.rounds:
        if current.survivors is None:
            continue
        active = history.offer.spec.adversary is Adversary.ACTIVE
        where = _told(history, current)
        arrived = {device: header.vector for device, header in current.inputs.items()}
        for device in sorted({*arrived, *current.survivors.vectors}):
            if current.survivors.vectors.get(device) != arrived.get(device):
                raise Problem(f"{device} is not counted with the update that it sent in this round", where)
        if active and current.responses and not current.unmasks:
            place = current.place(UnmaskResponse, next(iter(current.responses)))
            raise Problem("it answers no request to open, so that nothing shows who agreed to the survivors", place)
        for peer, unmask in current.unmasks.items() if active else ():
            _agreed(history, current, peer, unmask)
    return "each sum is over devices of its plan, with the updates that they sent; nobody is both counted and dropped"


def _agreed(history: History, current: Round, peer: str, unmask: Unmask) -> None:
    """A quorum agreed to the survivors that a device was told when it was asked to open."""
    where, digest, quorum = current.place(Unmask, peer), unmask.survivors.digest(), history.offer.spec.quorum
    if len(unmask.consistency_signatures) < quorum:
        raise Problem(f"{len(unmask.consistency_signatures)} agreements, {quorum} are needed", where)
    for device, signature in unmask.consistency_signatures.items():
        if device not in current.agreed:
            raise Problem(f"the agreement of {device} is not in the log", where)
        body = ConsistencySignature(digest, device).encode()
        _hold(where, partial(envelope.verify, history.cohort[device], ConsistencySignature.TAG, body, signature))


def shares(history: History) -> str:
    """Of each device one kind of secret was opened: what hides its update, or what hides it from the others.

    Raises:
        Problem: A device gave a share that it does not owe.
    """
    count = 0
    for current in history.rounds:
        for device, opening in current.responses.items():
            if history.session is None or current.survivors is None:
                break
            alive, dropped = checks.shares_to_reveal(history.session, current.plan, device, current.survivors)
            wrong = (set(opening.seeds) - set(alive)) | (set(opening.keys) - set(dropped))
            if wrong:
                what = f"a share of {min(wrong)} is opened that would show its update to the coordinator"
                raise Problem(what, current.place(UnmaskResponse, device))
            count += len(opening.seeds) + len(opening.keys)
    came = f"{many(count, 'share')} of secrets came in"
    return f"{came}; of each device they open one kind of secret only, so that no single update could be unmasked"


def results(history: History) -> str:
    """Each round ends in an adapter from which the next one starts, or without one.

    Raises:
        Problem: A round starts from another adapter than the one before it made.
    """
    current: tuple[int, str] | None = None
    for logged in history.rounds:
        plan = logged.plan
        if current is not None and (plan.adapter_version, plan.adapter_digest) != current:
            where = logged.place(Assignment)
            raise Problem("it starts from another adapter than the rounds before it made", where)
        current = (plan.adapter_version, plan.adapter_digest)
        if isinstance(logged.ending, Result):
            if logged.ending.version != plan.adapter_version + 1:
                raise Problem("the new adapter is not the next version", logged.place(Result))
            current = (logged.ending.version, logged.ending.adapter)
    return (
        "; ".join(f"round {logged.plan.round}: {ending(logged)}" for logged in history.rounds) or "no round was begun"
    )


def ending(current: Round) -> str:
    """How a round ended, in a few words."""
    match current.ending:
        case Result(version=version, adapter=adapter):
            return f"made adapter {version} ({adapter[:12]})"
        case Abort(reason=reason):
            return f"ended without a sum ({reason})"
        case _:
            return "was not ended"


def participation(history: History) -> dict[str, int]:
    """Device → rounds whose sum its update is in; devices of the cohort that are in none included."""
    counted = Counter(
        device for current in history.rounds if isinstance(current.ending, Result) for device in current.counted
    )
    return {device: counted[device] for device in history.cohort}


def _hold(where: Place, check: Callable[[], None]) -> None:
    try:
        check()
    except ProtocolError as error:
        raise Problem(str(error), where) from None
