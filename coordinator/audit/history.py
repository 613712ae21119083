"""What happened, message by message: each signed by who is said to have sent it, each of this session and in its step.

A ``History`` holds what the later checks (``rules``, ``opened``) look at. It grows entry by entry; the first message
that does not belong ends it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

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
from aggregation.transcript import EVERYONE, Abort, Checkpoint, Entry, Place, Result
from coordinator.audit.report import Problem

if TYPE_CHECKING:
    from datetime import datetime

# The steps before the first round, and those of a round, in order: a log never goes back.
_Kinds: TypeAlias = tuple[type[Message], ...]
_SETUP: _Kinds = (Offer, Advert, Roster, Shares)
_ROUND: _Kinds = (Assignment, MaskedInput, Survivors, ConsistencySignature, Unmask, UnmaskResponse, Result, Abort)
_ALL: _Kinds = (*_SETUP, *_ROUND, Checkpoint)
KINDS = {kind.TAG: kind for kind in _ALL}
_RANK = {kind: rank for rank, kind in (*enumerate(_SETUP), *enumerate(_ROUND))}
_BY_DEVICES = {kind.TAG for kind in (Advert, Shares, MaskedInput, ConsistencySignature, UnmaskResponse)}


@dataclass(slots=True)
class Round:
    """One round as logged. ``places``: kind and peer → where."""

    plan: Plan
    inputs: dict[str, MaskedInput] = field(default_factory=dict)
    survivors: Survivors | None = None
    agreed: set[str] = field(default_factory=set)
    unmasks: dict[str, Unmask] = field(default_factory=dict)
    responses: dict[str, UnmaskResponse] = field(default_factory=dict)
    ending: Result | Abort | None = None
    places: dict[tuple[str, str], Place] = field(default_factory=dict)

    @property
    def counted(self) -> tuple[str, ...]:
        """The survivors, where they are known."""
        return tuple(sorted(self.survivors.vectors)) if self.survivors else ()

    @property
    def dropped(self) -> tuple[str, ...]:
        """Who was in the plan and is no survivor."""
        return tuple(device for device in self.plan.members if device not in self.counted)

    def lost(self, adversary: Adversary) -> dict[str, tuple[str, ...]]:
        """Step → devices of the plan that did not answer it, though they had answered those before."""
        steps: dict[Step, Collection[str]] = {Step.PLAN: self.inputs}
        if self.survivors is not None and adversary is Adversary.ACTIVE:
            steps[Step.SURVIVORS] = self.agreed
        if self.unmasks:
            steps[Step.UNMASK] = self.responses
        return _lost(self.plan.members, steps)

    def place(self, kind: type[Message], peer: str = EVERYONE) -> Place:
        """Where a message is; where the round begins if it is not there."""
        return self.places.get((kind.TAG, peer)) or next(iter(self.places.values()))


@dataclass(slots=True)
class History:
    """A session as logged. ``cohort``: device → key, as the authority certified them."""

    offer: Offer
    cohort: Mapping[str, PublicKey]
    session: Session | None = None
    adverts: dict[str, bytes] = field(default_factory=dict)
    dealt: dict[str, Mapping[str, EncryptedShares]] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    places: dict[tuple[str, str], Place] = field(default_factory=dict)

    @property
    def lost(self) -> dict[str, tuple[str, ...]]:
        """Step → devices of the cohort that did not answer it; so they are in no round."""
        steps: dict[Step, Collection[str]] = {Step.OFFER: self.adverts}
        if self.session is not None:
            steps[Step.ROSTER] = self.dealt
        return _lost(tuple(self.cohort), steps)

    def signer(self, entry: Entry, coordinator: PublicKey) -> PublicKey:
        """Whose signature must be on an entry."""
        by_device = entry.kind in _BY_DEVICES
        if entry.peer not in self.cohort and (by_device or entry.peer != EVERYONE):
            raise Problem("the device is not in the cohort", entry.place)
        return self.cohort[entry.peer] if by_device else coordinator


def _lost(asked: tuple[str, ...], answered: Mapping[Step, Collection[str]]) -> dict[str, tuple[str, ...]]:
    lost = {}
    for step, answers in answered.items():
        lost[step.value] = tuple(device for device in asked if device not in answers)
        asked = tuple(device for device in asked if device in answers)
    return {step: devices for step, devices in lost.items() if devices}


def begin(entries: tuple[Entry, ...], root: Root, coordinator: PublicKey, at: "datetime | None" = None) -> History:
    """The offer, with every member certified by the authority, each once; valid ``at`` that time, if one is given.

    Raises:
        Problem: Otherwise.
    """
    if not entries:
        raise Problem("the log is empty")
    first = entries[0]
    try:
        offer = envelope.open_verified(Offer, first.message, coordinator, COORDINATOR)
        return History(offer, checks.members(root, offer.certificates, at))
    except ProtocolError as error:
        raise Problem(str(error), first.place) from None


def verify(history: History, entries: tuple[Entry, ...], coordinator: PublicKey) -> list[Message | None]:
    """Every entry's message, signed by the one who is said to have sent it; nothing where the log left its body out.

    Raises:
        Problem: One is not.
    """
    messages: list[Message | None] = []
    for entry in entries:
        kind = KINDS.get(entry.kind)
        if kind is None:
            raise Problem("there is no such kind of message", entry.place)
        try:
            signer = history.signer(entry, coordinator)
            brief = kind is Assignment and not envelope.unverified_body(entry.message)
            author = entry.peer if entry.kind in _BY_DEVICES else COORDINATOR
            messages.append(None if brief else envelope.open_verified(kind, entry.message, signer, author))
        except ProtocolError as error:
            raise Problem(str(error), entry.place) from None
    return messages


def follow(
    history: History, entries: tuple[Entry, ...], messages: Sequence[Message | None], coordinator: PublicKey
) -> None:
    """Fill the history: every message in its step, of this session, and none twice.

    Args:
        history: To be filled.
        entries: Of the log.
        messages: From ``verify``. What the log left out of one is put back here, and its signature verified.
        coordinator: Who signed those.

    Raises:
        Problem: One is not.
    """
    before = (0, 0)
    for entry, opened in zip(entries, messages, strict=True):
        message = opened or _put_back(history, entry, coordinator)
        if entry.kind == Checkpoint.TAG:
            _demand(entry.round == before[0], "the checkpoint is of another round than what it follows", entry)
            continue
        at = (entry.round, _RANK[KINDS[entry.kind]])
        if (entry.round > 0) != (KINDS[entry.kind] in _ROUND) or at < before:
            raise Problem("the message is not where its step is", entry.place)
        before = at
        places = _round_of(history, entry, message).places if entry.round else history.places
        if (entry.kind, entry.peer) in places:
            raise Problem("the step is answered a second time", entry.place)
        places[entry.kind, entry.peer] = entry.place
        try:
            _take(history, entry, message)
        except ProtocolError as error:
            raise Problem(str(error), entry.place) from None


def _put_back(history: History, entry: Entry, coordinator: PublicKey) -> Assignment:
    """A plan with boxes of which the log keeps the signature: that of its round, and what was dealt to the device."""
    current = history.rounds[-1] if history.rounds else None
    if current is None or current.plan.round != entry.round:
        raise Problem("the round has no plan", entry.place)
    encrypted_shares = {dealer: dealt[entry.peer] for dealer, dealt in history.dealt.items() if entry.peer in dealt}
    body = Assignment(current.plan, encrypted_shares).encode()
    try:
        return envelope.open_verified(Assignment, envelope.with_body(entry.message, body), coordinator, COORDINATOR)
    except ProtocolError:
        what = "the device got another plan than the first one of its round, or other boxes than were dealt to it"
        raise Problem(what, entry.place) from None


def _round_of(history: History, entry: Entry, message: Message) -> Round:
    last = history.rounds[-1] if history.rounds else None
    if last is not None and last.plan.round == entry.round:
        return last
    if not isinstance(message, Assignment):
        raise Problem("the round has no plan", entry.place)
    history.rounds.append(Round(message.plan))
    return history.rounds[-1]


def _take(history: History, entry: Entry, message: Message) -> None:
    """Dispatch by type; each branch raises ``ProtocolError`` or ``Problem`` for what does not belong."""
    _demand(getattr(message, "device", entry.peer) == entry.peer, "it is of another device", entry)
    match message:
        case Offer():
            _demand(entry.index == 0, "a second offer", entry)
        case Advert():
            history.adverts[entry.peer] = entry.message
        case Roster():
            history.session, signed = checks.roster(history.offer.spec, history.offer.digest(), history.cohort, message)
            _demand(signed == history.adverts, "the roster is not made of the adverts that came", entry)
        case Shares():
            _take_shares(history, entry, message)
        case Assignment():
            _take_plan(history, history.rounds[-1], entry, message)
        case _:
            _take_answer(history.rounds[-1], entry, message)


def _demand(holds: bool, text: str, entry: Entry) -> None:
    if not holds:
        raise Problem(text, entry.place)


def _session(history: History, entry: Entry) -> Session:
    if history.session is None:
        raise Problem("it comes before the roster", entry.place)
    return history.session


def _take_shares(history: History, entry: Entry, message: Shares) -> None:
    session = _session(history, entry)
    _demand(message.context == session.context, "the shares are of another session", entry)
    _demand(entry.peer in session.peers, "the device is not on the roster", entry)
    neighbors = session.neighbors(entry.peer, session.peers)
    _demand(set(message.encrypted_shares) == set(neighbors), "the boxes are not for exactly its neighbours", entry)
    fits = all(sharing.fits(box, session.spec.rounds) for box in message.encrypted_shares.values())
    _demand(fits, "a box has not the size of one", entry)
    history.dealt[entry.peer] = message.encrypted_shares


def _take_plan(history: History, current: Round, entry: Entry, message: Assignment) -> None:
    session, plan = _session(history, entry), message.plan
    _demand(plan == current.plan, "devices of one round got different plans", entry)
    _demand(plan.context == session.context, "the plan is of another session", entry)
    _demand(plan.round == entry.round <= session.spec.rounds, "the plan is of another round", entry)
    _demand(checks.ascending(plan.members), "the plan has a member twice, or out of order", entry)
    _demand(set(plan.members) <= set(history.dealt), "a member of the plan shared no secrets", entry)
    dealt = {
        dealer: history.dealt[dealer].get(entry.peer) for dealer in message.encrypted_shares if dealer in history.dealt
    }
    _demand(dealt == message.encrypted_shares, "the boxes are not those that were dealt to this device", entry)


def _take_answer(current: Round, entry: Entry, message: Message) -> None:
    plan, survivors = current.plan, current.survivors
    match message:
        case MaskedInput():
            _demand(entry.peer in plan.members, "the device is not in the plan", entry)
            current.inputs[entry.peer] = message
        case Survivors():
            _demand(survivors is None, "a second survivor set", entry)
            current.survivors = message
        case Unmask():
            _demand(survivors in (None, message.survivors), "another survivor set than the one agreed to", entry)
            current.survivors = message.survivors
            current.unmasks[entry.peer] = message
        case ConsistencySignature() | UnmaskResponse():
            _demand(survivors is not None and entry.peer in survivors.vectors, "the device is no survivor", entry)
            if isinstance(message, UnmaskResponse):
                current.responses[entry.peer] = message
            else:
                current.agreed.add(entry.peer)
        case Result() | Abort():
            _demand(current.ending is None, "a second ending", entry)
            current.ending = message
        case _:
            raise Problem("no step of a round", entry.place)
    plan_named = getattr(message.survivors if isinstance(message, Unmask) else message, "plan", plan.digest())
    _demand(plan_named == plan.digest(), "it is for another plan", entry)
    if isinstance(message, ConsistencySignature | UnmaskResponse):
        named = current.survivors and current.survivors.digest()
        _demand(message.survivors == named, "it is for another survivor set", entry)
    if isinstance(message, Result):
        _demand(message.survivors == current.counted, "it is for another survivor set", entry)
