"""The closing table of a run in a terminal: eighty columns, and plain text where nobody looks."""

import math

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from simulations.report.formatting import (
    ARM_NAMES,
    COLUMNS,
    Traffic,
    command,
    count,
    duration,
    headline,
    losses,
    percent,
    share,
    size,
)
from simulations.report.result import ARMS, RunResult, summary

NOTES = {
    "base": "the vendor's head, no training",
    "local": "each alone, the same epochs",
    "global": "the last shared adapter",
    "personal": "shared, then tuned in private",
}
LABEL = 10  # columns


def print_table(result: RunResult, console: Console, program: str = "edgeadapt") -> None:
    """Print the accuracy of every arm, what it cost, and what to type next.

    Args:
        result: The run.
        console: Where to; without colour if it is not a terminal.
        program: The command as the reader can type it.
    """
    console.print()
    console.print(Text(headline(result), style="bold"))
    console.print()
    console.print(_accuracy(result))
    console.print()
    for label, said in _facts(result, program):
        # Neither wrapped nor read for markup: a path or command must survive copy and paste.
        line = Text.assemble((f"{label:<{LABEL}}", "dim"), said)
        console.print(line, soft_wrap=True, highlight=False)


def _accuracy(result: RunResult) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    table.add_column("accuracy")
    for title in COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for arm in ARMS:
        values = summary(result.households, arm)
        style = "bold" if arm == "personal" else ""
        cells = [share(values[column]) for column in COLUMNS]
        table.add_row(ARM_NAMES[arm], *cells, Text(NOTES[arm], style="dim"), style=style)
    return table


def _facts(result: RunResult, program: str) -> list[tuple[str, str]]:
    traffic = Traffic.of(result)
    return [
        ("up", _traffic(traffic.up, traffic.model)),
        ("down", _traffic(traffic.down, traffic.model)),
        ("lost", losses(result.rounds)),
        ("time", _time(result.seconds)),
        ("parity", _parity(result.parity)),
        ("bundle", result.bundle),
        ("report", result.report),
        ("try", command(result, program)),
    ]


def _traffic(value: float, model: float) -> str:
    if not math.isfinite(value):
        return "nothing: no round came through"
    return f"{size(value)} a device a round, {percent(value, model)} of the full model ({size(model)})"


def _time(seconds: dict[str, float]) -> str:
    training, coordination = seconds["training"], seconds["coordination"]
    return (
        f"{duration(seconds['total'])}; training {duration(training)}; "
        f"coordination {duration(coordination)}, {percent(coordination, training)} of that"
    )


def _parity(parity: dict[str, float | int]) -> str:
    return (
        f"{share(parity['agreement'], 4)} of {count(int(parity['count']), 'phrase')} as in torch, "
        f"largest difference {parity['max_abs_diff']:.2g}"
    )
