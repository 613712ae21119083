"""Which devices a federation's status names because of their groups."""

from dataclasses import replace

import numpy as np

from aggregation.groups import deal
from aggregation.pki.identity import IdentityKey
from coordinator.status import farthest
from edgeadapt.formats.roundrecord import GroupRecord, RoundRecord
from tests.support.registry import Rounds

NAMES = [f"device-{number:02d}" for number in range(30)]


def rounds(count: int, liar: str, seed: int = 1) -> list[RoundRecord]:
    """Rounds of five groups, of which that with the liar is the farthest."""
    record, rng = Rounds(IdentityKey(bytes(32))).record(1), np.random.default_rng(seed)
    found = []
    for number in range(count):
        dealt = deal(f"{number:064x}", NAMES, 5)
        members = [tuple(name for name in NAMES if dealt[name] == each) for each in range(5)]
        groups = tuple(GroupRecord(each, float(rng.uniform(1, 2)) + 9 * (liar in each)) for each in members)
        found.append(replace(record, round=number + 1, groups=groups))
    return found


def test_the_device_that_is_always_in_the_farthest_group_is_named_first() -> None:
    found = farthest(rounds(12, NAMES[7]))
    assert next(iter(found)) == NAMES[7]
    assert found[NAMES[7]] == {"rounds": 12, "farthest": 12, "chance": 0.2**12}
    assert len(found) <= 3  # by chance, some are often with it


def test_without_a_liar_as_many_are_named_as_chance_has_it() -> None:
    named = sum(len(farthest(rounds(40, "nobody", seed))) for seed in range(20))
    assert named < 20 * len(NAMES) * 0.01 * 2
