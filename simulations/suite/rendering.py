"""A suite in words and as a table in Markdown: the terminal and the page show the same."""

import math
from collections.abc import Iterator

from simulations.report.formatting import count, duration, share, size_or_dash
from simulations.suite.statistics import LEVEL, Difference, Estimate
from simulations.suite.summary import ArmSummary, PairSummary, SuiteSummary

TITLES = {"mean": "mean", "p10": "10th pct.", "worst": "worst", "unseen": "unseen"}
SENTENCES = {
    "mean": "{first} is {points} points {better} than {second}",
    "p10": "at the 10th percentile {first} is {points} points {better} than {second}",
    "unseen": "for unseen clients {first} is {points} points {better} than {second}",
}
NOISE = {
    "mean": "the difference between {first} and {second} is within noise",
    "p10": "at the 10th percentile the difference between {first} and {second} is within noise",
    "unseen": "for unseen clients the difference between {first} and {second} is within noise",
}
CHANCE = 0.05


def interval(found: Estimate) -> str:
    """``.794 (.762–.823)``, without parentheses if there is no interval; a dash for NaN."""
    spread = f" ({share(found.low)}–{share(found.high)})" if math.isfinite(found.low) else ""
    return f"{share(found.value)}{spread}"


def points(found: Difference) -> str:
    """``+3.1 (1.2 to 5.0)``, in percentage points."""
    spread = f"{100 * found.low:.1f} to {100 * found.high:.1f}" if math.isfinite(found.low) else "too few clients"
    return f"{100 * found.value:+.1f} ({spread})"


def sentence(pair: PairSummary, title: str, pairs: int) -> str:
    """The comparison of one figure in plain words.

    A difference whose interval contains 0 is called noise; where there are too few clients for an interval, it says so.
    A difference that is not significant at ``CHANCE`` after Holm's correction for ``pairs`` is stated with that.
    """
    found, names = pair.figures[title], {"first": pair.first, "second": pair.second}
    if not math.isfinite(found.low):
        return f"Too few {'unseen ' if title == 'unseen' else ''}clients to compare {pair.first} and {pair.second}."
    if found.is_noise:
        text = f"{NOISE[title].format(**names)}: {points(found)}"
        return text[0].upper() + text[1:] + "."
    low, high = sorted((abs(found.low), abs(found.high)))
    size, better = f"{100 * abs(found.value):.1f}", "better" if found.value > 0 else "worse"
    text = SENTENCES[title].format(**names, points=size, better=better)
    text += f" ({100 * LEVEL:.0f} %: {100 * low:.1f} to {100 * high:.1f})"
    if found.adjusted > CHANCE:
        text += f"; of {pairs} pairs, one may differ so much by chance (Holm: p = {found.adjusted:.2f})"
    return text[0].upper() + text[1:] + "."


def sentences(summary: SuiteSummary) -> Iterator[str]:
    """A sentence for each pair and figure."""
    for pair in summary.pairs:
        for title in SENTENCES:
            if title in pair.figures:
                yield sentence(pair, title, len(summary.pairs))


def overview(summary: SuiteSummary) -> str:
    """What the numbers are about, in one paragraph."""
    text = (
        f"{count(len(summary.seeds), 'seed')} ({_list(summary.seeds)}), {count(summary.clients, 'client')} over all "
        f"seeds, {summary.unseen} of them unseen. In parentheses: {100 * LEVEL:.0f} % intervals, from resampled seeds "
        "and clients."
    )
    if summary.search_seeds:
        seeds = _list(summary.search_seeds)
        text += f" Constants were chosen on the validation texts of clients of other seeds ({seeds})."
    return text


def shares(arm: ArmSummary) -> tuple[str, ...]:
    """An arm's accuracy on public texts, what it has forgotten, and its aggregation error."""
    return tuple(share(value) for value in (arm.public, arm.forgotten, arm.aggregation_error))


def costs(arm: ArmSummary) -> tuple[str, ...]:
    """An arm's epochs, steps, CPU time, bytes up and down of one device, and rounds and bytes to the target."""
    cost, reached = arm.cost, arm.reached
    to_target = "–"
    if reached is not None:
        to_target = f"{reached.rounds:.1f}, {size_or_dash(reached.bytes)}" if reached.seeds else "not reached"
    return (
        str(cost.epochs),
        f"{cost.steps:,}",
        duration(cost.cpu_seconds),
        size_or_dash(cost.bytes_up),
        size_or_dash(cost.bytes_down),
        to_target,
    )


def constants(arm: ArmSummary) -> str:
    """What an arm's search chose, and what it cost."""
    chosen = ", ".join(f"{key} = {value}" for key, value in arm.constants.items())
    return f"{chosen} (of {count(arm.candidates, 'candidate')}, {duration(arm.search_cpu_seconds)} of CPU)"


def headline(summary: SuiteSummary) -> str:
    """The arm with the best mean, and whether the next one differs from noise, in one sentence."""
    best = max(summary.arms, key=lambda name: summary.arms[name].figures["mean"].value)
    text = f"{best} has the highest mean accuracy, {share(summary.arms[best].figures['mean'].value)}"
    baseline = next((pair for pair in summary.pairs if pair.first == best), None)
    if baseline is None:
        return f"{text}."
    verdict = "within noise" if baseline.figures["mean"].is_noise else points(baseline.figures["mean"]) + " points"
    return f"{text}; against {baseline.second}: {verdict}."


def to_target(summary: SuiteSummary) -> str:
    """The title of the last column of ``costs``."""
    return f"rounds, bytes to {share(summary.target, 2)}" if summary.target else "to target"


def markdown(summary: SuiteSummary) -> str:
    """The whole report in Markdown."""
    parts = [
        f"# {summary.name}",
        overview(summary),
        _table(
            ["accuracy", *TITLES.values(), "public", "forgotten", "aggregation error"],
            [
                [name, *(interval(arm.figures[title]) for title in TITLES), *shares(arm)]
                for name, arm in summary.arms.items()
            ],
        ),
        "\n".join(f"- {line}" for line in sentences(summary)),
        _table(
            ["cost of a seed", "epochs", "steps", "CPU", "up", "down", to_target(summary)],
            [[name, *costs(arm)] for name, arm in summary.arms.items()],
        ),
    ]
    chosen = [f"- {name}: {constants(arm)}" for name, arm in summary.arms.items() if arm.constants]
    parts += [] if not chosen else ["Constants:", "\n".join(chosen)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _list(seeds: tuple[int, ...]) -> str:
    return ", ".join(map(str, seeds))
