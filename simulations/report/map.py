"""Where an arm is worth it: one suite at every combination of a few places, such as numbers of clients and of texts.
Each cell says how much better the first arm of ``compare`` is than the strongest of those that it is compared with.
That one is chosen by the same test texts, which is a little hard on the first arm; nothing corrects for many cells."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeadapt.formats.storage import PUBLIC, replace
from simulations.plan import SuiteSettings
from simulations.report import figures
from simulations.report.formatting import share
from simulations.report.pages import Page, Table, difference_cell, marked, suite_page, write_reports
from simulations.report.summary import PairSummary, SuiteSummary, plain
from simulations.result import Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Place = tuple[str, ...]  # a label of each axis
TITLE, CELL = 24.0, 26.0  # units high: above a panel, and of a row


@dataclass(frozen=True, slots=True)
class MapSummary:
    """A suite with ``vary``. ``cells`` has the summary of every place."""

    name: str
    arm: str  # the first of ``compare``
    axes: dict[str, tuple[str, ...]]
    cells: dict[Place, SuiteSummary]

    @classmethod
    def of(cls, settings: SuiteSettings, cells: dict[Place, SuiteSummary]) -> "MapSummary":
        axes = {axis: tuple(places) for axis, places in settings.vary.items()}
        return cls(settings.name, settings.compare[0][0], axes, cells)

    @property
    def metric(self) -> Metric:
        return next(iter(self.cells.values())).compared_by

    def strongest(self, place: Place) -> PairSummary | None:
        """Compare the arm with that over which it gains least in the mean; None if it or all others failed there.
        Differences have the sign of a gain."""
        pairs = [pair for pair in self.cells[place].pairs if pair.first == self.arm]
        sign = self.metric.sign
        gains = [
            PairSummary(pair.first, pair.second, {title: found.scaled(sign) for title, found in pair.figures.items()})
            for pair in pairs
        ]
        return min(gains, key=lambda pair: pair.figures["mean"].value, default=None)

    def rows(self) -> list[list[str]]:
        rows = []
        for place, summary in self.cells.items():
            pair, where = self.strongest(place), " · ".join(place)
            if pair is None:
                rows.append([where, "failed", "–", "–", "–"])
                continue
            mean = {name: share(summary.arms[name].figures["mean"].value) for name in (pair.first, pair.second)}
            mark = marked(summary, self.arm).removeprefix(self.arm)
            other = f"{marked(summary, pair.second)} {mean[pair.second]}"
            gains = [difference_cell(pair.figures.get(title), self.metric) for title in ("mean", "unseen")]
            rows.append([where, f"{mean[self.arm]}{mark}", other, *gains])
        return rows

    def headline(self) -> str:
        """Say in how many cells the arm gains, loses, and neither by more than noise."""
        pairs = [pair.figures["mean"] for place in self.cells if (pair := self.strongest(place))]
        known = [one for one in pairs if math.isfinite(one.low)]
        gains, losses = sum(one.low > 0 for one in known), sum(one.high < 0 for one in known)
        rest, noise = len(self.cells) - len(known), len(known) - gains - losses
        text = f"{self.arm} is better than the strongest other arm in {gains} of {len(self.cells)} cells, "
        text += f"worse in {losses}, and within noise in {noise}"
        return f"{text}; {rest} could not be compared." if rest else f"{text}."

    def page(self, links: Sequence[str] = ()) -> Page:
        """``links``: to the pages of the cells."""
        head = [" · ".join(self.axes), self.arm, "strongest other", f"gain in {self.metric.differences}", "unseen"]
        note = "The first column leads to all arms of a cell. The strongest other arm is chosen by the same test texts."
        table = Table("Every cell in numbers", note, head, self.rows(), links)
        return Page("map", self.name, self.headline(), [table])

    def markdown(self) -> str:
        return self.page().markdown()

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints: the axes, and of each cell its place, its gain and its suite."""
        cells = [
            {
                "place": dict(zip(self.axes, place, strict=True)),
                "strongest": (pair := self.strongest(place)) and pair.second,
                "gain": plain(pair.figures["mean"]) if pair else None,
                "suite": summary.to_json(),
            }
            for place, summary in self.cells.items()
        ]
        return {"name": self.name, "arm": self.arm, "axes": self.axes, "cells": cells}

    @property
    def height(self) -> float:
        rows = [*map(len, self.axes.values()), 1, 1]
        return rows[2] * (TITLE + CELL * rows[1]) + figures.BOTTOM

    def paint(self, figure: "Figure") -> None:
        names, places = [*self.axes, "", ""], [*self.axes.values(), ("",), ("",)]
        left = 12 + figures.CHARACTER * max(map(len, places[1]))
        for panel, third in enumerate(places[2]):
            top = panel * (TITLE + CELL * len(places[1])) + TITLE
            ax = figures.axes(figure, left=left, top=top, width=figures.WIDTH - left - 8, height=CELL * len(places[1]))
            for x, first in enumerate(places[0]):
                for y, second in enumerate(places[1]):
                    pair = self.strongest((first, second, third)[: len(self.axes)])
                    figures.tile(ax, x, y, pair.figures["mean"].scaled(abs(self.metric.factor)) if pair else None)
            last = panel == len(places[2]) - 1
            ax.set(xlim=(-0.5, len(places[0]) - 0.5), ylim=(len(places[1]) - 0.5, -0.5))
            ax.set_xticks(range(len(places[0])), places[0] if last else [])
            ax.set_yticks(range(len(places[1])), places[1])
            titles = (f"{names[2]}: {third}" if third else "", f"{names[1]} ↓" if names[1] else "")
            ax.set_title(", ".join(filter(None, titles)), loc="left", fontsize=11, color=figures.INK)
            ax.set_xlabel(names[0] if last else "")


def write_map(summary: MapSummary, folder: Path) -> None:
    """Write the reports of the map, and a page for each cell. Raises as ``write_suite_report``."""
    pages = {place: f"cell-{number}.html" for number, place in enumerate(summary.cells, 1)}
    picture = figures.svg("map", "Map", summary.headline(), summary.height, summary.paint)
    caption = f"In {summary.metric.differences}, over the strongest other arm; a tile without a color is noise."
    page = summary.page([*pages.values()]).html((f"Gain of {summary.arm}", caption, picture))
    write_reports(folder, page, summary.markdown(), figures.png(summary.height, summary.paint), summary.to_json())
    for place, name in pages.items():
        replace(folder / name, suite_page(summary.cells[place]).encode(), PUBLIC)
