"""``report.html``: one run on one page that needs nothing but a browser. Whatever comes from data is escaped."""

from html import escape
from pathlib import Path

from adapters.storage import PUBLIC, replace
from simulations.report import charts, roundcharts, tables
from simulations.report.formatting import (
    COLUMN_TEXTS,
    Traffic,
    command,
    count,
    dropouts,
    duration,
    headline,
    percent,
    share,
    size,
    size_or_dash,
)
from simulations.report.result import RunResult
from simulations.report.stylesheet import CSS

CAPTIONS = {
    "households": "From base to personal, best first.",
    "learning": "Means over the devices that came through, taken from the sum; no device's own figure was seen.",
    "traffic": "What one device sends and receives in a round, beside sending it the whole model.",
    "dropouts": "At plan: before its masked input arrived; at survivors: before its consistency signature arrived; at "
    "unmask: before its shares arrived. The next round asks the device again.",
}


def write_report(result: RunResult, path: Path, program: str = "edgeadapt") -> None:
    """Write the page whole or not at all, for everyone to read: it holds no phrase of anybody's.

    Args:
        result: The run. Equal results give equal bytes.
        path: The file; an older one is replaced.
        program: The command as the reader can type it.

    Raises:
        OSError: The folder is missing, full or not writable; an older report is left as it was.
    """
    replace(path, page(result, program).encode(), PUBLIC)


def page(result: RunResult, program: str = "edgeadapt") -> str:
    """The page as text."""
    body = "\n".join(
        (
            _first_screen(result),
            _figures(result),
            _check(result, program),
            tables.rounds(result.rounds),
            tables.each(result.households),
        )
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>edgeadapt: {escape(result.scenario)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _first_screen(result: RunResult) -> str:
    run = f"edgeadapt · scenario {result.scenario} · seed {result.seed} · {count(len(result.rounds), 'round')}"
    return (
        f'<header>\n<p class="run">{escape(run)}</p>\n<h1>{escape(headline(result))}</h1>\n</header>\n'
        f'<section>\n<h2>Accuracy</h2>\n<p class="note">{escape(COLUMN_TEXTS)}</p>\n'
        f"{tables.arms(result)}\n</section>\n"
        f"<section>\n{_facts(result)}\n</section>"
    )


def _facts(result: RunResult) -> str:
    traffic, seconds, parity = Traffic.of(result), result.seconds, result.parity
    dropped = sum(len(r.dropped) for r in result.rounds)
    facts = (
        (
            "a device sends",
            size_or_dash(traffic.up),
            f"a round, {percent(traffic.up, traffic.model)} of the full model",
        ),
        (
            "a device receives",
            size_or_dash(traffic.down),
            f"a round, {percent(traffic.down, traffic.model)} of the full model",
        ),
        ("dropouts", str(dropped), dropouts(result.rounds)),
        ("time", duration(seconds["total"]), _coordination(seconds)),
        ("exported as trained", share(parity["agreement"], 4), f"of {parity['count']} phrases answered as in torch"),
    )
    return '<dl class="facts">\n' + "\n".join(_fact(*map(escape, fact)) for fact in facts) + "\n</dl>"


def _fact(name: str, value: str, note: str) -> str:
    return f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>"


def _coordination(seconds: dict[str, float]) -> str:
    part = percent(seconds["coordination"], seconds["training"])
    return f"training {duration(seconds['training'])}; coordination {part} of that"


def _figures(result: RunResult) -> str:
    households = _figure("Accuracy by household", "households", charts.households(result))
    traffic = _figure("Bytes on the wire", "traffic", roundcharts.traffic(result))
    learning = _figure("Accuracy and loss by round", "learning", roundcharts.learning(result))
    dropped = _figure("Dropouts by device and step", "dropouts", roundcharts.dropouts_by_device(result))
    left, right = f"{households}\n{traffic}", f"{learning}\n{dropped}"
    return f'<div class="figures">\n<div>\n{left}\n</div>\n<div>\n{right}\n</div>\n</div>'


def _figure(title: str, key: str, drawing: str) -> str:
    caption = f"<figcaption>{escape(CAPTIONS[key])}</figcaption>"
    return f"<section>\n<h2>{escape(title)}</h2>\n<figure>{caption}\n{drawing}\n</figure>\n</section>"


def _check(result: RunResult, program: str) -> str:
    adapter = result.adapter
    each = float(adapter["bytes"]) / max(float(adapter["elements"]), 1.0)
    rows = (
        ("adapter", f"version {adapter['version']}"),
        ("SHA-256", str(adapter["sha256"])),
        ("size", f"{size(float(adapter['bytes']))}, {int(adapter['elements']):,} elements, {each:.2f} bytes each"),
        ("for the base", str(result.base["digest"])),
        ("bundle", result.bundle),
        ("largest difference", f"{result.parity['max_abs_diff']:.2g} between the exported pair and torch"),
    )
    listed = "".join(f"<dt>{escape(name)}</dt><dd><code>{escape(value)}</code></dd>" for name, value in rows)
    return (
        '<section class="check">\n<h2>How to check</h2>\n<p>Ask the exported bundle a phrase. '
        "The command verifies every signature and digest before it answers.</p>\n"
        f"<pre>{escape(command(result, program))}</pre>\n"
        f"<dl>{listed}</dl>\n</section>"
    )
