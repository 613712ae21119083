"""The numbers of a run as text. The terminal and the report both use it, so that they never differ."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeadapt.bases.markedwords import OUTSIDE
from simulations.result import (
    CanaryBounds,
    ExportResult,
    Reliability,
    ReportedRound,
    RoundTally,
    RunResult,
    device_rounds,
    dropouts_by_step,
)

UNITS = ("B", "kB", "MB", "GB", "TB")
MINUTE = 60  # seconds
UNMASKED = "sums without masks: no transcript, no audit; --engine protocol has them"


def share(value: float, digits: int = 3) -> str:
    """Format a share without the leading zero; a dash for NaN."""
    return f"{value:.{digits}f}".removeprefix("0") if math.isfinite(value) else "–"


def percent(part: float, whole: float) -> str:
    """Format ``part`` of ``whole`` in two significant digits; a dash if there is no such share."""
    if not whole > 0 or not math.isfinite(part):
        return "–"
    value = 100 * part / whole
    return f"{value:.0f} %" if value >= 9.95 else f"{value:.2g} %"


def size(count: float) -> str:
    """Format bytes in three significant digits and decimal units."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    digits = 0 if unit == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {UNITS[unit]}"


def size_or_dash(count: float) -> str:
    """Format ``size``; a dash for zero and NaN."""
    return size(count) if count > 0 else "–"


def duration(seconds: float) -> str:
    """Format seconds as ``7.1 s``, ``42 s``, ``4 min 12 s`` or ``1 h 05 min``; a dash for NaN."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), MINUTE)
    if not minutes:
        return f"{left} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {left:02d} s"


def count(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def printable(text: str) -> str:
    """Put a question mark for every control character, which could steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def headline(result: RunResult) -> str:
    """Compare in one sentence what clients reach together and alone, and those that took no part in training."""
    alone, together = (result.summary(arm) for arm in ("local", "personal"))
    text = f"{percent(together['mean'], 1)} right together, {percent(alone['mean'], 1)} alone"
    if any(client.unseen for client in result.clients):
        unseen = f"{percent(together['unseen'], 1)}, alone {percent(alone['unseen'], 1)}"
        text += f"; clients that took no part in training: {unseen}"
    return f"{incomplete(result.round_tally)}{attack(result)}{text}."


def incomplete(tally: RoundTally) -> str:
    said = aborted(tally)
    if not said:
        return ""
    return f"INCOMPLETE: {said}. " if tally.is_void else f"{said[0].upper()}{said[1:]}. "


def aborted(tally: RoundTally) -> str:
    """Say which rounds aborted, and what came of it; empty if none did.

    >>> aborted(RoundTally(rounds=14, aborted=2, repeated=1))
    '2 of 14 rounds aborted, and 1 was repeated'
    >>> aborted(RoundTally(rounds=6, aborted=6, unfitted=True))
    'every round aborted'
    """
    if not tally.aborted:
        return ""
    if tally.aborted == tally.rounds:
        return "every round aborted" if tally.rounds > 1 else "the only round aborted"
    text = f"{tally.aborted} of {count(tally.rounds, 'round')} aborted"
    if tally.unfitted:
        return f"{text}, and none fitted the head"
    repeated = "it" if tally.repeated == tally.aborted == 1 else str(tally.repeated)
    return f"{text}, and {repeated} {'was' if tally.repeated == 1 else 'were'} repeated" if tally.repeated else text


def interrupted(tally: RoundTally) -> str:
    """Say where a run is not the one that it would be without an interruption; empty if it is."""
    if not tally.resumed:
        return ""
    rounds = ", ".join(map(str, tally.resumed))
    return (
        f"interrupted within a session, in round {rounds}: from there on devices order their examples otherwise "
        "than in a run without the interruption"
    )


def context(result: RunResult, program: str) -> str:
    """Say what the headline is about, and how far one seed can be trusted."""
    unseen = sum(client.unseen for client in result.clients)
    languages = count(len({client.language for client in result.clients}), "language")
    parts = [
        f"{count(len(result.clients) - unseen, 'client')} trained, {unseen} took no part; {languages}.",
        evaluated(len(result.clients), result.population),
        f"One seed: some points may be chance. Intervals: {program} simulate suite",
        "" if result.masked else f"({UNMASKED})",
    ]
    return " ".join(part for part in parts if part)


def attack(result: RunResult) -> str:
    liars = len(result.attackers)
    return f"UNDER ATTACK: {count(liars, 'device')} lied in training ({result.attack}). " if liars else ""


def evaluated(clients: int, population: int) -> str:
    """Say how many clients were evaluated; empty if all were.

    >>> evaluated(200, 10_000)
    '200 of 10000 clients, chosen by the seed, were evaluated.'
    """
    return f"{clients} of {population} clients, chosen by the seed, were evaluated." if clients < population else ""


def command(exported: ExportResult, program: str) -> str:
    """Quoted for a shell."""
    phrase, words = exported.phrase, "--words " if exported.by_word else ""
    quoted = shlex.quote(phrase) if set(phrase) & set('"$`\\!') else f'"{phrase}"'
    return f"{program} device infer --bundle {shlex.quote(exported.bundle)} {words}{quoted}"


def next_commands(result: RunResult, exported: ExportResult, program: str) -> list[tuple[str, str]]:
    """Return what to try next, in a few words each, with their commands: teach or ask a device, audit, own texts."""
    first = ("ask a device", command(exported, program))
    if lesson := exported.lesson:
        words = shlex.join(("--bundle", lesson.bundle, "--teach", lesson.label, lesson.phrase))
        first = ("teach a device a phrase that it gets wrong", f"{program} device infer {words}")
    federation = shlex.quote(str(Path(exported.report).parent / (result.groups[0].folder if result.groups else "")))
    own = [("simulate texts of your own", f"{program} new mine")] if exported.plain else []  # these were households
    checks = [("check what the coordinator did", f"{program} audit verify {federation}")] if result.masked else []
    return [first, *checks, *own]


@dataclass(frozen=True, slots=True)
class TrafficMeans:
    """Holds mean bytes of one device in one round, over the rounds that were not aborted; NaN if all were."""

    up: float
    down: float
    model: float  # bytes of the full base model

    @classmethod
    def of(cls, result: RunResult) -> "TrafficMeans":
        done, model = [r for r in result.rounds if not r.aborted], float(result.base["bytes"])
        if not done:
            return cls(math.nan, math.nan, model)
        return cls(sum(r.bytes_up for r in done) / len(done), sum(r.bytes_down for r in done) / len(done), model)


def dropouts(rounds: Sequence[ReportedRound]) -> str:
    by_step, aborted = dropouts_by_step(rounds), sum(r.aborted is not None for r in rounds)
    at = ", ".join(f"{number} at {step}" for step, number in by_step.items())
    text = f"{sum(by_step.values())} of {count(device_rounds(rounds), 'device-round')}" + (f": {at}" if at else "")
    why = "by simulated faults, [network] of the scenario"
    return text + (f"; {count(aborted, 'round')} aborted {why}" if aborted else "")


def formatted_groups(result: RunResult) -> str:
    parts = []
    for group in result.groups:
        inside = [client for client in result.clients if client.name in group.clients and not client.unseen]
        mean = sum(client.arms["personal"] for client in inside) / len(inside) if inside else math.nan
        aborted = f", {count(group.aborted, 'round')} aborted" if group.aborted else ""
        parts.append(f"{printable(group.name)} {count(group.devices, 'device')}{aborted}, personal {share(mean)}")
    return "; ".join(parts)


def privacy(result: RunResult) -> tuple[str, str]:
    """Return the epsilon of all rounds, or none; and what that means."""
    epsilon, delta, found = result.epsilon, result.delta, ""
    if result.finding:
        found = "; besides, epsilon {:.2f} for delta {:g} of the round that found the groups".format(*result.finding)
    if delta is None or epsilon is None:
        return "none", f"nothing bounds what the sums say about one device{found}"
    rounds = count(len(result.rounds), "round")
    return f"epsilon {epsilon:.2f}", f"for delta {delta:g} after {rounds}, for everything of one device{found}"


def canaries(bounds: CanaryBounds) -> tuple[str, str]:
    """Return the lower bound on epsilon from canaries, the account, and what the bound holds for.

    >>> "; ".join(canaries(CanaryBounds(1000, 712, account=8.0, one_run=0.61, gaussian=6.52, confidence=0.95)))
    'epsilon at least 6.52, below the account of 8.00; at 95 % for Gaussian noise, 0.61 for any; 712 of 1000 guessed'
    """
    above = max(bounds.gaussian, bounds.one_run) > bounds.account
    side, doubt = ("above", ": too little noise, or chance") if above else ("below", "")
    text = f"epsilon at least {bounds.gaussian:.2f}, {side} the account of {bounds.account:.2f}{doubt}"
    held = f"at {percent(bounds.confidence, 1)} for Gaussian noise, {bounds.one_run:.2f} for any"
    return text, f"{held}; {bounds.right} of {bounds.count} guessed"


def reliability(by_arm: Mapping[str, Reliability]) -> tuple[str, str]:
    arms = list(by_arm.items())[::-1]
    says = (f"{arm} is right {percent(one.right_near_ninety, 1)} of {one.near_ninety} times" for arm, one in arms)
    before = {arm: "" if one.before == one.after else f" ({percent(one.before, 1)} uncalibrated)" for arm, one in arms}
    errors = (f"{arm} {percent(one.after, 1)}{before[arm]}" for arm, one in arms)
    return "; ".join(says), f"calibration error: {'; '.join(errors)}"


def confusions(answered: Mapping[str, Mapping[str, int]]) -> list[tuple[int, int, str, str]]:
    """List what is most often answered wrong: how many test phrases, of how many, their label, and the answer.

    >>> confusions({"coat": {"coat": 7, "shirt": 3}, "shirt": {"shirt": 4, "coat": 1}})
    [(3, 10, 'coat', 'shirt'), (1, 5, 'shirt', 'coat')]
    """
    wrong = (
        (count, sum(of.values()), label, answer)
        for label, of in answered.items()
        for answer, count in of.items()
        if answer != label
    )
    return sorted(wrong, key=lambda one: (-one[0], *one[1:]))


def word_f1(answered: Mapping[str, Mapping[str, int]]) -> str:
    """State how the labels of words were found, apart from ``OUTSIDE``.

    >>> word_f1({"O": {"O": 90, "hour": 2}, "hour": {"hour": 6, "O": 1, "room": 1}})
    'F1 .706 of the words that have a label: .750 of 8 found, .667 of 9 right'
    """
    right = sum(of.get(label, 0) for label, of in answered.items() if label != OUTSIDE)
    there = sum(sum(of.values()) for label, of in answered.items() if label != OUTSIDE)
    said = sum(count for of in answered.values() for answer, count in of.items() if answer != OUTSIDE)
    found, sure = right / max(there, 1), right / max(said, 1)
    f1 = 2 * right / max(there + said, 1)
    each = f"{share(found)} of {there} found, {share(sure)} of {said} right"
    return f"F1 {share(f1)} of the words that have a label: {each}"


def accuracies(parity: Mapping[str, float]) -> str:
    """Compare the accuracy of the exported global pair with that of torch on the same phrases.

    >>> accuracies({"accuracy": 0.695, "torch_accuracy": 0.6967})
    'accuracy .6950, in torch .6967'
    """
    return f"accuracy {share(parity['accuracy'], 4)}, in torch {share(parity['torch_accuracy'], 4)}"


def plain(answers: Mapping[str, Mapping[str, int]]) -> str:
    """Count in one line the plain phrases that the clients' own bundles answer right.

    >>> plain({"de-02": {"right": 10, "count": 10}, "fr-03": {"right": 8, "count": 10}})
    '18 of 20 plain phrases right; fewest: fr-03, 8 of 10'
    """
    right, total = (sum(found[key] for found in answers.values()) for key in ("right", "count"))
    worst = min(answers, key=lambda name: answers[name]["right"] / answers[name]["count"])
    fewest = f"{printable(worst)}, {answers[worst]['right']} of {answers[worst]['count']}"
    return f"{right} of {count(total, 'plain phrase')} right; fewest: {fewest}"
