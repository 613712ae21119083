"""The masking graph: who is whose neighbor above ``COMPLETE_UP_TO`` devices, and how many neighbors are enough.

Devices are arranged in a ring, in an order that follows from the session's context; each is the neighbor of the ``k /
2`` before and the ``k / 2`` after it. That is the Harary graph under a random permutation, of Bell et al. (CCS 2020).
It can fail with a small probability, which this module bounds by exact hypergeometric tails:

- a device has so many corrupt neighbors that both its seed and its mask key can be reconstructed;
- the honest survivors split into parts, so that the sum over one part can be unmasked;
- a device has lost so many neighbors that the round cannot be unmasked. This costs a round, not a secret.

The graph does not decide who must agree on the survivors: that takes a ``quorum`` of the whole cohort on any graph.
``left_over`` bounds how many devices linear combinations of sums from one adapter leave.

``graph_parameters`` and ``is_secure`` are for sessions of this protocol, which differs from the paper's in three ways:
a dealer keeps a share of its own secrets; the coordinator may choose who drops out once it knows the graph; and an
active coordinator may try many rosters for a graph that suits it (``docs/explanation/threat-model.md``)."""

import bisect
import functools
import hashlib
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from aggregation.errors import ConfigError

COMPLETE_UP_TO = 128  # devices: up to here every device is every other's neighbor
SIGMA = 40  # bits: a session is insecure with probability at most 2^-40
ETA = 20  # bits: with the expected dropouts, a round cannot be unmasked with probability at most 2^-20
GRINDING = 40  # bits: an active coordinator may try 2^40 rosters and keep the one that suits it
MINIMUM_SURVIVORS = 4  # honest devices that a device's default policy requires in a sum, and in combinations of sums
_TAG = b"edgeadapt/harary/1\x00"


class GraphParameters(NamedTuple):
    """``degree`` neighbors of each device; ``threshold`` shares reconstruct a secret."""

    degree: int
    threshold: int


def harary_order(context: bytes, devices: Iterable[str]) -> tuple[str, ...]:
    """``devices`` in their ring order in the session ``context``: ascending SHA-256 of context and id."""
    return tuple(sorted(devices, key=lambda device: hashlib.sha256(_TAG + context + device.encode()).digest()))


def harary_neighbors(order: tuple[str, ...], degree: int) -> dict[str, frozenset[str]]:
    """The neighbors of each device in a ring order: ``degree / 2`` on either side; symmetric, never the device itself.

    >>> sorted(harary_neighbors(("a", "b", "c", "d", "e"), 2)["a"])
    ['b', 'e']

    ``order``: device ids in ring order, more than ``degree``. ``degree``: even, 2 or more. Raises ConfigError: no such
    graph exists."""
    if degree % 2 or not 2 <= degree < len(order):
        raise ConfigError(f"degree {degree} is not an even number between 2 and {len(order) - 1}", about="spec.degree")
    steps = [step for step in range(-degree // 2, degree // 2 + 1) if step]
    return {
        device: frozenset(order[(place + step) % len(order)] for step in steps) for place, device in enumerate(order)
    }


def graph_parameters(devices: int, corrupt: float, dropout: float, *, bits: int = SIGMA + GRINDING) -> GraphParameters:
    """The least degree and threshold for a session; the complete graph up to ``COMPLETE_UP_TO`` devices.

    >>> graph_parameters(1000, 0.1, 0.1), graph_parameters(20, 0.1, 0.1)
    (GraphParameters(degree=134, threshold=99), GraphParameters(degree=19, threshold=12))

    ``corrupt``: fraction of them that is corrupt, in [0, 1). ``dropout``: fraction of them that drops out in a round,
    in [0, 1). ``bits``: the session is insecure with probability at most 2^-``bits``. Raises ConfigError: a fraction is
    out of range, or no graph on so many devices is secure."""
    corrupt_devices, dropouts = count_of(devices, corrupt), count_of(devices, dropout)
    if devices <= COMPLETE_UP_TO:
        return GraphParameters(devices - 1, least_threshold(devices, corrupt))
    if devices - dropouts < quorum(devices, corrupt):
        raise ConfigError(
            f"{devices - dropouts} of {devices} devices are fewer than a quorum: lower the fractions",
            about="graph.parameters",
        )
    return _least(devices, dropouts, lambda k, t: is_secure(devices, corrupt_devices, k, t, bits))


def count_of(devices: int, fraction: float) -> int:
    """``fraction`` of ``devices`` as a count, rounded up: how many of a cohort may be corrupt, or may drop out.

    >>> count_of(10, 0.1), count_of(11, 0.1)
    (1, 2)

    Raises ConfigError: the fraction is not in [0, 1)."""
    if not 0 <= fraction < 1:
        raise ConfigError(f"fraction {fraction} is not in [0, 1)", about="graph.fraction")
    return math.ceil(fraction * devices - 1e-9)


def quorum(devices: int, corrupt: float) -> int:
    """The least size at which any two groups of devices have an honest device in common.

    Two groups of ``q`` devices have at least ``2 q - devices`` in common. If these are more than the corrupt devices,
    one of them is honest, and an honest device signs one survivor set in a round.

    >>> quorum(10, 0.1)
    6
    """
    return (devices + count_of(devices, corrupt)) // 2 + 1


def left_over(devices: int, corrupt: int, degree: int, threshold: int, survivors: int) -> int:
    """Fewest honest devices that a linear combination of two or more sums from one adapter leaves.

    The sums are over different survivor sets, each with a coefficient that is not zero. Each honest device reveals
    shares for one set (``client.node.adapterstate``), so the honest helpers of different sets are different devices.
    With h helpers of a set of s honest survivors, at least the sum of 2 h - s over all sets are in one set only, and
    no other sum cancels these (docs/explanation/threat-model.md). On the complete graph h is at least t - c, and s at
    most n - c. On a sparse one the s (t / (k + 1)) shares that each of k + 1 devices holds on average are of h + c
    devices, and s is at least the minimum of survivors less c. The value is twice the bound on 2 h - s.

    >>> left_over(8, 1, 7, 6, 6), left_over(8, 1, 7, 5, 5), left_over(1000, 100, 134, 99, 551)
    (6, 2, 20)

    n: ``devices`` on the roster, of which c may be ``corrupt``. k: ``degree``. t: ``threshold``. ``survivors``: fewest
    in a sum."""
    if degree >= devices - 1:
        return 2 * (2 * threshold - devices - corrupt)
    return 2 * max(0, survivors - corrupt) * (2 * threshold - degree - 1) // (degree + 1) - 4 * corrupt


def least_threshold(devices: int, corrupt: float) -> int:
    """The least threshold on the complete graph with which ``left_over`` is ``demanded`` or more.

    >>> least_threshold(4, 0.1), least_threshold(8, 0.1), least_threshold(12, 0.1), least_threshold(100, 0.1)
    (3, 6, 8, 56)
    """
    return (devices + count_of(devices, corrupt) + (demanded(devices) + 1) // 2 + 1) // 2


def demanded(devices: int) -> int:
    """Honest devices that the coordinator leaves in every combination of sums of a cohort. It does not know the
    devices' policies. Those that join a cohort of fewer than 8 devices have lower limits than the default ones."""
    return min(MINIMUM_SURVIVORS, devices // 2)


@functools.lru_cache(maxsize=1024)
def is_secure(devices: int, corrupt: int, degree: int, threshold: int, bits: int) -> bool:
    """Whether a session on a Harary graph fails with probability at most 2^-``bits``.

    A device's ``k`` neighbors and the device itself hold its shares; ``c`` of them are corrupt. Both its secrets can be
    reconstructed only if ``2 t <= k + 1 + c``. A part of the honest survivors can be unmasked only if the first device
    of that part in ring order has ``t`` holders that answer, although the honest ones among the ``k / 2`` before it are
    outside the part and do not answer: ``t - 1 - k / 2`` of these must be corrupt. The same holds after the last device
    of the part.

    >>> is_secure(1000, 100, 134, 99, 80), is_secure(1000, 100, 134, 98, 80)
    (True, False)

    ``corrupt``: how many of them may be corrupt; the whole roster, or more, is never secure. ``degree``: neighbors of a
    device, k; an odd degree is never secure. ``threshold``: shares that reconstruct a secret, t."""
    if corrupt >= devices:  # a roster may be smaller than the part of the cohort that is assumed corrupt
        return False
    both = devices * hypergeometric_tail(devices - 1, corrupt, degree, 2 * threshold - degree - 1)
    split = _two_windows(devices, corrupt, degree // 2, threshold - 1 - degree // 2)
    return degree % 2 == 0 and max(both, split) <= 2.0**-bits


def hypergeometric_tail(population: int, marked: int, drawn: int, least: int) -> float:
    """P[at least ``least`` of ``drawn`` are marked], drawing without replacement; exact up to the final division.

    >>> hypergeometric_tail(4, 2, 2, 1)  # 1 - C(2, 2) / C(4, 2)
    0.8333333333333334

    ``least``: any integer; 0 or less gives 1, more than can be drawn gives 0."""
    first, last = max(least, 0, drawn + marked - population), min(marked, drawn)
    ways = sum(math.comb(marked, i) * math.comb(population - marked, drawn - i) for i in range(first, last + 1))
    return ways / math.comb(population, drawn)


def _two_windows(devices: int, marked: int, width: int, least: int) -> float:
    """Bounds P[two disjoint windows of the ring, ``width`` places each, have ``least`` marked devices each]. The more
    marked devices one window has, the fewer has the other (negative association): the product bounds both."""
    if 2 * least > marked:
        return 0.0
    return math.comb(devices, 2) * hypergeometric_tail(devices, marked, width, least) ** 2


def _can_finish(devices: int, dropouts: int, k: int, t: int) -> bool:
    """Whether every device keeps ``t`` neighbors, except with probability 2^-``ETA``."""
    return devices * hypergeometric_tail(devices - 1, dropouts, k, k - t + 1) <= 2.0**-ETA


def _least(devices: int, dropouts: int, secure: Callable[[int, int], bool]) -> GraphParameters:
    for k in range(2, devices, 2):
        thresholds = range(k // 2 + 1, k + 1)
        if _can_finish(devices, dropouts, k, thresholds[0]):
            # A higher threshold is more secure and less likely to finish: the least secure one decides.
            least = bisect.bisect_left(thresholds, True, key=functools.partial(secure, k))
            if least < len(thresholds) and _can_finish(devices, dropouts, k, thresholds[least]):
                return GraphParameters(k, thresholds[least])
    raise ConfigError(
        f"no graph on {devices} devices is secure with so many corrupt devices and dropouts: lower the fractions",
        about="graph.parameters",
    )
