"""The table and the picture of `python -m benchmarks secagg`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aggregation.errors import DataError

_HEAD = ("", "ours ms", "peer ms", "ratio", "by CPU")
Figures = Mapping[str, Any]


def table(found: Figures) -> str:
    """Format the comparison: medians of wall-clock time with quartiles, ratios of wall-clock and of CPU time."""
    rows = [_HEAD, *_rows(found)]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 5))]) for row in rows]
    return "\n".join([*lines, "", *_notes(found)])


def _rows(found: Figures) -> Iterator[tuple[str, ...]]:
    yield _row("client: shares", found["shares"])
    pairs = {
        "client: encode + mask": found["client"],
        "client: rotate + encode + mask": found["client_rotated"],
        "client: whole upload": found["upload"],
    }
    pairs |= {f"server: {float(key):.0%} dropouts": pair for key, pair in found["server"].items()}
    for what, pair in pairs.items():
        yield _row(what, {**pair, "cpu_ratio": None})
    for what, pair in pairs.items():
        yield _row(f"{what}, one core", {**pair, "ours": pair["ours_on_one_core"], "ratio": pair["one_core_ratio"]})


def _row(what: str, pair: Figures) -> tuple[str, ...]:
    by_cpu = "" if pair["cpu_ratio"] is None else f"{pair['cpu_ratio']:.1f}"
    return what, _spread(pair["ours"]), _spread(pair["peer"]), f"{pair['ratio']:.1f}", by_cpu


def _spread(timing: Figures) -> str:
    low, high = timing["quartiles_ms"]
    return f"{timing['ms']:.1f} ({low:.1f}–{high:.1f})"


def _notes(found: Figures) -> Iterator[str]:
    size, checks, server = found["bytes"], found["server_checks_ms"], next(iter(found["server"].values()))
    yield f"{found['devices']} devices, {found['elements']} elements, {found['neighbors']} neighbors."
    yield (
        f"Median (quartiles) of {found['client']['ours']['repeats']} repeats, ours and the peer's alternately; "
        f"{server['peer']['repeats']} of the peer's server."
    )
    yield "Peer: the SecAgg+ functions of the installed flwr, which use one core."
    yield f"Ours masks in {found['threads']} thread{'s' * (found['threads'] > 1)}; in the rows of one core, in one."
    yield f"Bytes of an upload: ours {size['ours']}, peer {size['peer']}."
    yield f"Checks of digests and signatures, which the peer does not have, add {checks['0']:.0f} ms at our server."
    yield f"Rotating the sum back, which the peer does not do, adds {found['server_rotation_ms']:.0f} ms at our server."
    yield (
        f"Masks at {found['mask_gb_per_s']:.1f} GB/s: {found['mask_fraction_of_limit']:.0%} of the speed of the "
        f"keystream and one addition. AES-256 alone: {found['aes_ctr_gb_per_s']:.1f} GB/s in CTR mode, "
        f"{found['aes_gcm_gb_per_s']:.1f} in GCM."
    )
    yield from _sweep_notes(found)


def _sweep_notes(found: Figures) -> Iterator[str]:
    if "memory" in found:
        peak = found["memory"]
        yield (
            f"Memory, in vectors: {peak['client_vectors']:.1f} for a device; {peak['both_vectors']:.1f} for a device "
            f"and the server while {peak['uploads']} uploads arrive."
        )
    if "large" in found:
        big = found["large"]
        yield (
            f"A round of {big['devices']} devices with {big['elements']} elements and {big['neighbors']} neighbors, "
            f"{big['dropouts']:.0%} dropouts: {big['server_s']:.1f} s at the server, checks included "
            f"({big['server_cpu_s']:.1f} s of CPU)."
        )
    for what, line in found.get("sweep", {}).items():
        powers = ", ".join(f"{name} {power:.2f}" for name, power in line["growth"].items())
        yield f"Exponent of growth with the number of {what}: {powers}."


def draw(sweep: Figures, path: Path) -> None:
    """Write the sweeps as a PNG: CPU time over devices and over elements, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (what, line) in zip(figure.subplots(1, 2, sharey=True), sweep.items(), strict=True):
        for name, values in line["cpu_ms"].items():
            axes.loglog(line["at"], values, marker="o", label=f"{name}: power {line['growth'][name]:.2f}")
        axes.set(xlabel=what, title=f"One round by number of {what}")
        axes.grid(visible=True, which="both", alpha=0.2)
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("CPU time, ms")
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror}; choose another --out", about="--out", value=str(path)
        ) from None
