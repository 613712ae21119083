"""The tables of a run's page. Whatever comes from data is escaped."""

from collections.abc import Iterable
from html import escape

from simulations.report.formatting import ARM_TEXTS, COLUMNS, duration, share, size_or_dash
from simulations.report.result import ARMS, HouseholdResult, RoundResult, RunResult, summary


def arms(result: RunResult) -> str:
    """How well each adapter does, one a row."""
    rows = []
    for arm in ARMS:
        values = summary(result.households, arm)
        name = f"{arm}<small>{escape(ARM_TEXTS[arm])}</small>"
        cells = "".join(f"<td>{share(values[column])}</td>" for column in COLUMNS)
        rows.append(f'<tr{" class=best" if arm == "personal" else ""}><th scope="row">{name}</th>{cells}</tr>')
    return _table("arms", ("adapter", "mean", "10th percentile", "worst", "unseen"), rows)


def rounds(done: Iterable[RoundResult]) -> str:
    """What happened in each round."""
    head = ("round", "accuracy", "loss", "devices", "up", "down", "time", "version", "dropouts")
    body = _table("", head, [_round(r) for r in done])
    return f'<section class="rounds">\n<h2>Rounds</h2>\n<div class="scroll">{body}</div>\n</section>'


def _round(r: RoundResult) -> str:
    loss = f"{r.metrics['loss']:.3f}" if "loss" in r.metrics else "–"
    dropped = ", ".join(f"{device} at {step}" for device, step in r.dropped.items())
    said = "; ".join(filter(None, (f"aborted: {r.aborted}" if r.aborted else "", dropped)))
    cells = (
        share(r.metrics.get("accuracy", float("nan"))),
        loss,
        str(len(r.survivors)),
        size_or_dash(r.bytes_up),
        size_or_dash(r.bytes_down),
        duration(r.seconds),
        "–" if r.version is None else str(r.version),
    )
    return (
        f'<tr><th scope="row">{r.round}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + f'<td class="words{" dropped" if r.aborted else ""}">{escape(said)}</td></tr>'
    )


def each(households: Iterable[HouseholdResult]) -> str:
    """Every household in numbers, folded up."""
    head = ("household", "language", "trained on", "tested on", *ARMS, "kept")
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
        h.choice,
    )
    return f'<tr><th scope="row">{escape(h.name)}</th>' + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>"


def _table(kind: str, head: Iterable[str], rows: Iterable[str]) -> str:
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    return (
        f'<table class="{kind}">\n<thead><tr>{titles}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody>\n</table>"
    )
