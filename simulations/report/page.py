"""``report.html``: one run on one page that needs nothing but a browser.

The words are in ``templates/report.html``, which escapes every value; the numbers are formatted as in the terminal.
"""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from adapters.storage import PUBLIC, replace
from simulations.report import figures, formatting
from simulations.result import ARMS, RunResult, dropouts_by_step

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

    Equal results give equal bytes. A page that cannot be written leaves an older one as it was.
    """
    replace(path, page(result, program).encode(), PUBLIC)


def page(result: RunResult, program: str = "edgeadapt") -> str:
    exported = result.exported
    assert exported is not None  # noqa: S101  # only the run of a classifier has a page
    return template("report.html").render(
        run=result,
        exported=exported,
        headline=formatting.headline(result),
        accuracy={arm: result.summary(arm) for arm in ARMS},
        traffic=formatting.TrafficMeans.of(result),
        reliability=formatting.reliability(exported.reliability),
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
        command=formatting.command(exported, program),
        accuracies=formatting.accuracies(exported.parity),
        plain=formatting.plain(exported.plain) if exported.plain else "",
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
