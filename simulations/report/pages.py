"""The pages of runs and suites, which need nothing but a browser, and a suite in words and as a table in Markdown.

The words of a page are in ``templates``, which escape every value; the numbers are formatted as in the terminal.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from edgeadapt.formats.storage import PUBLIC, replace
from simulations.report import figures, formatting
from simulations.report.formatting import count, duration, share, size_or_dash
from simulations.report.summary import LEVEL, ArmSummary, Difference, Estimate, PairSummary, SuiteSummary
from simulations.result import ACCURACY, ARMS, Metric, RunResult, dropouts_by_step

FILTERS = {
    "duration": formatting.duration,
    "number_of": formatting.count,
    "percent": formatting.percent,
    "share": formatting.share,
    "size": formatting.size,
    "size_or_dash": formatting.size_or_dash,
}
PLACES = {"mean": "", "p10": "at the {decile} percentile ", "unseen": "for unseen clients "}
CHANCE = 0.05


def write_report(result: RunResult, path: Path, program: str = "edgeadapt") -> None:
    """Write the page atomically and readable by everyone: it holds no phrase of a client.

    Equal results give equal bytes. A page that cannot be written leaves an older one as it was.
    """
    replace(path, page(result, program).encode(), PUBLIC)


def page(result: RunResult, program: str = "edgeadapt") -> str:
    exported = result.exported
    assert exported is not None  # noqa: S101  # only the run of a classifier has a page
    return template("report.html").render(
        run=result,
        exported=exported,
        headline=formatting.headline(result),
        context=formatting.context(result, program),
        accuracy={arm: result.summary(arm) for arm in ARMS},
        traffic=formatting.TrafficMeans.of(result),
        reliability=formatting.reliability(exported.reliability),
        dropouts=formatting.dropouts(result.rounds),
        privacy=formatting.privacy(result.epsilon, result.delta, len(result.rounds)),
        canaries=formatting.canaries(result.canaries) if result.canaries else (),
        dropout_count=sum(dropouts_by_step(result.rounds).values()),
        figures={
            "clients": figures.clients(result),
            "traffic": figures.traffic(result),
            "learning": figures.learning(result),
            "dropouts": figures.dropouts_by_device(result),
        },
        command=formatting.command(exported, program),
        steps=formatting.next_commands(exported, program),
        accuracies=formatting.accuracies(exported.parity),
        plain=formatting.plain(exported.plain) if exported.plain else "",
    )


def template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("simulations.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(FILTERS)
    return environment.get_template(name)


def interval(estimate: Estimate) -> str:
    """Format ``.794 (.762–.823)``, without parentheses if there is no interval; a dash for NaN."""
    spread = f" ({share(estimate.low)}–{share(estimate.high)})" if math.isfinite(estimate.low) else ""
    return f"{share(estimate.value)}{spread}"


def difference(found: Difference, metric: Metric) -> str:
    """Format ``+3.1 (1.2 to 5.0)``, in the unit of differences of the metric."""
    spread = f"{metric.size(found.low)} to {metric.size(found.high)}"
    return f"{metric.size(found.value, signed=True)} ({spread if math.isfinite(found.low) else 'too few clients'})"


def sentence(pair: PairSummary, title: str, pairs: int, metric: Metric = ACCURACY) -> str:
    """Compare one figure in plain words.

    A difference whose interval contains 0 is called noise; where there are too few clients for an interval, it says so.
    A difference that is not significant at ``CHANCE`` after Holm's correction for ``pairs`` is stated with that.
    """
    compared, place = pair.figures[title], PLACES[title].format(decile=metric.decile)
    if not math.isfinite(compared.low):
        return f"Too few {'unseen ' if title == 'unseen' else ''}clients to compare {pair.first} and {pair.second}."
    if compared.is_noise:
        text = f"{place}the difference between {pair.first} and {pair.second} is within noise: "
        text += difference(compared, metric)
    else:
        low, high = (metric.size(bound) for bound in sorted((abs(compared.low), abs(compared.high))))
        better = "better" if metric.sign * compared.value > 0 else "worse"
        text = f"{place}{pair.first} is {metric.size(abs(compared.value))} {metric.unit} {better} than {pair.second}"
        text += f" ({100 * LEVEL:.0f} %: {low} to {high})"
        if compared.adjusted > CHANCE:
            text += f"; of {pairs} pairs, one may differ so much by chance (Holm: p = {compared.adjusted:.2f})"
    return text[0].upper() + text[1:] + "."


def sentences(summary: SuiteSummary) -> Iterator[str]:
    for pair in summary.pairs:
        for title in PLACES:
            if title in pair.figures:
                yield sentence(pair, title, len(summary.pairs), summary.compared_by)


def overview(summary: SuiteSummary) -> str:
    """Say in one paragraph what the numbers are about."""
    text = (
        f"{count(len(summary.seeds), 'seed')} ({_list(summary.seeds)}), {count(summary.clients, 'client')} over all "
        f"seeds, {summary.unseen} of them unseen. In parentheses: {100 * LEVEL:.0f} % intervals, from resampled seeds "
        "and clients."
    )
    if summary.search_seeds:
        seeds = _list(summary.search_seeds)
        text += f" Constants were chosen on the validation texts of clients of other seeds ({seeds})."
    return text


FURTHER = ("public", "forgotten", "aggregation error", "epsilon")


def further(arm: ArmSummary) -> tuple[str, ...]:
    """Say what an arm reaches on public texts, what it has forgotten, its aggregation error, and its privacy."""
    shares = (share(value) for value in (arm.public, arm.forgotten, arm.aggregation_error))
    found = f" (canaries: {arm.canaries:.2f})" if math.isfinite(arm.canaries) else ""
    return (*shares, f"{arm.epsilon:.2f}{found}" if math.isfinite(arm.epsilon) else "–")


def costs(arm: ArmSummary) -> tuple[str, ...]:
    """List an arm's epochs, steps, CPU time, bytes up and down of one device, and rounds and bytes to the target."""
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
    """Say what an arm's search chose, and what it cost."""
    chosen = ", ".join(f"{key} = {value}" for key, value in arm.constants.items())
    return f"{chosen} (of {count(arm.candidates, 'candidate')}, {duration(arm.search_cpu_seconds)} of CPU)"


def headline(summary: SuiteSummary) -> str:
    """Name in one sentence the arm with the best mean, and say whether the next one differs from noise."""
    metric = summary.compared_by
    best = max(summary.arms, key=lambda name: metric.sign * summary.arms[name].figures["mean"].value)
    most = f"highest mean {metric.name}" if metric.sign > 0 else f"least mean loss in {metric.name}"
    text = f"{best} has the {most}, {share(summary.arms[best].figures['mean'].value)}"
    baseline = next((pair for pair in summary.pairs if pair.first == best), None)
    if baseline is None:
        return f"{text}."
    compared = baseline.figures["mean"]
    verdict = "within noise" if compared.is_noise else f"{difference(compared, metric)} {metric.unit}"
    return f"{text}; against {baseline.second}: {verdict}."


def to_target(summary: SuiteSummary) -> str:
    """Return the title of the last column of ``costs``."""
    return f"rounds, bytes to {share(summary.target, 2)}" if summary.target else "to target"


def markdown(summary: SuiteSummary) -> str:
    metric = summary.compared_by
    parts = [
        f"# {summary.name}",
        overview(summary),
        _table(
            [metric.name, *metric.titles.values(), *FURTHER],
            [
                [name, *(interval(arm.figures[title]) for title in metric.titles), *further(arm)]
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


def write_suite_report(summary: SuiteSummary, folder: Path) -> None:
    """Write all files, each atomically and readable by everyone: they hold no text of a client.

    Equal summaries give equal bytes. A file that cannot be written is left as it was.
    """
    contents = {
        "report.html": suite_page(summary).encode(),
        "report.md": markdown(summary).encode(),
        "report.png": figures.picture(summary),
        "report.json": json.dumps(summary.to_json(), indent=2).encode(),
    }
    for name, content in contents.items():
        replace(folder / name, content, PUBLIC)


def suite_page(summary: SuiteSummary) -> str:
    return template("suite.html").render(
        suite=summary,
        headline=headline(summary),
        overview=overview(summary),
        metric=summary.compared_by,
        to_target=to_target(summary),
        interval=interval,
        further=further,
        further_titles=FURTHER,
        costs=costs,
        constants=constants,
        sentences=list(sentences(summary)),
        figures={"arms": figures.arms(summary), "pairs": figures.pairs(summary) if summary.pairs else ""},
    )
