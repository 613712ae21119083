"""The figures of a run and of a suite, drawn with matplotlib as SVG for use inside an HTML page, or as PNG. Text in an
SVG stays text, the colors are the variables of the page's style sheet, and equal data give equal bytes. matplotlib is
imported when a figure is drawn."""

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from simulations.report.formatting import confusions, count, share
from simulations.report.summary import Difference, Estimate, SuiteSummary
from simulations.result import ARMS, ClientResult, Metric, ReportedRound, RunResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 72  # an inch; one point is one unit of the SVG
SHARPNESS = 3  # pixels a unit of a PNG
WIDTH = 380.0  # units: about the width of a phone, so that text of 11 units is readable there
LONGEST = 16  # characters of a name next to a plot
MOST_LABELS, SQUARE = 24, 20.0  # of a table of answers; units of a square at most
CHARACTER = 6.6  # units, about

# Each color stands for a variable of the style sheet, which has a light and a dark value. The arms differ in shape as
# well; the hues are of Okabe and Ito's palette for color-blind readers, darkened until they are readable as text.
INK, MUTED, LINE, DROPPED = "#1b1f24", "#59636e", "#d4d9df", "#b3400d"
ARM_COLORS = {"base": "#6a737d", "local": "#a65a00", "global": "#0069a8", "personal": "#00735a"}
PAPER = "#fefefe"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    DROPPED: "--dropped",
    PAPER: "--paper",
    **{color: f"--{arm}" for arm, color in ARM_COLORS.items()},
}
STYLE: dict[Any, object] = {
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],  # only to measure; the page has its own
    "font.size": 11,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # a name may contain a dollar sign
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.color": LINE,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
}
ROW = 21.0  # units a client
MARKS = {"base": ("o", 26), "local": ("D", 26), "global": ("s", 26), "personal": ("o", 44)}  # shape, square points
LANES = {"base": 0.0, "local": -0.28, "global": 0.28, "personal": 0.0}  # rows below a client's line
LEFT = 48.0  # units next to a plot of rounds
PANEL = 112.0  # units high
CURVES = {"accuracy": "accuracy, a share", "loss": "loss, nats a phrase"}
SHOWN = ("mean", "p10", "unseen")
ACCENT, NOISE = "#0069a8", "#6a737d"
SUITE_ROW = 22.0  # units
TOP, BOTTOM = 30.0, 34.0  # units above and below the rows
GAP = 14.0  # units between panels
Mark = Estimate | Difference


def svg(key: str, title: str, description: str, height: float, paint: Callable[["Figure"], None]) -> str:
    """Draw an ``<svg>`` element of ``WIDTH`` by ``height`` with ``paint``. ``key`` has letters only, different for each
    figure of the page. A screen reader says title and description."""
    drawn = _drawn(height, paint, {"svg.hashsalt": key}, format="svg", metadata={"Date": None})
    return _inline(drawn.decode(), key, title, description)


def png(height: float, paint: Callable[["Figure"], None]) -> bytes:
    """Draw a picture of ``WIDTH`` by ``height`` as on the light page, at ``SHARPNESS`` pixels a unit."""
    form = {"format": "png", "dpi": SHARPNESS * POINTS, "metadata": {"Software": None}}
    return _drawn(height, paint, {"figure.facecolor": "white"}, **form)


def _drawn(height: float, paint: Callable[["Figure"], None], style: dict[Any, object], **form: Any) -> bytes:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    out = BytesIO()
    with mpl.rc_context(STYLE | style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH / POINTS, height / POINTS))
        paint(figure)
        figure.savefig(out, **form)
    return out.getvalue()


def axes(figure: "Figure", *, left: float, top: float, width: float, height: float) -> "Axes":
    full_width, full_height = figure.get_size_inches() * POINTS
    lower = full_height - top - height
    return figure.add_axes((left / full_width, lower / full_height, width / full_width, height / full_height))


def short(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def _inline(document: str, key: str, title: str, description: str) -> str:
    body = document[document.index("<svg") :]
    opening, _, rest = body.partition(">")
    view = re.search(r'viewBox="[^"]*"', opening)
    rest = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", rest, flags=re.DOTALL)
    rest = re.sub(r'<g id="[^"]*"', "<g", rest).replace("xlink:href", "href")
    rest = re.sub(r"font: ((?:\d+ )?[\d.]+px) [^;\"]*", r"font: \1 var(--font)", rest)
    rest = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", rest)
    for color, variable in VARIABLES.items():
        rest = rest.replace(color, f"var({variable})")
    head = (
        f'<svg {view[0] if view else ""} role="img" aria-labelledby="{key}-title {key}-text">'
        f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-text">{escape(description)}</desc>'
    )
    return head + rest.strip()


# Accuracy by client.


def clients(result: RunResult) -> str:
    """Draw accuracy by client: a line from base to personal, local above and global below it; unseen clients last."""

    def rank(client: ClientResult) -> tuple[bool, float, str]:
        accuracy = client.arms["personal"]
        return client.unseen, -accuracy if math.isfinite(accuracy) else 2.0, client.name

    rows = sorted(result.clients, key=rank)
    seen = sum(not h.unseen for h in rows)
    better = sum(h.arms["personal"] > h.arms["base"] for h in rows)
    text = (
        f"personal answers more test phrases right than base in {better} of {count(len(rows), 'client')}; "
        "the table of clients has the numbers."
    )
    gap = 1.6 if 0 < seen < len(rows) else 0.0
    height = 84 + ROW * (len(rows) + gap)
    places = [i + (gap if h.unseen else 0.0) for i, h in enumerate(rows)]
    return svg("clients", "Accuracy by client", text, height, lambda figure: _dumbbells(figure, rows, places, height))


def _dumbbells(figure: "Figure", rows: Sequence[ClientResult], places: Sequence[float], height: float) -> None:
    languages = ["" if h.name.startswith(h.language) else f" · {short(h.language)}" for h in rows]
    labels = [short(h.name) + language for h, language in zip(rows, languages, strict=True)]
    left = 12 + CHARACTER * max(map(len, labels))
    ax = axes(figure, left=left, top=42, width=WIDTH - left - 40, height=height - 84)
    values = {arm: np.array([h.arms[arm] for h in rows]) for arm in ARMS}
    finite = np.concatenate([v[np.isfinite(v)] for v in values.values()])
    lowest = max(0.0, math.floor(10 * (finite.min() if finite.size else 0.0) - 0.3) / 10)
    ax.set_xlim(lowest - 0.015, 1.015)
    ax.set_ylim(max(places) + 0.8, -0.8)
    ax.hlines(places, values["base"], values["personal"], color=LINE, linewidth=3, zorder=1)
    for arm in ARMS:
        _marks(ax, arm, values[arm], [place + LANES[arm] for place in places])
    ax.set_yticks(places, labels)
    ax.xaxis.set_major_formatter(lambda value, _: share(value, 1))
    ax.grid(axis="x")
    ax.set_axisbelow(True)
    ax.set_xlabel("share of its own test phrases answered right")
    for place, value in zip(places, values["personal"], strict=True):
        ax.annotate(
            share(value, 2), (1, place), (34, 0), ("axes fraction", "data"), "offset points",
            ha="right", va="center", color=ARM_COLORS["personal"],
        )  # fmt: skip
    first = next((place for place, h in zip(places, rows, strict=True) if h.unseen), None)
    if first is not None:
        ax.annotate(
            "took no part in training", (0, first - 1), (2, 0), ("axes fraction", "data"), "offset points",
            va="center", color=MUTED, style="italic",
        )  # fmt: skip
    key = axes(figure, left=0, top=4, width=WIDTH, height=24)
    key.set_axis_off()
    key.set(xlim=(0, WIDTH), ylim=(-1, 1))
    for x, arm in zip((14, 90, 170, 260), ARMS, strict=True):
        _marks(key, arm, [x], [0])
        key.text(x + 10, 0, arm, va="center", color=ARM_COLORS[arm])


def _marks(ax: "Axes", arm: str, x: Iterable[float], y: Iterable[float]) -> None:
    marker, area = MARKS[arm]
    face = {"base": PAPER, "local": "none"}.get(arm, ARM_COLORS[arm])
    order = {"personal": 2, "base": 3}.get(arm, 4)
    ax.scatter(
        list(x), list(y), s=area, marker=marker, facecolor=face, edgecolor=ARM_COLORS[arm], linewidth=1.4,
        zorder=order, clip_on=False,
    )  # fmt: skip


# Right labels and answers.


def answered(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Draw which label's test phrases got which answers, for the ``MOST_LABELS`` that are most often wrong."""
    wrong = confusions(counts)
    errors = Counter(dict.fromkeys(counts, 0))
    for many, _, label, _ in wrong:
        errors[label] += many
    labels = sorted(label for label, _ in errors.most_common(MOST_LABELS))
    text = f"{'All' if len(labels) == len(counts) else f'{len(labels)} of {len(counts)}'} labels. "
    text += "; ".join(f"{label} taken for {answer} {many} of {of}" for many, of, label, answer in wrong[:3])
    names = 12 + CHARACTER * max(len(short(label)) for label in labels)
    side = min(SQUARE, (WIDTH - names) / len(labels))
    height = side * len(labels) + names
    return svg("answered", "What is taken for what", text, height, lambda figure: _matrix(figure, counts, labels, side))


def _matrix(figure: "Figure", counts: Mapping[str, Mapping[str, int]], labels: Sequence[str], side: float) -> None:
    width, names = side * len(labels), [short(label) for label in labels]
    ax = axes(figure, left=WIDTH - width - 2, top=2, width=width, height=width)
    ax.set(xlim=(-0.5, len(labels) - 0.5), ylim=(len(labels) - 0.5, -0.5))
    places = [(label, answer, counts[label].get(answer, 0)) for label in labels for answer in labels]
    shown = [(label, answer, many / sum(counts[label].values())) for label, answer, many in places if many]
    ax.scatter(
        [labels.index(answer) for _, answer, _ in shown],
        [labels.index(label) for label, _, _ in shown],
        s=[part * (0.9 * side) ** 2 for *_, part in shown],
        color=[ARM_COLORS["personal"] if label == answer else DROPPED for label, answer, _ in shown],
        marker="s",
        linewidth=0,
    )
    ax.set_xticks(range(len(labels)), names, rotation=90)
    ax.set_yticks(range(len(labels)), names)
    ax.set_axisbelow(True)
    ax.grid(color=LINE, linewidth=0.4)


# Accuracy and loss by round.


def learning(result: RunResult) -> str:
    """Draw accuracy and loss on the validation parts by round, as the sum of each round has them."""
    scored = [r for r in result.rounds if "accuracy" in r.metrics]
    text = "No round published an accuracy: all were aborted, or had fewer than 100 validation phrases."
    if scored:
        first, last = scored[0], scored[-1]
        text = (
            f"Accuracy {share(first.metrics['accuracy'])} at the start of round {first.round}, "
            f"{share(last.metrics['accuracy'])} at the start of round {last.round}."
        )
    return svg("learning", "Accuracy and loss by round", text, 340, lambda figure: _curves(figure, result.rounds))


def _curves(figure: "Figure", rounds: Sequence[ReportedRound]) -> None:
    from matplotlib.ticker import MaxNLocator

    for i, (metric, title) in enumerate(CURVES.items()):
        ax = axes(figure, left=LEFT, top=30 + i * (PANEL + 46), width=WIDTH - LEFT - 48, height=PANEL)
        _curve(ax, metric, rounds)
        ax.set_title(title, loc="left", fontsize=11, color=INK)
        ax.grid(axis="y")
        if metric == "accuracy":
            ax.yaxis.set_major_formatter(lambda value, _: share(value, 2))
        ax.set_xlim(min(r.round for r in rounds) - 0.5, max(r.round for r in rounds) + 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    ax.set_xlabel("round (measured at its start, on validation phrases)")


def _curve(ax: "Axes", metric: str, rounds: Sequence[ReportedRound]) -> None:
    color = ARM_COLORS["global"]
    points = [(r.round, r.metrics[metric]) for r in rounds if metric in r.metrics]
    for aborted in (r.round for r in rounds if r.aborted):
        ax.axvspan(aborted - 0.5, aborted + 0.5, color=LINE, alpha=0.5, linewidth=0, zorder=0)
        ax.annotate("aborted", (aborted, 0.5), None, ("data", "axes fraction"), rotation=90, ha="center", va="center",
                    color=MUTED, fontsize=9)  # fmt: skip
    if not points:
        ax.set_yticks([])
        ax.text(0.5, 0.5, "nothing was published", transform=ax.transAxes, ha="center", va="center", color=MUTED)
        return
    x, y = zip(*points, strict=True)
    ax.plot(x, y, color=color, linewidth=2, marker="o", markersize=4 if len(x) <= 40 else 0, clip_on=False)
    ax.margins(y=0.15)
    text = share(y[-1]) if metric == "accuracy" else f"{y[-1]:.2f}"
    ax.annotate(text, (x[-1], y[-1]), (8, 0), textcoords="offset points", va="center", color=color, weight="bold")


# Accuracies of arms and differences of pairs, of a suite.


def arms(summary: SuiteSummary) -> str:
    """Draw every arm's accuracy or loss: a panel for the mean, the 10th percentile and the unseen clients."""
    rows = list(summary.arms)
    metric = summary.compared_by
    text = "; ".join(f"{name} {share(arm.figures['mean'].value)}" for name, arm in summary.arms.items()) + "."
    return svg("arms", f"{metric.name.capitalize()} by arm", text, _height(rows), lambda figure: _arms(figure, summary))


def pairs(summary: SuiteSummary) -> str:
    rows = [f"{pair.first} - {pair.second}" for pair in summary.pairs]
    unit = summary.compared_by.differences
    text = f"Differences of pairs of arms in {unit}; the table below has each."
    return svg("pairs", "Differences", text, _height(rows), lambda figure: _pairs(figure, summary))


def picture(summary: SuiteSummary) -> bytes:
    upper = _height(list(summary.arms))
    lower = _height([pair.first for pair in summary.pairs]) if summary.pairs else 0.0

    def paint(figure: "Figure") -> None:
        _arms(figure, summary)
        if summary.pairs:
            _pairs(figure, summary, upper)

    return png(upper + lower, paint)


def _height(rows: Sequence[str]) -> float:
    return TOP + SUITE_ROW * len(rows) + BOTTOM


def _arms(figure: "Figure", summary: SuiteSummary) -> None:
    rows = {_row(summary, name): [arm.figures[title] for title in SHOWN] for name, arm in summary.arms.items()}
    for ax in _panels(figure, rows, summary.compared_by, 0.0, lambda _: ACCENT):
        ax.xaxis.set_major_formatter(lambda value, _: share(value, 1))


def _row(summary: SuiteSummary, name: str) -> str:
    arm = summary.arms.get(name)
    return short(name) if arm is None or arm.complete else f"{short(name)} (!)"


def _pairs(figure: "Figure", summary: SuiteSummary, above: float = 0.0) -> None:
    nothing = Difference(math.nan, math.nan, math.nan, 1.0, 1.0)
    metric = summary.compared_by
    rows = {
        f"{_row(summary, pair.first)} - {_row(summary, pair.second)}": [
            pair.figures.get(title, nothing).scaled(metric.factor) for title in SHOWN
        ]
        for pair in summary.pairs
    }
    for ax in _panels(figure, rows, metric, above, lambda mark: NOISE if getattr(mark, "is_noise", False) else ACCENT):
        ax.axvline(0, color=MUTED, linewidth=1, zorder=1)


def _panels(
    figure: "Figure", rows: Mapping[str, Sequence[Mark]], metric: Metric, above: float, color: Callable[[Mark], str]
) -> list["Axes"]:
    names = list(rows)
    left = 12 + CHARACTER * max(map(len, names))
    width, panels = (WIDTH - left - 2 * GAP - 8) / len(SHOWN), []
    for i, title in enumerate(SHOWN):
        ax = axes(figure, left=left + i * (width + GAP), top=above + TOP, width=width, height=SUITE_ROW * len(names))
        for y, marks in enumerate(rows.values()):
            _mark(ax, marks[i], y, color(marks[i]))
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_yticks(range(len(names)), names if i == 0 else [])
        ax.set_title(metric.titles[title], loc="left", fontsize=11, color=INK)
        ax.grid(axis="x")
        ax.set_axisbelow(True)
        ax.margins(x=0.12)
        ax.locator_params(axis="x", nbins=4)
        panels.append(ax)
    return panels


def tile(ax: "Axes", x: float, y: float, gain: Difference | None) -> None:
    """Draw a difference as a tile: a gain, a loss, noise, or nothing that could be compared."""
    face, ink = ("none", MUTED) if gain is None or gain.is_noise else (ACCENT if gain.value > 0 else DROPPED, PAPER)
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, facecolor=face, edgecolor=LINE, linewidth=0.7))
    text = "–" if gain is None else f"{gain.value:+.1f}"
    ax.text(x, y, text, ha="center", va="center_baseline", color=ink, weight="normal" if ink == MUTED else "bold")


def _mark(ax: "Axes", mark: Mark, y: float, color: str) -> None:
    if not math.isfinite(mark.value):
        return
    ax.axhline(y, color=LINE, linewidth=0.6, zorder=0)
    if math.isfinite(mark.low):
        ax.plot([mark.low, mark.high], [y, y], color=color, linewidth=2.4, alpha=0.45, solid_capstyle="butt")
    ax.scatter([mark.value], [y], s=30, color=color, zorder=3, clip_on=False)
