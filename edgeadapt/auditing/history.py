"""The history of a session: its log, entry by entry, up to the first message that does not belong in its place."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TypeAlias

from aggregation import checks, envelope, sharing
from aggregation.errors import ProtocolError
from aggregation.messages import (
    Advert,
    Assignment,
    ConsistencySignature,
    EncryptedShares,
    MaskedInput,
    Message,
    Offer,
    Plan,
    Roster,
    Shares,
    Survivors,
    Unmask,
    UnmaskResponse,
)
from aggregation.pki import Root
from aggregation.pki.identity import PublicKey
from aggregation.session import COORDINATOR, Session
from aggregation.spec import Adversary
from aggregation.steps import Step
from aggregation.transcript import merkle
from aggregation.transcript.entries import ENTRY, EVERYONE, Abort, Checkpoint, Entry, Place, Reading, Result, Stage
from edgeadapt.auditing.findings import Problem

# The steps before the first round, and those of a round, in order: a log never goes back.
_Kinds: TypeAlias = tuple[type[Message], ...]
_SETUP: _Kinds = (Offer, Advert, Roster, Shares)
_ROUND: _Kinds = (Assignment, MaskedInput, Survivors, ConsistencySignature, Unmask, UnmaskResponse, Result, Abort)
_ALL: _Kinds = (*_SETUP, *_ROUND, Checkpoint)
_KINDS = {kind.TAG: kind for kind in _ALL}
_RANK = {kind: rank for rank, kind in (*enumerate(_SETUP), *enumerate(_ROUND))}
_BY_DEVICES = {kind.TAG for kind in (Advert, Shares, MaskedInput, ConsistencySignature, UnmaskResponse)}
_TIMED = {kind.TAG for kind in _ALL if kind is not Checkpoint} - _BY_DEVICES
_UNREADABLE = "unreadable"  # the kind of what follows the last readable entry


@dataclass(slots=True)
class Round:
    """Holds one round as logged. ``places``: kind and peer → place of the message."""

    plan: Plan
    inputs: dict[str, MaskedInput] = field(default_factory=dict)
    survivor_set: Survivors | None = None
    signed: set[str] = field(default_factory=set)  # devices whose consistency signatures are in the log
    unmasks: dict[str, Unmask] = field(default_factory=dict)
    responses: dict[str, UnmaskResponse] = field(default_factory=dict)
    ending: Result | Abort | None = None
    places: dict[tuple[str, str], Place] = field(default_factory=dict)

    @property
    def survivors(self) -> tuple[str, ...]:
        return tuple(sorted(self.survivor_set.vectors)) if self.survivor_set else ()

    @property
    def absent(self) -> tuple[str, ...]:
        """Return the members of the plan that did not survive; their mask keys are recovered."""
        return tuple(device for device in self.plan.members if device not in self.survivors)

    def dropouts_by_step(self, adversary: Adversary) -> dict[str, tuple[str, ...]]:
        """Map each step to the members of the plan that did not answer it, but had answered the previous steps."""
        steps: dict[Step, Collection[str]] = {Step.PLAN: self.inputs}
        if self.survivor_set is not None and adversary is Adversary.ACTIVE:
            steps[Step.SURVIVORS] = self.signed
        if self.unmasks:
            steps[Step.UNMASK] = self.responses
        return _dropouts(self.plan.members, steps)

    def place(self, kind: type[Message], peer: str = EVERYONE) -> Place:
        """Return the place of a message, or of the round's first one if the log does not have it."""
        return self.places.get((kind.TAG, peer)) or next(iter(self.places.values()))


@dataclass(slots=True)
class History:
    """Holds a session as logged. ``session``: the public side, once the roster was read. ``places``: kind and peer →
    place of a message before the first round."""

    offer: Offer
    cohort: Mapping[str, PublicKey]
    session: Session | None = None
    adverts: dict[str, bytes] = field(default_factory=dict)
    encrypted_shares: dict[str, Mapping[str, EncryptedShares]] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    places: dict[tuple[str, str], Place] = field(default_factory=dict)

    @property
    def dropouts_by_step(self) -> dict[str, tuple[str, ...]]:
        """Map each step to devices that did not answer it before the first round, and so are in no round."""
        steps: dict[Step, Collection[str]] = {Step.OFFER: self.adverts}
        if self.session is not None:
            steps[Step.ROSTER] = self.encrypted_shares
        return _dropouts(tuple(self.cohort), steps)

    def signer(self, entry: Entry, coordinator: PublicKey) -> PublicKey:
        """Return the party that must have signed an entry. Raises Problem if its device is not in the cohort."""
        by_device = entry.kind in _BY_DEVICES
        if entry.peer not in self.cohort and (by_device or entry.peer != EVERYONE):
            raise Problem("entry.peer", "the device is not in the cohort", entry.place)
        return self.cohort[entry.peer] if by_device else coordinator


def _dropouts(asked: tuple[str, ...], answered: Mapping[Step, Collection[str]]) -> dict[str, tuple[str, ...]]:
    dropouts = {}
    for step, answers in answered.items():
        dropouts[step.value] = tuple(device for device in asked if device not in answers)
        asked = tuple(device for device in asked if device in answers)
    return {step: devices for step, devices in dropouts.items() if devices}


# The log: numbering, and every checkpoint against the entries before it


def checkpoints(reading: Reading, coordinator: PublicKey) -> list[Checkpoint]:
    """Return the checkpoints of a log, each of which matches the entries before it. The last one need not close it.
    Raises Problem: an entry is damaged, missing, moved or repeated, goes back in time, or follows the end."""
    tree, verified, covered, latest = merkle.Tree(), list[Checkpoint](), 0, 0
    for index, entry in enumerate(reading.entries):
        if entry.index != index:
            text = f"its number is {entry.index}: an entry was removed, moved or repeated"
            raise Problem("entry.index", text, replace(entry.place, index=index))
        latest = _time(entry, latest)
        if entry.kind == Checkpoint.TAG:
            verified.append(_checkpoint(entry, coordinator, tree, covered, verified))
            covered = index + 1
        tree.append(ENTRY.encode(entry))
    _require_whole(reading, verified, covered)
    return verified


def _time(entry: Entry, latest: int) -> int:
    """Return the time of an entry, or that of those before it; 0 before the first."""
    if entry.kind not in _TIMED:
        _demand(entry.at is None, "entry.at", "it has a time, and only requests and endings have one", entry)
        return latest
    text = "it has no time, or an earlier one than an entry before it"
    _demand(entry.at is not None and entry.at >= latest, "entry.at", text, entry)
    return entry.at or 0


def _checkpoint(
    entry: Entry, coordinator: PublicKey, tree: merkle.Tree, covered: int, before: list[Checkpoint]
) -> Checkpoint:
    # No checkpoint covers the place of the last one.
    _demand(entry.peer == EVERYONE, "entry.peer", "a checkpoint is of no device", entry)
    with Problem.at(entry.place):
        checkpoint = envelope.open_verified(Checkpoint, entry.message, coordinator, COORDINATOR)
    if before and before[-1].stage is Stage.CLOSED:
        raise Problem("checkpoint.stage", "the log was closed before", entry.place)
    if (checkpoint.size, checkpoint.root) != (tree.size, tree.root()):
        text = f"entries {covered} to {entry.index - 1} are not those that the coordinator signed"
        raise Problem("checkpoint.root", text, entry.place)
    if before and (checkpoint.offer, checkpoint.previous) != (before[0].offer, before[0].previous):
        raise Problem("checkpoint.previous", "the checkpoint is of another session", entry.place)
    return checkpoint


def closes(checkpoints: Sequence[Checkpoint]) -> bool:
    return bool(checkpoints) and checkpoints[-1].stage is Stage.CLOSED


def _require_whole(reading: Reading, verified: list[Checkpoint], covered: int) -> None:
    size = len(reading.entries)
    if reading.problem:
        raise Problem("log", reading.problem, Place(size, _UNREADABLE, 0, EVERYONE))
    if not size:
        raise Problem("log", "the log is empty")
    if closes(verified) and covered < size:
        raise Problem("checkpoint.stage", "the log was closed before", reading.entries[covered].place)


# Identities, signatures, order


def begin(entries: tuple[Entry, ...], root: Root, coordinator: PublicKey, at: datetime | None = None) -> History:
    """Return the history after the offer, whose devices the authority certified, each once. ``root`` has a revocation
    list if that is to be checked; ``at`` is when certificates must be valid, None: any time. Raises Problem: the log
    does not begin with such an offer."""
    if not entries:
        raise Problem("log", "the log is empty")
    first = entries[0]
    with Problem.at(first.place):
        offer = envelope.open_verified(Offer, first.message, coordinator, COORDINATOR)
        return History(offer, checks.members(root, offer.certificates, coordinator, at))


def verify(history: History, entries: tuple[Entry, ...], coordinator: PublicKey) -> list[Message | None]:
    """Return the message of every entry, signed by its stated sender; None where the log left out the body. Raises
    Problem: a signature is not valid, or there is no such kind of message."""
    messages: list[Message | None] = []
    for entry in entries:
        kind = _KINDS.get(entry.kind)
        if kind is None:
            raise Problem("entry.kind", "there is no such kind of message", entry.place)
        with Problem.at(entry.place):
            signer = history.signer(entry, coordinator)
            bodiless = kind is Assignment and not envelope.unverified_body(entry.message)
            author = entry.peer if entry.kind in _BY_DEVICES else COORDINATOR
            messages.append(None if bodiless else envelope.open_verified(kind, entry.message, signer, author))
    return messages


def follow(
    history: History, entries: tuple[Entry, ...], messages: Sequence[Message | None], coordinator: PublicKey
) -> None:
    """Fill the history: every message in its step, of this session, and none twice.

    A checkpoint stands right before each round, and nowhere within one. So every round has an ending unless the log
    ends in it, and a log that is not closed has at most one round that no checkpoint covers. ``messages`` is from
    ``verify``; a body that the log left out is restored here, and its signature verified. Raises Problem: a message
    does not belong."""
    before = (0, 0)
    for entry, verified in zip(entries, messages, strict=True):
        message = verified or _restored(history, entry, coordinator)
        if entry.kind == Checkpoint.TAG:
            _demand(entry.round == before[0], "entry.round", "the checkpoint is of another round", entry)
            ended = not history.rounds or history.rounds[-1].ending is not None
            _demand(ended, "round.ending", f"round {entry.round} has no ending before it", entry)
            continue
        at = (entry.round, _RANK[_KINDS[entry.kind]])
        in_step = (entry.round > 0) == (_KINDS[entry.kind] in _ROUND) and at >= before
        _demand(in_step, "entry.order", "the message is not where its step is", entry)
        signed = entry.round == before[0] or entries[entry.index - 1].kind == Checkpoint.TAG
        _demand(signed, "checkpoint.missing", "the round begins before the coordinator signed the log so far", entry)
        before = at
        places = _round_of(history, entry, message).places if entry.round else history.places
        first = (entry.kind, entry.peer) not in places
        _demand(first, f"{entry.kind}.repeated", "the step is answered a second time", entry)
        places[entry.kind, entry.peer] = entry.place
        with Problem.at(entry.place):
            _take(history, entry, message)


def _restored(history: History, entry: Entry, coordinator: PublicKey) -> Assignment:
    """Rebuild an assignment, of which the log keeps only the signature, from its plan and what the dealers sent."""
    current = history.rounds[-1] if history.rounds else None
    if current is None or current.plan.round != entry.round:
        raise Problem("plan", "the round has no plan", entry.place)
    dealt = history.encrypted_shares
    body = Assignment(current.plan, {dealer: to[entry.peer] for dealer, to in dealt.items() if entry.peer in to})
    try:
        raw = envelope.with_body(entry.message, body.encode())
        return envelope.open_verified(Assignment, raw, coordinator, COORDINATOR)
    except ProtocolError:
        text = "the device got another plan than the first one, or other encrypted shares than were dealt to it"
        raise Problem("assignment.signature", text, entry.place) from None


def _round_of(history: History, entry: Entry, message: Message) -> Round:
    last = history.rounds[-1] if history.rounds else None
    if last is not None and last.plan.round == entry.round:
        return last
    if not isinstance(message, Assignment):
        raise Problem("plan", "the round has no plan", entry.place)
    history.rounds.append(Round(message.plan))
    return history.rounds[-1]


def _take(history: History, entry: Entry, message: Message) -> None:
    """Dispatch by type; each branch raises ``ProtocolError`` or ``Problem`` for what does not belong."""
    own = getattr(message, "device", entry.peer) == entry.peer
    _demand(own, f"{entry.kind}.device", "it is of another device", entry)
    match message:
        case Offer():
            _demand(entry.index == 0, "offer.repeated", "a second offer", entry)
        case Advert():
            history.adverts[entry.peer] = entry.message
        case Roster():
            history.session, signed = checks.roster(history.offer.spec, history.offer.digest(), history.cohort, message)
            text = "the roster does not consist of the adverts in the log"
            _demand(signed == history.adverts, "roster.adverts", text, entry)
        case Shares():
            _take_shares(history, entry, message)
        case Assignment():
            _take_assignment(history, history.rounds[-1], entry, message)
        case _:
            _take_answer(history.rounds[-1], entry, message)


def _demand(holds: bool, about: str, text: str, entry: Entry) -> None:
    if not holds:
        raise Problem(about, text, entry.place)


def _session(history: History, entry: Entry) -> Session:
    if history.session is None:
        raise Problem("roster", "it comes before the roster", entry.place)
    return history.session


def _take_shares(history: History, entry: Entry, message: Shares) -> None:
    session, shares = _session(history, entry), message.encrypted_shares
    _demand(message.context == session.context, "shares.context", "the shares are of another session", entry)
    _demand(entry.peer in session.peers, "shares.device", "the device is not on the roster", entry)
    neighbors = session.neighbors(entry.peer, session.peers)
    text = "the encrypted shares are not for exactly the neighbors of the device"
    _demand(set(shares) == set(neighbors), "shares.encrypted_shares", text, entry)
    fits = all(sharing.fits(each, session.spec.rounds) for each in shares.values())
    _demand(fits, "shares.ciphertext", "encrypted shares do not have the size for the rounds of the session", entry)
    history.encrypted_shares[entry.peer] = shares


def _take_assignment(history: History, current: Round, entry: Entry, message: Assignment) -> None:
    session, plan, dealt = _session(history, entry), message.plan, history.encrypted_shares
    _demand(plan == current.plan, "assignment.plan", "devices of one round got different plans", entry)
    _demand(plan.context == session.context, "plan.context", "the plan is of another session", entry)
    _demand(plan.round == entry.round <= session.spec.rounds, "plan.round", "the plan is of another round", entry)
    _demand(checks.ascending(plan.members), "plan.order", "the plan has a member twice, or out of order", entry)
    _demand(set(plan.members) <= set(dealt), "plan.members", "a member of the plan shared no secrets", entry)
    expected = {dealer: dealt[dealer].get(entry.peer) for dealer in message.encrypted_shares if dealer in dealt}
    text = "the encrypted shares are not those that were dealt to this device"
    _demand(expected == message.encrypted_shares, "assignment.encrypted_shares", text, entry)


def _take_answer(current: Round, entry: Entry, message: Message) -> None:
    plan, survivors = current.plan, current.survivor_set
    match message:
        case MaskedInput():
            _demand(entry.peer in plan.members, "masked-input.device", "the device is not in the plan", entry)
            current.inputs[entry.peer] = message
        case Survivors():
            _demand(survivors is None, "survivors.repeated", "a second survivor set", entry)
            current.survivor_set = message
        case Unmask():
            text = "another survivor set than the one that devices signed"
            _demand(survivors in (None, message.survivors), "unmask.survivors", text, entry)
            current.survivor_set = message.survivors
            current.unmasks[entry.peer] = message
        case ConsistencySignature() | UnmaskResponse():
            survived = survivors is not None and entry.peer in survivors.vectors
            _demand(survived, f"{entry.kind}.device", "the device is not a survivor", entry)
            if isinstance(message, UnmaskResponse):
                current.responses[entry.peer] = message
            else:
                current.signed.add(entry.peer)
        case Result() | Abort():
            _demand(current.ending is None, f"{entry.kind}.repeated", "a second ending", entry)
            current.ending = message
        case _:
            raise Problem("entry.kind", "no step of a round", entry.place)
    named = getattr(message.survivors if isinstance(message, Unmask) else message, "plan", plan.digest())
    _demand(named == plan.digest(), f"{message.TAG}.plan", "it is for another plan", entry)
    if isinstance(message, ConsistencySignature | UnmaskResponse):
        digest = current.survivor_set and current.survivor_set.digest()
        _demand(message.survivors == digest, f"{message.TAG}.survivors", "it is for another survivor set", entry)
    if isinstance(message, Result):
        _demand(message.survivors == current.survivors, "result.survivors", "it is for another survivor set", entry)
