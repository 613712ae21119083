"""The two figures of a suite: accuracies of arms and differences of pairs, each with its interval."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from simulations.report.drawing import CHARACTER, INK, LINE, MUTED, WIDTH, axes, png, short, svg
from simulations.report.formatting import share
from simulations.suite.metric import Metric
from simulations.suite.rendering import metric_of
from simulations.suite.statistics import Difference, Estimate
from simulations.suite.summary import SuiteSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = ("mean", "p10", "unseen")
ACCENT, NOISE = "#0069a8", "#6a737d"
ROW = 22.0  # units
TOP, BOTTOM = 30.0, 34.0  # units above and below the rows
GAP = 14.0  # units between panels

Mark = Estimate | Difference


def arms(summary: SuiteSummary) -> str:
    """Every arm's accuracy or loss, as SVG: a panel for the mean, the 10th percentile and the unseen clients."""
    rows = list(summary.arms)
    metric = metric_of(summary)
    text = "; ".join(f"{name} {share(arm.figures['mean'].value)}" for name, arm in summary.arms.items()) + "."
    return svg("arms", f"{metric.name.capitalize()} by arm", text, _height(rows), lambda figure: _arms(figure, summary))


def pairs(summary: SuiteSummary) -> str:
    """Difference of every pair, as SVG; noise is gray."""
    rows = [f"{pair.first} - {pair.second}" for pair in summary.pairs]
    unit = metric_of(summary).differences
    text = f"Differences of pairs of arms in {unit}; the list below states each in a sentence."
    return svg("pairs", "Differences", text, _height(rows), lambda figure: _pairs(figure, summary))


def picture(summary: SuiteSummary) -> bytes:
    """Both figures, one above the other, as PNG."""
    upper = _height(list(summary.arms))
    lower = _height([pair.first for pair in summary.pairs]) if summary.pairs else 0.0

    def paint(figure: "Figure") -> None:
        _arms(figure, summary)
        if summary.pairs:
            _pairs(figure, summary, upper)

    return png(upper + lower, paint)


def _height(rows: Sequence[str]) -> float:
    return TOP + ROW * len(rows) + BOTTOM


def _arms(figure: "Figure", summary: SuiteSummary) -> None:
    rows = {name: [arm.figures[title] for title in SHOWN] for name, arm in summary.arms.items()}
    for ax in _panels(figure, rows, metric_of(summary), 0.0, lambda _: ACCENT):
        ax.xaxis.set_major_formatter(lambda value, _: share(value, 1))


def _pairs(figure: "Figure", summary: SuiteSummary, above: float = 0.0) -> None:
    nothing = Difference(math.nan, math.nan, math.nan, 1.0, 1.0)
    metric = metric_of(summary)
    rows = {
        f"{short(pair.first)} - {short(pair.second)}": [
            _scaled(pair.figures.get(title, nothing), metric.factor) for title in SHOWN
        ]
        for pair in summary.pairs
    }
    for ax in _panels(figure, rows, metric, above, lambda mark: NOISE if getattr(mark, "is_noise", False) else ACCENT):
        ax.axvline(0, color=MUTED, linewidth=1, zorder=1)


def _scaled(found: Difference, factor: float) -> Difference:
    return Difference(factor * found.value, factor * found.low, factor * found.high, found.p, found.adjusted)


def _panels(
    figure: "Figure", rows: Mapping[str, Sequence[Mark]], metric: Metric, above: float, color: Callable[[Mark], str]
) -> list["Axes"]:
    """A panel for each of ``SHOWN``, a row for each key; ``above`` are the units that are used by other figures."""
    names = list(rows)
    left = 12 + CHARACTER * max(len(short(name)) if " - " not in name else len(name) for name in names)
    width, found = (WIDTH - left - 2 * GAP - 8) / len(SHOWN), []
    for i, title in enumerate(SHOWN):
        ax = axes(figure, left=left + i * (width + GAP), top=above + TOP, width=width, height=ROW * len(names))
        for y, marks in enumerate(rows.values()):
            _mark(ax, marks[i], y, color(marks[i]))
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_yticks(range(len(names)), [name if " - " in name else short(name) for name in names] if i == 0 else [])
        ax.set_title(metric.titles[title], loc="left", fontsize=11, color=INK)
        ax.grid(axis="x")
        ax.set_axisbelow(True)
        ax.margins(x=0.12)
        ax.locator_params(axis="x", nbins=4)
        found.append(ax)
    return found


def _mark(ax: "Axes", mark: Mark, y: float, color: str) -> None:
    if not math.isfinite(mark.value):
        return
    ax.axhline(y, color=LINE, linewidth=0.6, zorder=0)
    if math.isfinite(mark.low):
        ax.plot([mark.low, mark.high], [y, y], color=color, linewidth=2.4, alpha=0.45, solid_capstyle="butt")
    ax.scatter([mark.value], [y], s=30, color=color, zorder=3, clip_on=False)
