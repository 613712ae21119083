"""A coordinator's logs of sessions in which one device takes part, and the device's state after each step."""

from dataclasses import dataclass, field

from aggregation import envelope
from aggregation.messages import ConsistencySignature, MaskedInput, Plan
from aggregation.pki import IdentityKey
from aggregation.steps import Step
from aggregation.transcript.entries import Abort, AdapterId, Checkpoint, Result, Stage
from aggregation.transcript.log import NO_SESSION, Transcript
from aggregation.transcript.logstate import LogState, receipts, session_chain_proof

KEY, STRANGER, DEVICE = IdentityKey(bytes(range(32))), IdentityKey(bytes(32)), IdentityKey(bytes([1]) * 32)
ME, OTHER = "a", "b"
AT = 1_770_000_000  # 2026-02-02, in seconds since 1970
OFFERS = [bytes([number]) * 32 for number in range(9)]
SURVIVORS = (ME, OTHER)
SEED: AdapterId = (1, "ab" * 32)  # the adapter that the first session starts from


def plan(round_: int) -> Plan:
    return Plan(bytes(32), round_, SURVIVORS, round_, "ab" * 32, b"")


def result(round_: int, version: int, survivors: tuple[str, ...] = SURVIVORS) -> Result:
    return Result(plan(round_).digest(), survivors, bytes(32), version, f"{version:064x}")


def signed(message: MaskedInput | ConsistencySignature, key: IdentityKey = DEVICE) -> bytes:
    return envelope.sign(key, message)


def masked(round_: int) -> bytes:
    return signed(MaskedInput(plan(round_).digest(), ME, bytes(32)))


def confirmed(round_: int) -> bytes:
    return signed(ConsistencySignature(plan(round_).digest(), ME))


@dataclass
class LoggedSession:
    """A coordinator's log of one session in which the device ``ME`` takes part."""

    offer: bytes = OFFERS[1]
    previous: bytes = NO_SESSION
    advert: bytes = b"advert"
    key: IdentityKey = KEY
    start: AdapterId = SEED
    log: Transcript = field(init=False)

    def __post_init__(self) -> None:
        self.log = Transcript(self.offer, self.start, self.previous)
        self.log.sent(Step.OFFER, dict.fromkeys(SURVIVORS, b"offer"), AT)
        self.log.received(Step.OFFER, ME, self.advert)
        self.log.checkpoint(self.key)

    def round(
        self, number: int, *, without: tuple[Step, ...] = (), ending: Result | Abort | None = None
    ) -> "LoggedSession":
        """Log a round, except the answers of ``ME`` to the steps of ``without``."""
        self.log.begin(plan(number))
        self.log.sent(Step.PLAN, dict.fromkeys(SURVIVORS, b"plan"), AT)
        if Step.PLAN not in without:
            self.log.received(Step.PLAN, ME, masked(number) + len(masked(number)).to_bytes(4, "big"))
        if Step.SURVIVORS not in without:
            self.log.received(Step.SURVIVORS, ME, confirmed(number))
        self.log.ended(self.key, ending or result(number, self.log.newest[0] + 1), AT)
        return self

    def receipt(self) -> bytes:
        return receipts(self.log, [ME])[ME]

    def close(self) -> bytes:
        """Close the log; returns its last checkpoint, signed."""
        self.log.checkpoint(self.key, Stage.CLOSED)
        return self.log.checkpoints[max(self.log.checkpoints)]

    @property
    def end(self) -> bytes:
        return digest(self.log.checkpoints[max(self.log.checkpoints)])


def digest(signed: bytes) -> bytes:
    return Checkpoint.decode(envelope.unverified_body(signed)).digest()


def took_part(log_state: LogState, round_: int, upto: Step = Step.UNMASK) -> LogState:
    """The state after the device answered the steps of a round up to ``upto``."""
    log_state = log_state.contributed(plan(round_).digest(), masked(round_))
    if upto is not Step.PLAN:
        log_state = log_state.on_survivors(SURVIVORS, confirmed(round_))
    return log_state.on_survivors(SURVIVORS) if upto is Step.UNMASK else log_state


def joined(session: LoggedSession) -> LogState:
    """The state after the device joined its first session."""
    return LogState.initial(KEY.public, session_chain_proof(session.log, KEY), session.offer, ME)


def seen(rounds: int) -> LogState:
    """The state of a device that took part in so many rounds and has not seen the end of the last one."""
    session, log_state = LoggedSession(), joined(LoggedSession())
    for number in range(1, rounds + 1):
        log_state = took_part(log_state.on_receipt(KEY.public, session.receipt()), number)
        session.round(number)
    return log_state


def log_of(rounds: int, **changes: object) -> LoggedSession:
    """A log with so many rounds."""
    session = LoggedSession(**changes)  # type: ignore[arg-type]
    for number in range(1, rounds + 1):
        session.round(number)
    return session


def chain(sessions: int, *, rounds: int = 2) -> tuple[list[LoggedSession], list[bytes]]:
    """Consecutive sessions, all closed except the last, and the last checkpoints of the closed ones."""
    logged, closed = list[LoggedSession](), list[bytes]()
    for number in range(1, sessions + 1):
        previous = logged[-1].end if logged else NO_SESSION
        start = logged[-1].log.newest if logged else SEED
        logged.append(LoggedSession(OFFERS[number], previous, start=start))
        if number < sessions:
            for round_ in range(1, rounds + 1):
                logged[-1].round(round_)
            closed.append(logged[-1].close())
    return logged, closed


def chain_proof(sessions: list[LoggedSession], closed: list[bytes]) -> bytes:
    """The proof from the first session, in which the device took part, to the last."""
    return session_chain_proof(sessions[-1].log, KEY, sessions[0].receipt(), closed[1:])
