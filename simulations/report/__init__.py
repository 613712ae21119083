"""The report of a run: its result, the terminal table, the HTML page with its figures, and several runs compared.

Importing this package does not import matplotlib, which only draws the figures of the page.
"""

from simulations.report.page import page, write_report
from simulations.report.result import ARMS, ClientResult, ReportedRound, RunResult
from simulations.report.seeds import Spread, markdown, read_results, spreads
from simulations.report.terminal import print_scenario, print_table

__all__ = [
    "ARMS",
    "ClientResult",
    "ReportedRound",
    "RunResult",
    "Spread",
    "markdown",
    "page",
    "print_scenario",
    "print_table",
    "read_results",
    "spreads",
    "write_report",
]
