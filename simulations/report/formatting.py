"""How the numbers of a run are said: in the terminal's table and in the report alike, so that the two never differ."""

import math
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simulations.report.result import ARMS, RoundResult, RunResult, device_rounds, dropouts_by_step, summary

COLUMNS = {"mean": "mean", "p10": "10th pct.", "worst": "worst", "unseen": "unseen"}
PHRASE = "turn on the kitchen lights"
UNITS = ("B", "kB", "MB", "GB", "TB")
MINUTE = 60  # seconds


def share(value: float, digits: int = 3) -> str:
    """``.888``, ``1.000``; a dash for NaN."""
    return f"{value:.{digits}f}".removeprefix("0") if math.isfinite(value) else "–"


def percent(part: float, whole: float) -> str:
    """``part`` of ``whole`` in two significant digits; a dash where that means nothing."""
    if not whole > 0 or not math.isfinite(part):
        return "–"
    value = 100 * part / whole
    return f"{value:.0f} %" if value >= 9.95 else f"{value:.2g} %"


def size(count: float) -> str:
    """Bytes in three significant digits and decimal units: ``331 kB``."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    digits = 0 if unit == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {UNITS[unit]}"


def size_or_dash(count: float) -> str:
    """``size``; a dash where nothing came through."""
    return size(count) if count > 0 else "–"


def duration(seconds: float) -> str:
    """``7.1 s``, ``42 s``, ``4 min 12 s``, ``1 h 05 min``; a dash for NaN."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), MINUTE)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def count(number: int, noun: str, plural: str = "") -> str:
    """``1 household``, ``12 households``."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def printable(said: str) -> str:
    """``said`` without what would steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in said)


def headline(result: RunResult) -> str:
    """The run in one sentence."""
    unseen = sum(h.unseen for h in result.households)
    languages = len({h.language for h in result.households})
    mean = {arm: summary(result.households, arm) for arm in ARMS}
    text = (
        f"{count(len(result.households) - unseen, 'household')}, {count(languages, 'language')}: "
        f"personal {share(mean['personal']['mean'], 2)} on average, local {share(mean['local']['mean'], 2)}"
    )
    if not unseen:
        return f"{text}."
    return (
        f"{text}; {count(unseen, 'household')} that took no part in training: "
        f"global {share(mean['global']['unseen'], 2)}, base {share(mean['base']['unseen'], 2)}."
    )


def command(result: RunResult, program: str) -> str:
    """What to type to ask the exported bundle a phrase, quoted for a shell."""
    return f'{program} device infer --bundle {shlex.quote(result.bundle)} "{PHRASE}"'


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes a device a round, means over the rounds that came through; NaN if none did."""

    up: float
    down: float
    model: float  # bytes of the full base model, sent once

    @classmethod
    def of(cls, result: RunResult) -> "Traffic":
        """The traffic of a run."""
        whole = [r for r in result.rounds if not r.aborted]
        up, down = (sum(r.bytes_up for r in whole), sum(r.bytes_down for r in whole))
        model = float(result.base["bytes"])
        return cls(up / len(whole), down / len(whole), model) if whole else cls(math.nan, math.nan, model)


def dropouts(rounds: Sequence[RoundResult]) -> str:
    """The dropouts in one line: ``14 of 120 device-rounds: 6 at plan, 8 at unmask``."""
    by_step, aborted = dropouts_by_step(rounds), sum(r.aborted is not None for r in rounds)
    at = ", ".join(f"{number} at {step}" for step, number in by_step.items())
    text = f"{sum(by_step.values())} of {count(device_rounds(rounds), 'device-round')}" + (f": {at}" if at else "")
    return text + (f"; {count(aborted, 'round')} aborted" if aborted else "")


def program() -> str:
    """How to call the command from here, as it must be typed: by its name where the shell finds it."""
    if shutil.which("edgeadapt"):
        return "edgeadapt"
    python = Path(sys.executable)
    shown = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    return f"{shlex.quote(str(shown))} -m edgeadapt"
