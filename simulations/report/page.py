"""``report.html``: one run on one page that needs nothing but a browser.

The words are in ``templates/report.html``, which escapes every value; the numbers are formatted as in the terminal.
"""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from adapters.storage import PUBLIC, replace
from simulations.report import figures, formatting
from simulations.report.result import ARMS, RunResult, dropouts_by_step, summary

FILTERS = {
    "duration": formatting.duration,
    "number_of": formatting.count,
    "percent": formatting.percent,
    "share": formatting.share,
    "size": formatting.size,
    "size_or_dash": formatting.size_or_dash,
}


def write_report(result: RunResult, path: Path, program: str = "edgeadapt") -> None:
    """Write the page atomically and readable by everyone: it holds no phrase of a client.

    Args:
        result: The run. Equal results give equal bytes.
        path: The file; an older one is replaced.
        program: The command as the reader can type it.

    Raises:
        OSError: The folder is missing, full or not writable; an older report is left as it was.
    """
    replace(path, page(result, program).encode(), PUBLIC)


def page(result: RunResult, program: str = "edgeadapt") -> str:
    return template("report.html").render(
        run=result,
        headline=formatting.headline(result),
        accuracy={arm: summary(result.clients, arm) for arm in ARMS},
        traffic=formatting.TrafficMeans.of(result),
        reliability=formatting.reliability(result.reliability),
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
        command=formatting.command(result, program),
        accuracies=formatting.accuracies(result.parity),
        plain=formatting.plain(result.plain) if result.plain else "",
    )


def template(name: str) -> Template:
    """A template of this package, which escapes every value."""
    environment = Environment(
        loader=PackageLoader("simulations.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(FILTERS)
    return environment.get_template(name)
