"""When devices come back: pace steering (Bonawitz et al. 2019, section 2.3). No gRPC and no clock here.

The gateway gives each device that it sends away a window of time, and the device comes back at a random time within it.
The windows are booked one after the other, as in the virtual scheduling of the generic cell rate algorithm (ITU-T
I.371): the more devices there are, the later is the next window, and their check-ins stay below the target. A device
that has no window comes when it likes; above the target it is sent away before its credentials are verified."""

from collections.abc import Callable
from dataclasses import dataclass, field

from edgeadapt.formats.gateway.messages import RetryWindow

FORGET = 1024  # windows, at least, before those that are over are looked for


@dataclass(slots=True)
class TokenBucket:
    """Lets ``calls`` calls pass in a row, and regains them evenly in ``seconds``."""

    calls: float
    seconds: float
    left: float = field(init=False)
    at: float = 0.0

    def __post_init__(self) -> None:
        self.left = float(self.calls)

    def wait(self, now: float) -> float:
        """Take a call at the time ``now``. Returns 0, or the seconds until there is one."""
        self.left = min(self.calls, self.left + (now - self.at) * self.calls / self.seconds)
        self.at = now
        if self.left < 1.0:
            return (1.0 - self.left) * self.seconds / self.calls
        self.left -= 1.0
        return 0.0


@dataclass(slots=True)
class Schedule:
    rate: float  # windows that begin in a second, at most
    least: float  # seconds until a window begins, at least; it is as long as that
    _booked: float = float("-inf")

    def window(self, now: float) -> RetryWindow:
        """Book the next window, in seconds from ``now``. Guarantee: in any time ``t``, at most ``rate * (t + least) +
        1`` of the devices come back."""
        begin = max(now + self.least, self._booked + 1.0 / self.rate)
        self._booked = begin
        return RetryWindow(begin - now, begin - now + self.least)


@dataclass(slots=True)
class Pace:
    target: float  # check-ins a second, at most: half of them for each kind of window
    accepted: float  # seconds until a device that took part comes back, at least
    rejected: float  # seconds until a device that was not admitted comes back, at least
    _arrivals: TokenBucket = field(init=False)
    _after_accepted: Schedule = field(init=False)
    _after_rejected: Schedule = field(init=False)
    _windows: dict[str, tuple[float, float]] = field(default_factory=dict)  # device → when its window begins, and ends
    _forget: int = FORGET

    def __post_init__(self) -> None:
        self._arrivals = TokenBucket(max(1.0, self.target), max(1.0, self.target) / self.target)
        self._after_accepted = Schedule(self.target / 2, self.accepted)
        self._after_rejected = Schedule(self.target / 2, self.rejected)

    def early(self, device: str, now: float) -> RetryWindow | None:
        """None if the device may check in now."""
        begin, end = self._windows.get(device, (now, now))
        return RetryWindow(begin - now, end - now) if begin > now else None

    def admits(self, now: float) -> bool:
        """Count a check-in at the time ``now``. False if there are more than the target in a second."""
        return not self._arrivals.wait(now)

    def accept(self, device: str, now: float) -> RetryWindow:
        """Book the window of a device that took part, and leaves at the time ``now``."""
        return self._keep(device, now, self._after_accepted.window)

    def reject(self, device: str, now: float) -> RetryWindow:
        return self._keep(device, now, self._after_rejected.window)

    def _keep(self, device: str, now: float, book: Callable[[float], RetryWindow]) -> RetryWindow:
        window = book(now)
        self._windows[device] = now + window.earliest, now + window.latest
        if len(self._windows) >= self._forget:
            self._windows = {each: kept for each, kept in self._windows.items() if kept[0] > now}
            self._forget = max(FORGET, 2 * len(self._windows))
        return window
