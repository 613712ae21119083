"""The report of a run: its result, the terminal table, and the HTML page with its figures.

Importing this package does not import matplotlib, which only draws the figures of the page.
"""

from simulations.report.page import page, write_report
from simulations.report.result import ARMS, ClientResult, ReportedRound, RunResult
from simulations.report.terminal import print_scenario, print_table

__all__ = [
    "ARMS",
    "ClientResult",
    "ReportedRound",
    "RunResult",
    "page",
    "print_scenario",
    "print_table",
    "write_report",
]
