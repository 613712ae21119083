"""The goals of the design, and whether a run reaches them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.ondevice.process import PEER, TORCH

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
    ("int8 adapter: change of perplexity", lambda f, p: _change(f["perplexity"][p]), 0.001, False),
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
    """The profile that is measured against the goals: the fastest of those comparable to the peer.

    If none is comparable or the peer does not take part, the fastest of all: bytes and perplexity are goals as well.
    """
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


def _change(perplexity: Mapping[str, float]) -> float:
    return abs(perplexity["int8"] / perplexity["fp32"] - 1)
