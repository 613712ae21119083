"""``report.html``: one run on one page that needs nothing but a browser. Whatever comes from data is escaped."""

import os
from collections.abc import Iterable
from html import escape
from pathlib import Path
from tempfile import NamedTemporaryFile

from simulations import charts, roundcharts
from simulations.result import ARMS, HouseholdResult, RoundResult, RunResult, summary
from simulations.stylesheet import CSS
from simulations.wording import (
    ARM_NAMES,
    ARM_TEXTS,
    COLUMN_TEXTS,
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

READABLE = 0o644  # a report is there to be shown, and holds no phrase of anybody's
CAPTIONS = {
    "households": "From the vendor's head to the personal adapter, best first.",
    "learning": "Means over the devices that came through, taken from the sum; no device's own figure was seen.",
    "traffic": "What one device sends and receives in a round, beside sending it the whole model.",
    "lost": "At plan: before its masked input came; at survivors: before it confirmed who is left; at unmask: before "
    "its shares came. The next round asks it again.",
}


def write_report(result: RunResult, path: Path, program: str = "edgeadapt") -> None:
    """Write the page whole or not at all.

    Args:
        result: The run. Equal results give equal bytes.
        path: The file; an older one is replaced.
        program: The command as the reader can type it.

    Raises:
        OSError: The folder is missing, full or not writable; an older report is left as it was.
    """
    content = page(result, program).encode()
    with NamedTemporaryFile(dir=path.parent, prefix=".report-", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(READABLE)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def page(result: RunResult, program: str = "edgeadapt") -> str:
    """The page as text."""
    body = "\n".join(
        (
            _first_screen(result),
            _figures(result),
            _check(result, program),
            _rounds(result.rounds),
            _each(result.households),
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
        f'<section>\n<h2>Accuracy</h2>\n<p class="note">{escape(COLUMN_TEXTS)}</p>\n{_arms(result)}\n</section>\n'
        f"<section>\n{_facts(result)}\n</section>"
    )


def _arms(result: RunResult) -> str:
    rows = []
    for arm in ARMS:
        values = summary(result.households, arm)
        name = f"{ARM_NAMES[arm]}<small>{escape(ARM_TEXTS[arm])}</small>"
        cells = "".join(f"<td>{share(values[column])}</td>" for column in COLUMNS)
        rows.append(f'<tr{" class=best" if arm == "personal" else ""}><th scope="row">{name}</th>{cells}</tr>')
    return _table("arms", ("adapter", "mean", "10th percentile", "worst", "unseen"), rows)


def _facts(result: RunResult) -> str:
    traffic, seconds, parity = Traffic.of(result), result.seconds, result.parity
    dropped = sum(len(r.dropped) for r in result.rounds)
    facts = (
        ("a device sends", size_of(traffic.up), f"a round, {percent(traffic.up, traffic.model)} of the full model"),
        (
            "a device receives",
            size_of(traffic.down),
            f"a round, {percent(traffic.down, traffic.model)} of the full model",
        ),
        ("devices lost", str(dropped), losses(result.rounds)),
        ("time", duration(seconds["total"]), _coordination(seconds)),
        ("exported as trained", share(parity["agreement"], 4), f"of {parity['count']} phrases answered as in torch"),
    )
    return '<dl class="facts">\n' + "\n".join(_fact(*map(escape, fact)) for fact in facts) + "\n</dl>"


def _fact(name: str, value: str, note: str) -> str:
    return f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>"


def size_of(value: float) -> str:
    """Bytes, or a dash where no round came through."""
    return size(value) if value > 0 else "–"


def _coordination(seconds: dict[str, float]) -> str:
    part = percent(seconds["coordination"], seconds["training"])
    return f"training {duration(seconds['training'])}; coordination {part} of that"


def _figures(result: RunResult) -> str:
    households = _figure("Accuracy by household", "households", charts.households(result))
    traffic = _figure("Bytes on the wire", "traffic", roundcharts.traffic(result))
    learning = _figure("Accuracy and loss by round", "learning", roundcharts.learning(result))
    lost = _figure("Who was lost, and where", "lost", roundcharts.lost(result))
    left, right = f"{households}\n{traffic}", f"{learning}\n{lost}"
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


def _rounds(rounds: Iterable[RoundResult]) -> str:
    head = ("round", "accuracy", "loss", "devices", "up", "down", "time", "version", "lost")
    body = _table("", head, [_round(r) for r in rounds])
    return f'<section class="rounds">\n<h2>Rounds</h2>\n<div class="scroll">{body}</div>\n</section>'


def _round(r: RoundResult) -> str:
    loss = f"{r.metrics['loss']:.3f}" if "loss" in r.metrics else "–"
    lost = ", ".join(f"{device} at {step}" for device, step in r.dropped.items())
    said = "; ".join(filter(None, (f"aborted: {r.aborted}" if r.aborted else "", lost)))
    cells = (
        share(r.metrics.get("accuracy", float("nan"))),
        loss,
        str(len(r.survivors)),
        size_of(r.bytes_up),
        size_of(r.bytes_down),
        duration(r.seconds),
        "–" if r.version is None else str(r.version),
    )
    return (
        f'<tr><th scope="row">{r.round}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + f'<td class="words{" lost" if r.aborted else ""}">{escape(said)}</td></tr>'
    )


def _each(households: Iterable[HouseholdResult]) -> str:
    head = ("household", "language", "trained on", "tested on", *(ARM_NAMES[arm] for arm in ARMS), "chose")
    body = _table("", head, [_household(h) for h in households])
    return (
        '<section class="each">\n<details>\n<summary>Every household in numbers</summary>\n'
        f'<div class="scroll">{body}</div>\n</details>\n</section>'
    )


def _household(h: HouseholdResult) -> str:
    cells = (
        h.language,
        "no round" if h.unseen else f"{h.examples}",
        str(h.tests),
        *(share(h.accuracy[arm]) for arm in ARMS),
        ARM_NAMES.get(h.choice, h.choice),
    )
    return f'<tr><th scope="row">{escape(h.name)}</th>' + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>"


def _table(kind: str, head: Iterable[str], rows: Iterable[str]) -> str:
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    return (
        f'<table class="{kind}">\n<thead><tr>{titles}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody>\n</table>"
    )
