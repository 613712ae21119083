"""Write the report of a suite: ``report.html``, ``report.md``, ``report.png`` and ``report.json`` in its folder."""

import json
from pathlib import Path

from adapters.storage import PUBLIC, replace
from simulations.report.page import template
from simulations.suite import figures, rendering
from simulations.suite.summary import SuiteSummary


def write_suite_report(summary: SuiteSummary, folder: Path) -> None:
    """Write all files, each atomically and readable by everyone: they hold no text of a client.

    Args:
        summary: Of the suite. Equal summaries give equal bytes.
        folder: Of the suite.

    Raises:
        OSError: The folder is full or not writable; the file that could not be written is left as it was.
    """
    contents = {
        "report.html": suite_page(summary).encode(),
        "report.md": rendering.markdown(summary).encode(),
        "report.png": figures.picture(summary),
        "report.json": json.dumps(summary.to_json(), indent=2).encode(),
    }
    for name, content in contents.items():
        replace(folder / name, content, PUBLIC)


def suite_page(summary: SuiteSummary) -> str:
    """The page as text. It loads nothing."""
    return template("suite.html").render(
        suite=summary,
        headline=rendering.headline(summary),
        overview=rendering.overview(summary),
        metric=rendering.metric_of(summary),
        to_target=rendering.to_target(summary),
        interval=rendering.interval,
        shares=rendering.shares,
        costs=rendering.costs,
        constants=rendering.constants,
        sentences=list(rendering.sentences(summary)),
        figures={"arms": figures.arms(summary), "pairs": figures.pairs(summary) if summary.pairs else ""},
    )
