"""What the design set out to reach, and whether a run reached it."""

from collections.abc import Callable, Mapping
from typing import Any

from simulations.benchmarks.ondevice.stage import PEER, TORCH

# How much larger and how much worse than the peer's still is comparable.
SIZE, PERPLEXITY = 1.15, 1.02
Goal = tuple[str, Callable[[Mapping[str, Any], str], float], float, bool]  # what, its value, bound, at least or at most

GOALS: tuple[Goal, ...] = (
    ("decode with adapter / llama.cpp", lambda f, p: f["decode_ratio"][p]["adapter"], 1.05, True),
    ("prefill with adapter / llama.cpp", lambda f, p: f["prefill_ratio"][p]["adapter"], 1.15, True),
    ("bytes of the base / llama.cpp", lambda f, p: _larger(f, p), SIZE, False),
    ("perplexity with adapter / llama.cpp", lambda f, p: _worse(f, p), PERPLEXITY, False),
    ("share of decode that the adapter costs", lambda f, p: f["decode_cost"][p], 0.05, False),
    ("adapter swap, ms", lambda f, p: f["swap_ms"][p], 1.0, False),
    ("int8 adapter / its fp32 bytes", lambda f, p: f["sizes"][p]["int8"] / f["sizes"][p]["fp32"], 0.27, False),
    ("int8 adapter: change of perplexity", lambda f, p: _change(f["perplexity"][p]), 0.001, False),
    ("MiniLM, one phrase, ms", lambda f, p: f["minilm_ms"]["ms"], 5.0, False),
)


def judged(found: Mapping[str, Any]) -> dict[str, Any]:
    """``found`` with ``goals``: each with value, bound and whether it is reached, by ``chosen``."""
    profile = chosen(found)
    rows = []
    for what, value, bound, least in GOALS:
        if PEER not in found["decode"] and "llama.cpp" in what:
            continue
        reached = value(found, profile)
        rows.append(
            {
                "goal": what,
                "value": reached,
                "bound": bound,
                "at_least": least,
                "reached": _holds(reached, bound, least),
            }
        )
    return {**found, "goals": rows, "goals_profile": profile}


def chosen(found: Mapping[str, Any]) -> str:
    """The profile that is held to the goals: the fastest of those comparable to the peer in bytes and perplexity.

    Where none is comparable, or there is no peer, the fastest of all: its bytes and perplexity are goals as well.
    """
    ours: list[str] = [name for name in found["decode"] if name not in (PEER, TORCH)]
    fair = [name for name in ours if PEER in found["decode"] and comparable(found, name)]
    return max(fair or ours, key=lambda name: float(found["decode"][name]["adapter"]))


def comparable(found: Mapping[str, Any], name: str) -> bool:
    """Whether a profile is about as small as the peer's file, and with its int8 adapter about as good as the peer."""
    return _larger(found, name) <= SIZE and _worse(found, name) <= PERPLEXITY


def _larger(found: Mapping[str, Any], name: str) -> float:
    return float(found["sizes"][name]["base"] / found["sizes"][PEER]["base"])


def _worse(found: Mapping[str, Any], name: str) -> float:
    return float(found["perplexity"][name]["int8"] / found["perplexity"][PEER]["fp32"])


def _change(perplexity: Mapping[str, float]) -> float:
    return abs(perplexity["int8"] / perplexity["fp32"] - 1)


def _holds(value: float, bound: float, least: bool) -> bool:
    return value >= bound if least else value <= bound
