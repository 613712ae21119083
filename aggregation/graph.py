"""The masking graph: who is whose neighbor above ``COMPLETE_UP_TO`` devices, and how many neighbors are enough.

Devices stand on a circle in an order that follows from the session's context; each is the neighbour of the ``k / 2``
before and after it. That is the Harary graph under a permutation, of Bell et al., CCS 2020. What can go wrong with it
is a matter of chance, and this file bounds the chance by exact hypergeometric tails:

- a device has so many corrupt neighbours that its seed and its mask key could both be opened;
- the honest survivors fall apart, so that the sum over a part of them can be opened;
- a device has lost so many neighbours that the round cannot end. That one costs a round, not a secret.

A graph says nothing about who agreed on the survivors: that takes a ``quorum`` of the whole cohort, whatever the graph.

``bell2020_parameters`` is the bound of the paper. ``graph_parameters`` and ``is_secure`` are for sessions of this
protocol, which differs in three ways: a dealer holds a share of its own; the coordinator may choose who drops out once
it knows the graph; and an active one may try many rosters for a graph that it likes (docs/explanation/threat-model.md).
"""

import bisect
import functools
import hashlib
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from aggregation.errors import ConfigError

COMPLETE_UP_TO = 128  # devices: up to here everyone is everyone's neighbour
SIGMA = 40  # bits: a session is unsafe with probability 2^-40 or less
ETA = 20  # bits: a round cannot end, although no more were lost than expected, with 2^-20 or less
GRINDING = 40  # bits: an active coordinator may try 2^40 rosters and keep the worst
_TAG = b"edgeadapt/harary/1\x00"


class GraphParameters(NamedTuple):
    """Neighbours of a device, and shares that open its secrets."""

    degree: int
    threshold: int


def harary_order(context: bytes, devices: Iterable[str]) -> tuple[str, ...]:
    """``devices`` in their order on the circle of the session ``context``: by SHA-256 of both."""
    return tuple(sorted(devices, key=lambda device: hashlib.sha256(_TAG + context + device.encode()).digest()))


def harary_neighbors(order: tuple[str, ...], degree: int) -> dict[str, frozenset[str]]:
    """The neighbours of each device on a circle: ``degree / 2`` on either side, symmetric, never itself.

    Args:
        order: Of the circle, more than ``degree`` devices.
        degree: Even.

    Raises:
        ConfigError: Such a graph does not exist.
    """
    if degree % 2 or not 2 <= degree < len(order):
        raise ConfigError(f"degree {degree} is not an even number between 2 and {len(order) - 1}")
    steps = [step for step in range(-degree // 2, degree // 2 + 1) if step]
    return {
        device: frozenset(order[(place + step) % len(order)] for step in steps) for place, device in enumerate(order)
    }


def bell2020_parameters(devices: int, corrupt: float, dropout: float) -> GraphParameters:
    """The least (k, t) of Bell et al. against a semi-malicious server, for σ = 40 and η = 20.

    Args:
        devices: In the cohort, n.
        corrupt: Fraction of them that is corrupt, γ.
        dropout: Fraction of them that is lost in a round, δ.

    Raises:
        ConfigError: No graph on so many devices withstands that.
    """
    bad, lost = count_of(devices, corrupt), count_of(devices, dropout)

    def safe(k: int, t: int) -> bool:
        apart = devices * hypergeometric_tail(devices - 1, bad, k, 2 * t - k)
        torn = _two_windows(devices, bad + lost, k // 2, k // 2)
        return max(apart, torn) <= 2.0**-SIGMA

    return _least(devices, lost, safe)


def graph_parameters(devices: int, corrupt: float, dropout: float, *, bits: int = SIGMA + GRINDING) -> GraphParameters:
    """The least degree and threshold for a session; the complete graph up to ``COMPLETE_UP_TO`` devices.

    Raises:
        ConfigError: No graph on so many devices withstands that.
    """
    bad, lost = count_of(devices, corrupt), count_of(devices, dropout)
    if devices <= COMPLETE_UP_TO:
        return GraphParameters(devices - 1, quorum(devices, corrupt))
    if devices - lost < quorum(devices, corrupt):
        raise ConfigError(f"{devices - lost} of {devices} devices are too few to agree: lower the fractions")
    return _least(devices, lost, lambda k, t: is_secure(devices, bad, k, t, bits))


def count_of(devices: int, fraction: float) -> int:
    """``fraction`` of ``devices`` as a count, rounded up: how many of a cohort may be corrupt, or may drop out.

    Raises:
        ConfigError: The fraction is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"fraction {fraction} is not in [0, 1)")
    return math.ceil(fraction * devices - 1e-9)


def quorum(devices: int, corrupt: float) -> int:
    """The fewest devices of which no two groups can be found that have only corrupt ones in common.

    Two groups of ``q`` have ``2 q - devices`` or more in common; more of them than are corrupt means that an honest
    device is in both, and an honest device signs one survivor set a round.
    """
    return (devices + count_of(devices, corrupt)) // 2 + 1


@functools.lru_cache(maxsize=1024)
def is_secure(devices: int, corrupt: int, degree: int, threshold: int, bits: int) -> bool:
    """Whether a session on a circle is safe but for a probability of 2^-``bits``.

    A device's ``k`` neighbours and itself hold its shares, ``c`` of them corrupt. Both its secrets open only if
    ``2 t <= k + 1 + c``. A part of the honest survivors opens only if the first of that part on the circle has ``t``
    holders that answer, although the honest ones among the ``k / 2`` before it do not belong to the part and so do
    not answer: ``t - 1 - k / 2`` of these must be corrupt. The same holds after the last of the part.
    """
    if corrupt >= devices:  # a roster may be smaller than the share of the cohort that is taken for corrupt
        return False
    apart = devices * hypergeometric_tail(devices - 1, corrupt, degree, 2 * threshold - degree - 1)
    torn = _two_windows(devices, corrupt, degree // 2, threshold - 1 - degree // 2)
    return degree % 2 == 0 and max(apart, torn) <= 2.0**-bits


def hypergeometric_tail(population: int, marked: int, drawn: int, least: int) -> float:
    """P[at least ``least`` of ``drawn`` are marked], drawn without replacement from ``population``."""
    first, last = max(least, 0, drawn + marked - population), min(marked, drawn)
    ways = sum(math.comb(marked, i) * math.comb(population - marked, drawn - i) for i in range(first, last + 1))
    return ways / math.comb(population, drawn)


def _two_windows(devices: int, marked: int, width: int, least: int) -> float:
    """Bounds P[two disjoint windows of the circle, ``width`` places each, have ``least`` marked devices each].

    Of two disjoint windows each has the less the more the other has: the product bounds both (negative association).
    """
    if 2 * least > marked:
        return 0.0
    return math.comb(devices, 2) * hypergeometric_tail(devices, marked, width, least) ** 2


def _ends(devices: int, lost: int, k: int, t: int) -> bool:
    """Whether every device keeps ``t`` neighbours but for a probability of 2^-``ETA``."""
    return devices * hypergeometric_tail(devices - 1, lost, k, k - t + 1) <= 2.0**-ETA


def _least(devices: int, lost: int, safe: Callable[[int, int], bool]) -> GraphParameters:
    for k in range(2, devices, 2):
        thresholds = range(k // 2 + 1, k + 1)
        if _ends(devices, lost, k, thresholds[0]):
            # More shares to open a secret are safer, and easier to lose: the least safe threshold decides.
            least = bisect.bisect_left(thresholds, True, key=functools.partial(safe, k))
            if least < len(thresholds) and _ends(devices, lost, k, thresholds[least]):
                return GraphParameters(k, thresholds[least])
    raise ConfigError(f"no graph on {devices} devices withstands so many corrupt and lost ones: lower the fractions")
