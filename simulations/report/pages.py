"""The pages of runs, suites and maps, which need nothing but a browser, and suites and maps in Markdown. ``templates``
escape every value; the numbers are formatted as in the terminal."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from edgeadapt.formats.storage import PUBLIC, replace
from simulations.report import figures, formatting
from simulations.report.formatting import aborted, count, duration, interrupted, share, size_or_dash
from simulations.report.summary import LEVEL, ArmSummary, Difference, Estimate, SuiteSummary
from simulations.result import ARMS, Metric, RoundTally, RunResult, dropouts_by_step

FILTERS = {
    "duration": formatting.duration,
    "number_of": formatting.count,
    "percent": formatting.percent,
    "share": formatting.share,
    "size": formatting.size,
    "size_or_dash": formatting.size_or_dash,
}
CHANCE = 0.05
RETRY = "The same command with --resume tries again what failed, and with --retry also the rounds of marked arms, with "
RETRY += "other faults of the network."


def write_report(result: RunResult, path: Path, program: str = "edgeadapt") -> None:
    """Write the page atomically and readable by everyone: it holds no phrase of a client. Equal results give equal
    bytes. A page that cannot be written leaves an older one as it was."""
    replace(path, page(result, program).encode(), PUBLIC)


def page(result: RunResult, program: str = "edgeadapt") -> str:
    exported = result.exported
    assert exported is not None  # noqa: S101  # only the run of a classifier has a page
    return template("report.html").render(
        run=result,
        exported=exported,
        headline=formatting.headline(result),
        context=formatting.context(result, program),
        interrupted=interrupted(result.round_tally),
        accuracy={arm: result.summary(arm) for arm in ARMS},
        traffic=formatting.TrafficMeans.of(result),
        reliability=formatting.reliability(exported.reliability),
        dropouts=formatting.dropouts(result.rounds),
        privacy=formatting.privacy(result),
        canaries=formatting.canaries(result.canaries) if result.canaries else (),
        dropouts_by_step=dropouts_by_step(result.rounds),
        figures={
            "clients": figures.clients(result),
            "learning": figures.learning(result),
            "answered": figures.answered(exported.answered),
        },
        command=formatting.command(exported, program),
        steps=formatting.next_commands(result, exported, program),
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


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]  # what the page prints small is in parentheses; the first cell names the row
    links: Sequence[str] = ()  # of the page, one for each row, or none

    def __str__(self) -> str:
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.rows]
        return "\n".join([f"## {self.title}", "", *(f"| {' | '.join(cells)} |" for cells in lines)])


@dataclass(frozen=True, slots=True)
class Page:
    """Says what a suite or a map found, as HTML and as Markdown."""

    kind: str
    name: str
    headline: str
    tables: Sequence[Table]
    notes: Sequence[str] = ()
    overview: str = ""

    def html(self, *figures: tuple[str, str, str]) -> str:
        """Each figure has a title, a caption and an SVG."""
        return template("tables.html").render(page=self, figures=figures)

    def markdown(self) -> str:
        notes = "\n".join(f"- {line}" for line in self.notes)
        parts = [f"# {self.name}", self.headline, notes, self.overview, *map(str, self.tables)]
        return "\n\n".join(filter(None, parts)) + "\n"


def interval(estimate: Estimate) -> str:
    """Format ``.794 (.762–.823)``, without parentheses if there is no interval; a dash for NaN."""
    spread = f" ({share(estimate.low)}–{share(estimate.high)})" if math.isfinite(estimate.low) else ""
    return share(estimate.value) + spread


def difference(found: Difference, metric: Metric) -> str:
    spread = f"{metric.size(found.low)} to {metric.size(found.high)}"
    return f"{metric.size(found.value, signed=True)} ({spread if math.isfinite(found.low) else 'too few clients'})"


def difference_cell(found: Difference | None, metric: Metric) -> str:
    if found is None:
        return "–"
    text = difference(found, metric)
    if not math.isfinite(found.low):
        return text
    if found.is_noise:
        return f"{text}, noise"
    return f"{text}, p = {share(found.adjusted, 2)}" if found.adjusted > CHANCE else text


def marked(summary: SuiteSummary, name: str) -> str:
    return name if name not in summary.arms or summary.arms[name].complete else f"{name} (!)"


def notes(summary: SuiteSummary) -> list[str]:
    lines = []
    for name, arm in summary.arms.items():
        if arm.failed:
            lines.append(_failed(name, arm))
        words: dict[str, list[int]] = {}
        for seed, tally in arm.round_tallies.items():
            for what in _said(tally):
                words.setdefault(what, []).append(seed)
        for what, seeds in words.items():
            lines.append(f"{marked(summary, name)}, seed{'s' if len(seeds) > 1 else ''} {_list(seeds)}: {what}.")
    if not all(arm.complete for arm in summary.arms.values()):
        lines.append(RETRY)
    return lines


def _said(tally: RoundTally) -> Iterator[str]:
    if said := aborted(tally):
        yield f"{said}, so its figures are not those of its method" if tally.is_void else said
    if tally.retries:
        yield f"the rounds began again {count(tally.retries, 'time')}, because some had aborted"
    if said := interrupted(tally):
        yield said


def _failed(name: str, arm: ArmSummary) -> str:
    seed, reason = next(iter(arm.failed.items()))
    where = f"seeds {_list(arm.failed)}" if len(arm.failed) > 1 else f"seed {seed}"
    text = f"{name} (!) failed with {where} and has no figures: {reason.rstrip('.')}"
    done = ", ".join(f"{share(mean)} with seed {seed}" for seed, mean in arm.means.items())
    return f"{text}; its mean is {done}." if done else f"{text}."


def overview(summary: SuiteSummary) -> str:
    text = (
        f"{count(len(summary.seeds), 'seed')} ({_list(summary.seeds)}), {count(summary.clients, 'client')} over all "
        f"seeds, {summary.unseen} of them unseen. In parentheses: {100 * LEVEL:.0f} % intervals, from resampled seeds "
        "and clients."
    )
    if summary.search_seeds:
        seeds = _list(summary.search_seeds)
        text += f" Constants were chosen on the validation texts of clients of other seeds ({seeds})."
    return text


def _further(arm: ArmSummary) -> tuple[str, ...]:
    shares = (share(value) for value in (arm.public, arm.forgotten, arm.aggregation_error))
    found = f" (canaries: {arm.canaries:.2f})" if math.isfinite(arm.canaries) else ""
    return (*shares, f"{arm.epsilon:.2f}{found}" if math.isfinite(arm.epsilon) else "–")


def _costs(arm: ArmSummary) -> tuple[str, ...]:
    cost, reached = arm.cost, arm.reached
    if arm.failed:
        return ("–",) * 6
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


def _constants(arm: ArmSummary) -> str:
    chosen = ", ".join(f"{key} = {value}" for key, value in arm.constants.items())
    return f"{chosen} (of {count(arm.candidates, 'candidate')}, {duration(arm.search_cpu_seconds)} of CPU)"


def headline(summary: SuiteSummary) -> str:
    """Name in one sentence the arm with the best mean, and the cheapest one that noise does not tell from it."""
    metric, standing = summary.compared_by, summary.standing
    best, cheapest = standing.best, standing.cheapest
    pooled = any(arm.kind.pooled for arm in summary.arms.values()) and not summary.arms[best].kind.pooled
    most = f"highest mean {metric.name}" if metric.sign > 0 else f"least mean loss in {metric.name}"
    most += " of the arms without pooled texts" if pooled else ""
    value = share(summary.arms[best].figures["mean"].value)
    if cheapest != best:
        found = standing.within_noise[cheapest]
        apart = f"{difference(found, metric)} {metric.unit}" if math.isfinite(found.low) else "no difference"
        return (
            f"{marked(summary, cheapest)} is the cheapest arm within noise of the best, "
            f"{share(summary.arms[cheapest].figures['mean'].value)} at {_price(summary, cheapest)}; "
            f"{marked(summary, best)} has the {most}, {value} at {_price(summary, best)} ({apart})."
        )
    text = f"{marked(summary, best)} has the {most}, {value} at {_price(summary, best)}"
    if not standing.comparable and len(summary.arms) > 1:
        return f"{text}; there are too few clients to say which arms are within noise of it."
    if standing.within_noise:
        return f"{text}, and is the cheapest of {len(standing.within_noise) + 1} arms within noise of it."
    return f"{text}; no other arm is within noise of it." if len(summary.arms) > 1 else f"{text}."


def _price(summary: SuiteSummary, name: str) -> str:
    cost, clients = summary.arms[name].cost, summary.clients / len(summary.seeds)
    traffic = cost.bytes_up + cost.bytes_down
    sent = f" and {size_or_dash(traffic)}" if traffic > 0 else ""
    return f"{duration(cost.cpu_seconds / clients)} of CPU{sent} a device"


def _scores(summary: SuiteSummary) -> Table:
    metric, what = summary.compared_by, "Share of a client's own test texts answered right."
    if metric.sign < 0:
        what = "Loss on a client's own test texts, in bits for each byte: less is better."
    note = (
        f"{what} Mean, {metric.decile} percentile and worst are over the clients that took part in training; unseen is "
        "the mean over those that did not. Public: of the public texts. Forgotten: of the test texts that the base "
        "answers right, the share that the arm answers wrong. Aggregation error: of the last round of a global arm, "
        "how far the mean of LoRA's factors is from the mean update, as a share of it. Epsilon: of all rounds, for one "
        "device, with the one that found groups; canaries are a lower bound."
    )
    head = ["arm", *metric.titles.values(), "public", "forgotten", "aggregation error", "epsilon"]
    rows = [
        [marked(summary, name), *(interval(arm.figures[title]) for title in metric.titles), *_further(arm)]
        for name, arm in summary.arms.items()
    ]
    return Table(metric.name.capitalize(), note, head, rows)


def _differences(summary: SuiteSummary) -> Table:
    metric = summary.compared_by
    title, head = f"What differs, in {metric.differences}", [metric.titles[title] for title in figures.SHOWN]
    note = f"Noise: the interval contains 0. p: after Holm's correction for all pairs, if above {share(CHANCE, 2)}."
    rows = [
        [
            f"{marked(summary, pair.first)} - {marked(summary, pair.second)}",
            *(difference_cell(pair.figures.get(title), metric) for title in figures.SHOWN),
        ]
        for pair in summary.pairs
    ]
    return Table(title, note, ["pair", *head], rows)


def _page(summary: SuiteSummary) -> Page:
    note = "Epochs of a client; steps and CPU time of training, all clients together. Up and down are what one device "
    note += "sends, also in answers that were lost, and what is sent to it; all rounds together."
    target = f"rounds, bytes to {share(summary.target, 2)}" if summary.target else "to target"
    costs = [[marked(summary, name), *_costs(arm)] for name, arm in summary.arms.items()]
    chosen = [[marked(summary, name), _constants(arm)] for name, arm in summary.arms.items() if arm.constants]
    tables = [
        _scores(summary),
        *([_differences(summary)] if summary.pairs else []),
        Table("Cost of a seed", note, ["arm", "epochs", "steps", "CPU", "up", "down", target], costs),
        *([Table("Constants", "", ["arm", "chosen"], chosen)] if chosen else []),
    ]
    return Page("suite", summary.name, headline(summary), tables, notes(summary), overview(summary))


def markdown(summary: SuiteSummary) -> str:
    return _page(summary).markdown()


def suite_page(summary: SuiteSummary) -> str:
    metric = summary.compared_by
    drawn = [(f"{metric.name.capitalize()} by arm", "Means over seeds with their intervals.", figures.arms(summary))]
    if summary.pairs:
        caption = f"In {metric.differences}; an interval that contains 0 is noise."
        drawn.append(("Differences", caption, figures.pairs(summary)))
    return _page(summary).html(*drawn)


def _list(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, seeds))


def write_suite_report(summary: SuiteSummary, folder: Path) -> None:
    """Write all files, each atomically and readable by everyone: they hold no text of a client. Equal summaries give
    equal bytes. A file that cannot be written is left as it was."""
    page, text, numbers = suite_page(summary), markdown(summary), summary.to_json()
    write_reports(folder, page, text, figures.picture(summary), numbers)


def write_reports(folder: Path, page: str, text: str, picture: bytes, numbers: object) -> None:
    contents = {
        "report.html": page.encode(),
        "report.md": text.encode(),
        "report.png": picture,
        "report.json": json.dumps(numbers, indent=2).encode(),
    }
    for name, content in contents.items():
        replace(folder / name, content, PUBLIC)
