"""The table of `python -m benchmarks simulation`."""

from collections.abc import Mapping
from typing import Any

_HEAD = ("", "clients/s ours", "Flower", "ratio", "goal", "whole run s", "Flower", "MB ours", "Flower", "share")


def table(found: Mapping[str, Any]) -> str:
    """Format the comparison: medians with the smallest and largest value."""
    rows = [_HEAD, *(_row(name, figures) for name, figures in found["rows"].items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    notes = (
        f"Median (smallest–largest) of {found['repeats']} runs of each engine, in turn; each in a process of its own.",
        "clients/s: of the rounds after the first one. The same apps, with active secure aggregation, on both engines.",
        "MB: peak of all processes of a run; pages that several share are counted once.",
    )
    return "\n".join([*lines, "", *notes])


def _row(name: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
    ours, peer = figures["ours"], figures["flower"]
    return (
        f"{name}, {figures['clients']} clients",
        _spread(ours["clients_per_second"]),
        _spread(peer["clients_per_second"]),
        f"{figures['ratio']:.1f}",
        f"≥ {figures['goal']:g}",
        _spread(ours["seconds"]),
        _spread(peer["seconds"]),
        _spread(ours["memory"], 1e6),
        _spread(peer["memory"], 1e6),
        f"{figures['memory_share']:.2f}",
    )


def _spread(values: Mapping[str, float], unit: float = 1.0) -> str:
    median, low, high = (values[key] / unit for key in ("median", "min", "max"))
    places = 0 if median >= 100 else 1
    return f"{median:.{places}f} ({low:.{places}f}–{high:.{places}f})"
