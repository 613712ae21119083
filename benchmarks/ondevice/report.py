"""The tables and the picture of `python -m benchmarks ondevice`."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aggregation.errors import DataError
from benchmarks.ondevice import sharing
from benchmarks.ondevice.inputs import FORMATS
from benchmarks.ondevice.process import PEER, TORCH
from benchmarks.timing import aligned

# A profile is comparable to the peer up to these ratios of bytes and of perplexity.
SIZE, PERPLEXITY = 1.15, 1.02
Figures = Mapping[str, Any]
Goal = tuple[str, Callable[[Figures, str], float], float, bool]  # name, value of a profile, bound, lower or upper

GOALS: tuple[Goal, ...] = (
    ("decode / llama.cpp, lower quartile", lambda f, p: f["decode_ratio_quartiles"][p]["adapter"][0], 1.2, True),
    ("prefill / llama.cpp, lower quartile", lambda f, p: f["prefill_ratio_quartiles"][p]["adapter"][0], 1.15, True),
    ("bytes of the base / llama.cpp", lambda f, p: _size(f, p), SIZE, False),
    ("perplexity with adapter / llama.cpp", lambda f, p: _perplexity(f, p), PERPLEXITY, False),
    ("peak memory / llama.cpp", lambda f, p: _to_peer(f["peak_memory_bytes"], p), 1.2, False),
    ("cold start / llama.cpp", lambda f, p: _to_peer(f["cold_start_s"], p), 1.0, False),
    ("share of decode that the adapter costs", lambda f, p: f["decode_cost"][p], 0.05, False),
    ("adapter swap, ms", lambda f, p: f["swap_ms"][p], 1.0, False),
    ("int8 adapter / its fp32 bytes", lambda f, p: f["sizes"][p]["int8"] / f["sizes"][p]["fp32"], 0.27, False),
    (
        "int8 adapter: change of perplexity",
        lambda f, p: abs(f["perplexity"][p]["int8"] / f["perplexity"][p]["fp32"] - 1),
        0.001,
        False,
    ),
    ("MiniLM, one phrase, ms", lambda f, p: f["minilm_ms"]["ms"], 5.0, False),
)


def judged(found: Figures) -> dict[str, Any]:
    """``found`` with ``goals``, each with its value, its bound and whether it is reached, and ``goals_profile``."""
    profile, rows = chosen(found), []
    for name, value_of, bound, at_least in GOALS:
        if PEER in found["decode"] or "llama.cpp" not in name:
            value = value_of(found, profile)
            reached = value >= bound if at_least else value <= bound
            rows.append({"goal": name, "value": value, "bound": bound, "at_least": at_least, "reached": reached})
    return {**found, "goals": rows, "goals_profile": profile}


def chosen(found: Figures) -> str:
    """The profile that is measured against the goals: the fastest of those comparable to the peer. If none is
    comparable or the peer does not take part, the fastest of all: bytes and perplexity are goals as well."""
    ours: list[str] = [name for name in found["decode"] if name not in (PEER, TORCH)]
    fair = [name for name in ours if PEER in found["decode"] and comparable(found, name)]
    return max(fair or ours, key=lambda name: float(found["decode"][name]["adapter"]))


def comparable(found: Figures, name: str) -> bool:
    """Whether a profile is about as small as the peer, and with its int8 adapter about as accurate."""
    return _size(found, name) <= SIZE and _perplexity(found, name) <= PERPLEXITY


def _size(found: Figures, name: str) -> float:
    return float(found["sizes"][name]["base"] / found["sizes"][PEER]["base"])


def _perplexity(found: Figures, name: str) -> float:
    return float(found["perplexity"][name]["int8"] / found["perplexity"][PEER]["fp32"])


def _to_peer(values: Mapping[str, float], name: str) -> float:
    return values[name] / values[PEER] if values[PEER] else math.nan  # no memory outside Linux


RESULT, PICTURE = "ondevice.json", "ondevice.png"


def table(found: Figures) -> str:
    """Format speeds with spread and ratio to the peer, perplexities, sizes, latencies, tenants, and the goals."""
    parts = [_speeds(found), _by_format(found, "perplexity", ".3f"), _by_format(found, "bytes", ","), _latencies(found)]
    parts += [_tenants(found)] if found["tenants"] else []
    parts += [sharing.table(found["sharing"])] if "sharing" in found else []
    return "\n\n".join([*parts, _goals(found), _notes(found)])


def _speeds(found: Figures) -> str:
    ratios = PEER in found["decode"]
    head = ("tokens per second", "decode", "with adapter", "cost", "prefill", "with adapter")
    rows = [head + (("decode / peer", "prefill / peer") if ratios else ())]
    for name in found["decode"]:
        cells = [name, _speed(found, "decode", name, "base"), _speed(found, "decode", name, "adapter")]
        cells += [f"{found['decode_cost'][name]:.1%}"]
        cells += [_speed(found, "prefill", name, "base"), _speed(found, "prefill", name, "adapter")]
        if ratios:
            cells += [_ratio(found, what, name) for what in ("decode", "prefill")]
        rows.append(tuple(cells))
    return aligned(rows)


def _speed(found: Figures, what: str, name: str, arm: str) -> str:
    least, most = found[f"{what}_spread"][name][arm]
    return f"{found[what][name][arm]:.0f} ({least:.0f}–{most:.0f})"


def _ratio(found: Figures, what: str, name: str) -> str:
    first, third = found[f"{what}_ratio_quartiles"][name]["adapter"]
    return f"{found[f'{what}_ratio'][name]['adapter']:.2f} ({first:.2f}–{third:.2f})"


def _by_format(found: Figures, what: str, form: str) -> str:
    """List a figure of each contender: of the base, and with the adapter in each format that the contender has."""
    rows = [(what, "base", *(f"adapter {name}" for name in FORMATS))]
    for name, values in found["sizes" if what == "bytes" else what].items():
        rows.append((name, *(format(values[arm], form) if arm in values else "" for arm in ("base", *FORMATS))))
    return aligned(rows)


def _latencies(found: Figures) -> str:
    rows = [("latency", "cold start s", "first use ms", "swap ms", "peak memory MB")]
    for name in found["decode"]:
        least, most = found["swap_ms_spread"][name]
        cells = (_seconds(found, name), f"{found['cold_adapter_ms'][name]:.1f}")
        swap = f"{found['swap_ms'][name]:.2f} ({least:.2f}–{most:.2f})"
        rows.append((name, *cells, swap, f"{found['peak_memory_bytes'][name] / 1e6:.0f}"))
    return aligned(rows)


def _seconds(found: Figures, name: str) -> str:
    least, most = found["cold_start_s_spread"][name]
    return f"{found['cold_start_s'][name]:.2f} ({least:.2f}–{most:.2f})"


def _tenants(found: Figures) -> str:
    measured = found["tenants"]
    rows = [(f"tenants of one process, {measured['profile']}", "resident MB", "shared MB", "private MB")]
    for count, pages in measured["tenants"].items():
        rows.append((count, *(f"{pages[what] / 1e6:.1f}" for what in ("rss", "shared", "private"))))
    each, tensors = measured["bytes_per_tenant"] / 1e6, measured["adapter_bytes"] / 1e6
    return f"{aligned(rows)}\neach further tenant {each:.2f} MB, its tensors in float32 {tensors:.2f} MB"


def _goals(found: Figures) -> str:
    rows = [(f"goals, by {found['goals_profile']}", "value", "goal", "")]
    for row in found["goals"]:
        sign = "≥" if row["at_least"] else "≤"
        verdict = "reached" if row["reached"] else "not reached"
        rows.append((row["goal"], f"{row['value']:.4g}", f"{sign} {row['bound']:g}", verdict))
    return aligned(rows)


def _notes(found: Figures) -> str:
    before, after = found["load_average"]
    lines = [
        f"{found['rounds']} rounds; {found['threads']} threads for every contender; "
        f"a prompt of {found['prompt_tokens']} tokens, {found['generated_tokens']} generated (fewer by torch).",
        "Median (smallest–largest) over the rounds; decode speed is that of a completion's median token; ratios are "
        "medians (quartiles) of the ratios within a round, with the adapter. Memory is that of the completions.",
        f"Load average {before:.1f} at the start, {after:.1f} at the end: more than {found['threads']} is other work.",
    ]
    return "\n".join(lines)


def make_folder(folder: Path) -> None:
    """Make the folder that ``keep`` will fill, before minutes of work."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def keep(found: Figures, folder: Path) -> None:
    """Write the JSON and a picture into ``folder``."""
    with _writing(folder):
        (folder / RESULT).write_text(json.dumps(found, indent=1) + "\n")
        figure(found).savefig(folder / PICTURE, format="png", dpi=120)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = f"cannot write to {folder}: {error.strerror}; choose another --out"
        raise DataError(text, about="--out") from None


def figure(found: Figures) -> Any:
    """Draw decode and prefill as bars, and perplexity over decode speed; a ``matplotlib.figure.Figure``."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(13, 4.2), layout="constrained")
    decode, prefill, scatter = drawn.subplots(1, 3)
    _bars(decode, found, "decode")
    _bars(prefill, found, "prefill")
    _scatter(scatter, found)
    return drawn


def _bars(axes: Any, found: Figures, what: str) -> None:
    names = list(found[what])
    for shift, arm in ((-0.2, "base"), (0.2, "adapter")):
        values = [found[what][name][arm] for name in names]
        spans = [found[f"{what}_spread"][name][arm] for name in names]
        errors = [
            [max(0.0, value - least) for value, (least, _) in zip(values, spans, strict=True)],
            [max(0.0, most - value) for value, (_, most) in zip(values, spans, strict=True)],
        ]
        places = [i + shift for i in range(len(names))]
        axes.bar(places, values, 0.4, yerr=errors, label="base alone" if arm == "base" else "with adapter", capsize=2)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set(ylabel="tokens per second", title=what)
    axes.grid(visible=True, axis="y", alpha=0.2)
    axes.margins(y=0.2)  # space for the legend above the bars
    axes.legend(frameon=False, ncols=2, loc="upper right")


def _scatter(axes: Any, found: Figures) -> None:
    for name, values in found["perplexity"].items():
        form = "fp32" if name in (PEER, TORCH) else "int8"
        size = found["sizes"].get(name, {"base": 0})["base"] / 1e6 + 20
        axes.scatter([found["decode"][name]["adapter"]], [values[form]], s=size, alpha=0.6, label=name)
    axes.margins(0.2)
    # Not next to the points: those of equally good profiles overlap.
    for handle in axes.legend(frameon=False).legend_handles:
        handle.set_sizes([40])
    axes.set(
        xlabel="decode with adapter, tokens per second",
        ylabel="perplexity with adapter",
        title="area: bytes of the base",
    )
    axes.grid(visible=True, alpha=0.2)
