"""Who is connected to the gateway, what is asked of whom, and what was answered. No transport and no Flower here.

Everything runs on one event loop and takes no lock. A device has one request under way at a time; others wait, up to a
limit, and none outlives its time. A device whose stream breaks may come back within the grace time: a request that it
has not answered is sent again. A newer stream of a device ends the older one, which may be half open."""

import asyncio
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from aggregation.errors import EdgeAdaptError, ProtocolError
from edgeadapt.formats.gateway.messages import RetryWindow

WAITING = 4  # requests of one device
RELEASED = "released"
ID_BITS = 63  # ids are random: no device can guess another's, and a restart repeats none


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """Why a request was not answered. ``code``: the device's own; None if nothing was heard of it."""

    code: int | None
    reason: str


class ComeBack(EdgeAdaptError):  # noqa: N818
    """A device is sent away, and is to come back: within ``window``, or after a pause of its own. ``why`` names the
    reason in counts."""

    def __init__(self, why: str, reason: str, window: RetryWindow | None = None) -> None:
        super().__init__(reason, about=f"gateway.{why}")
        self.why, self.window = why, window

    @property
    def is_over(self) -> bool:
        """Whether the run is over, so that nothing went wrong."""
        return self.why == RELEASED


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who a device is. ``certificate``: of its identity, in DER; ``version``: of edgeadapt, as the device states it;
    ``ahead``: seconds that its clock is ahead of this machine's."""

    device: str
    certificate: bytes = field(repr=False)
    version: str = ""
    ahead: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    id: int
    step: str
    fields: Mapping[str, bytes] = field(repr=False)
    timer: asyncio.TimerHandle = field(repr=False)


@dataclass(slots=True, eq=False)
class Stream:
    """``sent``: the request that was sent last on it. ``answered``: the last of these whose answer has begun."""

    credentials: Credentials
    sent: int | None = None
    answered: int | None = None
    over: EdgeAdaptError | None = None  # why the gateway ends it


@dataclass(slots=True, eq=False)
class _Mailbox:
    """A device, while it is connected or may come back."""

    stream: Stream | None = None
    asked: dict[int, Asked] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True, eq=False)
class Hub:
    """All devices. ``answered``: called with the id of a request and its answer, once for each request. ``grace``:
    seconds in which a device whose stream broke may come back. ``left``: called with one that did not."""

    answered: Callable[[int, bytes | NoAnswer], None]
    grace: float
    left: Callable[[str], None] = lambda device: None
    _mailboxes: dict[str, _Mailbox] = field(default_factory=dict)

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(self._mailboxes)

    @property
    def requests(self) -> int:
        return sum(len(mailbox.asked) for mailbox in self._mailboxes.values())

    def streams(self) -> Iterator[Stream]:
        yield from [mailbox.stream for mailbox in self._mailboxes.values() if mailbox.stream is not None]

    def open(self, credentials: Credentials) -> Stream:
        """Begin a stream of a device. An older one ends."""
        mailbox = self._mailboxes.setdefault(credentials.device, _Mailbox())
        if mailbox.stream is not None:
            text = f"{credentials.device} has connected again"
            self.end(mailbox.stream, ProtocolError(text, about="gateway.stream"))
        mailbox.stream = Stream(credentials)
        return mailbox.stream

    def end(self, stream: Stream, reason: EdgeAdaptError) -> None:
        stream.over = reason
        self._mailboxes[stream.credentials.device].changed.set()

    def closed(self, stream: Stream) -> None:
        """Unless the device comes back within the grace time, its requests have no answer."""
        mailbox = self._mailboxes.get(stream.credentials.device)
        if mailbox is not None and mailbox.stream is stream:
            mailbox.stream = None
            asyncio.get_running_loop().call_later(self.grace, self._gone, stream.credentials.device, mailbox)

    def _gone(self, device: str, mailbox: _Mailbox) -> None:
        if mailbox.stream is None and self._mailboxes.get(device) is mailbox:
            self._drop(device)
            self.left(device)

    def send_away(self, device: str, reason: ComeBack) -> None:
        """End the stream of a device, if it has one, and forget the device at once."""
        mailbox = self._drop(device)
        if mailbox.stream is not None:
            mailbox.stream.over = reason
            mailbox.changed.set()

    def _drop(self, device: str) -> _Mailbox:
        mailbox = self._mailboxes.pop(device)
        for asked in mailbox.asked.values():
            asked.timer.cancel()
            self.answered(asked.id, NoAnswer(None, "the device disconnected"))
        mailbox.asked.clear()
        return mailbox

    def ask(self, device: str, step: str, fields: Mapping[str, bytes], seconds: float) -> int | None:
        """Ask a device; the request is void after ``seconds``. Returns the request's id; None if the device is not
        there or has too much to do."""
        mailbox = self._mailboxes.get(device)
        if mailbox is None or len(mailbox.asked) >= WAITING:
            return None
        number = 1 + secrets.randbits(ID_BITS)
        timer = asyncio.get_running_loop().call_later(seconds, self._expire, mailbox, number)
        mailbox.asked[number] = Asked(number, step, fields, timer)
        mailbox.changed.set()
        return number

    def _expire(self, mailbox: _Mailbox, number: int) -> None:
        if mailbox.asked.pop(number, None):
            mailbox.changed.set()
            self.answered(number, NoAnswer(None, "did not answer in time"))

    async def next(self, stream: Stream) -> Asked:
        """Wait for the next request for a stream, once the previous one was answered or is void. Raises EdgeAdaptError:
        the gateway ends the stream."""
        mailbox = self._mailboxes.get(stream.credentials.device, _Mailbox())
        while stream.over is None:
            mailbox.changed.clear()
            if stream.sent not in mailbox.asked and mailbox.asked:
                asked = next(iter(mailbox.asked.values()))
                stream.sent = asked.id
                return asked
            await mailbox.changed.wait()
        raise stream.over

    @staticmethod
    def is_asked(stream: Stream, number: int) -> bool:
        """Whether an answer that begins is the first one to the request that was sent last, which may be void."""
        is_first = number == stream.sent != stream.answered
        stream.answered = stream.sent if is_first else stream.answered
        return is_first

    def answer(self, stream: Stream, number: int, answer: bytes | NoAnswer) -> None:
        """Take the answer to the request that was sent on a stream, once. Raises ProtocolError: no request, or another
        one, is under way."""
        mailbox = self._mailboxes.get(stream.credentials.device)  # None: it left while its answer was on the way
        asked = None if mailbox is None or number != stream.sent else mailbox.asked.pop(number, None)
        if mailbox is None or asked is None:
            text = "no such request is under way: it was answered, is void, or is another device's"
            raise ProtocolError(text, about="gateway.request")
        asked.timer.cancel()
        mailbox.changed.set()
        self.answered(asked.id, answer)
