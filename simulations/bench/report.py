"""What was measured, as a table and as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aggregation.errors import DataError


def table(found: Mapping[str, Any]) -> str:
    """The comparison as text: medians of wall time with least and most, ratio by wall time and by CPU time."""
    rows: list[tuple[str, ...]] = [("", "ours ms", "peer ms", "ratio", "by CPU")]
    rows.append(_row("client: shares", found["shares"]))
    rows.append(_row("client: encode + mask", found["client"]))
    rows += [_row(f"server: {float(key):.0%} lost", pair) for key, pair in found["server"].items()]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 5))]) for row in rows]
    size, checks = found["bytes"], found["server_checks_ms"]
    repeats = next(iter(found["server"].values()))["peer"]["repeats"]
    lines += [
        "",
        f"{found['devices']} devices, {found['elements']} elements, {found['neighbours']} neighbours.",
        "Median (least–most) of wall time; the last column compares CPU time.",
        f"Peer: SecAgg+ functions of the installed flwr. Its server ran {repeats} time{'s' * (repeats > 1)}.",
        f"Bytes up: {size['ours']} against {size['peer']}.",
        f"Checks of digests and signatures, which the peer does not have: {checks['0']:.0f} ms more at our server.",
        f"Masks run at {found['mask_fraction_of_limit']:.0%} of AES-256-CTR and an addition; "
        f"AES-256-CTR alone: {found['aes_ctr_gb_per_s']:.1f} GB/s.",
    ]
    for what, line in found.get("sweep", {}).items():
        growth = ", ".join(f"{name} {power:.2f}" for name, power in line["growth"].items())
        lines.append(f"Grows with the number of {what} to the power: {growth}.")
    return "\n".join(lines)


def _row(what: str, pair: Mapping[str, Any]) -> tuple[str, ...]:
    return what, _spread(pair["ours"]), _spread(pair["peer"]), f"{pair['ratio']:.1f}", f"{pair['cpu_ratio']:.1f}"


def _spread(timing: Mapping[str, Any]) -> str:
    return f"{timing['ms']:.1f} ({timing['least_ms']:.1f}–{timing['most_ms']:.1f})"


def draw(sweep: Mapping[str, Any], path: Path) -> None:
    """Write the sweeps as a PNG: CPU time over cohort and over vector, both axes logarithmic.

    Raises:
        DataError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (what, line) in zip(figure.subplots(1, 2), sweep.items(), strict=True):
        for name, values in line["cpu_ms"].items():
            axes.loglog(line["at"], values, marker="o", label=f"{name}: power {line['growth'][name]:.2f}")
        axes.set(xlabel=what, ylabel="CPU time, ms", title=f"One round by number of {what}")
        axes.grid(visible=True, which="both", alpha=0.2)
        axes.legend(frameon=False)
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; choose another --out") from None
