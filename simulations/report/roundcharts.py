"""The figures of the rounds: accuracy and loss, bytes on the wire, dropouts."""

from collections.abc import Iterable
from math import log10
from typing import TYPE_CHECKING

from simulations.report.formatting import Traffic, count, dropouts, percent, share, size
from simulations.report.plots import (
    ARM_COLOURS,
    CHARACTER,
    DROPPED,
    INK,
    LINE,
    MUTED,
    PAPER,
    TILE,
    WIDTH,
    axes,
    short,
    svg,
)
from simulations.report.result import RoundResult, RunResult, dropouts_by_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch

LEFT = 48.0  # units beside a plot of rounds
PANEL = 112.0  # units high
CURVES = {"accuracy": "accuracy, a share", "loss": "loss, nats a phrase"}
FULL_GRID = 40  # devices; beyond it only those that ever dropped out are drawn
TILE_HEIGHT = 15.0  # units
WIDEST_TILE = 48.0
LETTER_WIDTH = 11.0  # units of the narrowest tile that holds a letter


def learning(result: RunResult) -> str:
    """Held-out accuracy and loss by round, as they came out of the sum."""
    known = [r for r in result.rounds if "accuracy" in r.metrics]
    text = "No round reported an accuracy."
    if known:
        first, last = known[0], known[-1]
        text = (
            f"Accuracy {share(first.metrics['accuracy'])} at the start of round {first.round}, "
            f"{share(last.metrics['accuracy'])} at the start of round {last.round}."
        )
    return svg("learning", "Accuracy and loss by round", text, 340, lambda figure: _curves(figure, result.rounds))


def _curves(figure: "Figure", rounds: tuple[RoundResult, ...]) -> None:
    for i, (metric, title) in enumerate(CURVES.items()):
        ax = axes(figure, left=LEFT, top=30 + i * (PANEL + 46), width=WIDTH - LEFT - 48, height=PANEL)
        _curve(ax, metric, rounds)
        ax.set_title(title, loc="left", fontsize=11, color=INK)
        ax.grid(axis="y")
        if metric == "accuracy":
            ax.yaxis.set_major_formatter(lambda value, _: share(value, 2))
        _count_rounds(ax, rounds)
    ax.set_xlabel("round (measured on held-out parts as it began)")


def _curve(ax: "Axes", metric: str, rounds: tuple[RoundResult, ...]) -> None:
    colour = ARM_COLOURS["global"]
    points = [(r.round, r.metrics[metric]) for r in rounds if metric in r.metrics]
    for aborted in (r.round for r in rounds if r.aborted):
        ax.axvspan(aborted - 0.5, aborted + 0.5, color=LINE, alpha=0.5, linewidth=0, zorder=0)
        ax.annotate("aborted", (aborted, 0.5), None, ("data", "axes fraction"), rotation=90, ha="center", va="center",
                    color=MUTED, fontsize=9)  # fmt: skip
    if not points:
        ax.set_yticks([])
        ax.text(0.5, 0.5, "nothing was measured", transform=ax.transAxes, ha="center", va="center", color=MUTED)
        return
    x, y = zip(*points, strict=True)
    ax.plot(x, y, color=colour, linewidth=2, marker="o", markersize=4 if len(x) <= 40 else 0, clip_on=False)
    ax.margins(y=0.15)
    said = share(y[-1]) if metric == "accuracy" else f"{y[-1]:.2f}"
    ax.annotate(said, (x[-1], y[-1]), (8, 0), textcoords="offset points", va="center", color=colour, weight="bold")


def _count_rounds(ax: "Axes", rounds: tuple[RoundResult, ...]) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlim(min(r.round for r in rounds) - 0.5, max(r.round for r in rounds) + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))


def traffic(result: RunResult) -> str:
    """Bytes a device a round, up and down, against the full model."""
    mean = Traffic.of(result)
    rows = [
        ("up from a device, a round", [r.bytes_up for r in result.rounds], mean.up, ARM_COLOURS["personal"]),
        ("down to a device, a round", [r.bytes_down for r in result.rounds], mean.down, ARM_COLOURS["global"]),
        ("the full model, once", [], mean.model, MUTED),
    ]
    text = "; ".join(f"{name}: {_weight(value, mean.model)}" for name, _, value, _ in rows) + "."
    return svg("traffic", "Bytes on the wire", text, 216, lambda figure: _weights(figure, rows, mean.model))


def _weights(figure: "Figure", rows: list[tuple[str, list[int], float, str]], model: float) -> None:
    ax = axes(figure, left=16, top=6, width=WIDTH - 36, height=170)
    known = [value for _, each, mean, _ in rows for value in (*each, mean) if value > 0]  # NaN is not
    ax.set_xscale("log")
    ax.set_xlim(10 ** (log10(min(known)) - 0.15), 10 ** (log10(max(known)) + 0.15))
    ax.set_ylim(len(rows) - 0.3, -0.55)
    ax.set_yticks([])
    ax.grid(axis="x")
    ax.minorticks_off()
    ax.xaxis.set_major_formatter(lambda value, _: size(value).replace(".00 ", " ").replace(".0 ", " "))
    ax.set_xlabel("bytes, logarithmic; small marks are single rounds")
    for y, (name, each, mean, colour) in enumerate(rows):
        at = y + 0.3
        ax.axhline(at, color=LINE, linewidth=1, zorder=1)
        ax.text(0, y, name, transform=ax.get_yaxis_transform(), va="center", color=INK, backgroundcolor=PAPER)
        ax.text(1, y, _weight(mean, model), transform=ax.get_yaxis_transform(), va="center", ha="right", color=colour,
                weight="bold")  # fmt: skip
        values = [value for value in each if value > 0]
        ax.scatter(values, [at] * len(values), s=60, marker="|", color=colour, linewidth=1, zorder=2)
        ax.scatter([mean], [at], s=62, color=colour, zorder=3)


def _weight(value: float, model: float) -> str:
    if value == model:
        return size(value)
    return f"{size(value)} · {percent(value, model)} of the model" if value > 0 else "none"


def dropouts_by_device(result: RunResult) -> str:
    """A grid of devices by rounds: which survived the round, and which dropped out at which step."""
    devices, hidden = _devices(result)
    letters = {step: step[:1].upper() for step in dropouts_by_step(result.rounds)}
    note = f"; {count(hidden, 'device')} without a dropout not drawn" if hidden else ""
    height = 74 + TILE_HEIGHT * max(len(devices), 1)
    return svg("dropouts", "Dropouts by device and round", dropouts(result.rounds) + ".", height,
               lambda figure: _grid(figure, result.rounds, devices, letters, height, note))  # fmt: skip


def _devices(result: RunResult) -> tuple[list[str], int]:
    """The devices to draw, in the households' order, unknown ones last; and how many of a large fleet are not drawn."""
    dropped = {device for r in result.rounds for device in r.dropped}
    there = dropped.union(*(r.survivors for r in result.rounds))
    drawn = dropped if len(there) > FULL_GRID else there
    order = {h.name: i for i, h in enumerate(result.households)}
    return sorted(drawn, key=lambda device: (order.get(device, len(order)), device)), len(there) - len(drawn)


def _grid(
    figure: "Figure",
    rounds: tuple[RoundResult, ...],
    devices: list[str],
    letters: dict[str, str],
    height: float,
    note: str,
) -> None:
    names = [short(device) for device in devices]
    left = 12 + CHARACTER * max(map(len, names), default=0)
    width = min(WIDTH - left - 12, WIDEST_TILE * len(rounds))
    ax = axes(figure, left=left, top=34, width=width, height=height - 74)
    row = {device: i for i, device in enumerate(devices)}
    through = [(r.round, row[d]) for r in rounds for d in r.survivors if d in row]
    gone = [(r.round, row[d], step) for r in rounds for d, step in r.dropped.items()]
    ax.add_patch(_tiles(through, TILE))
    ax.add_patch(_tiles([(x, y) for x, y, _ in gone], DROPPED))
    if width / len(rounds) >= LETTER_WIDTH:
        for x, y, step in gone:
            ax.text(x, y, letters[step], ha="center", va="center_baseline", fontsize=9, color=PAPER, weight="bold")
    ax.set_ylim(max(len(devices), 1) - 0.5, -0.5)
    ax.set_yticks(range(len(names)), names)
    _count_rounds(ax, rounds)
    ax.set_xlabel("round" + (" (× aborted)" if any(r.aborted for r in rounds) else "") + note, loc="left")
    for r in rounds:
        if r.aborted:
            ax.annotate(
                "×", (r.round, 1), (0, 3), ("data", "axes fraction"), "offset points", ha="center", color=DROPPED
            )
    _grid_key(figure, letters)


def _grid_key(figure: "Figure", letters: dict[str, str]) -> None:
    ax = axes(figure, left=0, top=4, width=WIDTH, height=16)
    ax.set_axis_off()
    ax.set(xlim=(0, WIDTH), ylim=(-1, 1))
    ax.scatter([12], [0], s=70, marker="s", color=TILE)
    ax.text(22, 0, "survived", va="center_baseline", color=MUTED)
    if letters:
        ax.scatter([90], [0], s=70, marker="s", color=DROPPED)
        said = ", ".join(f"{step} ({letter})" for step, letter in letters.items())
        ax.text(100, 0, f"dropped out at {said}", va="center_baseline", color=DROPPED)


def _tiles(places: Iterable[tuple[float, float]], colour: str) -> "PathPatch":
    """One path for all tiles: a hundred devices in a hundred rounds must not make a page of megabytes."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    unit = [(-0.45, -0.44), (0.45, -0.44), (0.45, 0.44), (-0.45, 0.44)]
    squares = [Path([*((x + dx, y + dy) for dx, dy in unit), (x, y)], closed=True) for x, y in places]
    path = Path.make_compound_path(*squares)
    return PathPatch(path, facecolor=colour, linewidth=0)
