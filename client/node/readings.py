"""What a device reads of its machine: power, network, and how busy others keep it. Nothing is decided here.

Sources: Linux's ABI of ``/sys/class/power_supply`` (Documentation/ABI/testing/sysfs-class-power), ``/proc/stat``
(proc_stat(5)), and the property ``Metered`` of NetworkManager on the system bus. What a system does not have cannot be
read; an app on such a system gives readings of its own."""

import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from aggregation.errors import DataError

SAMPLE = 1.0  # seconds over which the first call measures the processors
BUS = 5  # seconds for an answer on the system bus
METERED, UNMETERED = {1, 3}, {2, 4}  # NMMetered: yes, guess-yes; no, guess-no
NETWORK_MANAGER = "org.freedesktop.NetworkManager"


@dataclass(slots=True)
class Readings:
    """Reads a Linux machine, whose ``proc`` and ``sys`` are in ``root``. An app of another one derives a class, whose
    methods raise DataError too if the answer is unknown."""

    root: Path = Path("/")
    _before: tuple[float, float, float] | None = field(default=None, repr=False)

    def used_by_others(self) -> float:
        """Measure the share of the processors' time that other processes used since the last call, 0 to 1; the first
        call takes a second. Raises DataError: there is no ``/proc/stat``, or it is not the kernel's."""
        if self._before is None:
            self._before = self._times()
            time.sleep(SAMPLE)
        all_before, busy_before, own_before = self._before
        self._before = everything, busy, own = self._times()
        if everything <= all_before:
            return 0.0
        others = (busy - busy_before) - (own - own_before)
        return min(1.0, max(0.0, others / (everything - all_before)))

    def external_power(self) -> bool:
        """Whether a supply is online or, where only a battery is listed, it is charged or full. Raises DataError: no
        supply of the machine says so."""
        supplies = self._supplies()
        online = [_text(each / "online") for each in supplies if _text(each / "type") != "Battery"]
        if decimals := [text for text in online if text.isdecimal()]:
            return any(text != "0" for text in decimals)
        states = {_text(each / "status") for each in supplies if _text(each / "type") == "Battery"}
        if states & {"Charging", "Full", "Not charging"}:
            return True
        if "Discharging" in states:
            return False
        raise DataError(f"{self._folder} lists no power supply of this machine", about="charging")

    def battery(self) -> float:
        """Average the charge of several batteries, in percent. Raises DataError: the machine has none that states its
        charge."""
        texts = [_text(each / "capacity") for each in self._supplies() if _text(each / "type") == "Battery"]
        percent = [int(text) for text in texts if text.isdecimal() and int(text) <= 100]
        if not percent:
            raise DataError(f"{self._folder} lists no battery of this machine", about="minimum_battery")
        return sum(percent) / len(percent)

    def metered(self) -> bool:
        """Ask NetworkManager what it knows or guesses of the primary connection. Raises DataError: there is no
        NetworkManager, no ``busctl`` to ask it with, or it does not know."""
        path = f"/{NETWORK_MANAGER.replace('.', '/')}"
        command = ["busctl", "--system", f"--timeout={BUS}", "get-property", NETWORK_MANAGER, path]
        try:
            asked = subprocess.run(  # noqa: S603
                [*command, NETWORK_MANAGER, "Metered"], capture_output=True, text=True, timeout=2 * BUS, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            raise DataError("busctl, which asks NetworkManager, does not run here", about="unmetered") from None
        kind, _, value = asked.stdout.strip().partition(" ")
        if asked.returncode or kind != "u" or not value.isdecimal():
            raise DataError("NetworkManager does not answer on the system bus", about="unmetered")
        if int(value) not in METERED | UNMETERED:
            raise DataError("NetworkManager does not know whether the connection is metered", about="unmetered")
        return int(value) in METERED

    @property
    def _folder(self) -> Path:
        return self.root / "sys/class/power_supply"

    def _supplies(self) -> list[Path]:
        """List the machine's own supplies; a mouse has a battery as well, of scope ``Device``."""
        try:
            folders = sorted(self._folder.iterdir())
        except OSError:
            return []
        return [each for each in folders if _text(each / "scope") != "Device"]

    def _times(self) -> tuple[float, float, float]:
        """Read the seconds that all processors had, were busy, and were busy for this process and its children."""
        path, own = self.root / "proc/stat", os.times()
        name, *rest = _text(path).partition("\n")[0].split()[:9] or [""]
        if name != "cpu" or len(rest) < 5 or not all(text.isdecimal() for text in rest):
            raise DataError(f"{path} has no times of the processors", about="idle")
        ticks = [int(text) / os.sysconf("SC_CLK_TCK") for text in rest]  # guests are in user and nice
        everything = sum(ticks)
        waiting = ticks[3] + ticks[4]  # idle, iowait
        return everything, everything - waiting, own.user + own.system + own.children_user + own.children_system


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(4096).decode("ascii", "replace").strip()
    except OSError:
        return ""


SYSTEM = Readings()
