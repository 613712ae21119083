"""The record of a round holds any round that a session can have."""

import pytest

from aggregation.messages import MAX_COHORT
from aggregation.pki.identity import IdentityKey
from aggregation.steps import Step
from edgeadapt.formats.dsse import MAX_ENVELOPE
from edgeadapt.formats.roundrecord import RoundRecord

KEY = IdentityKey(bytes(range(32)))
LONGEST = tuple(f"{number:064}" for number in range(MAX_COHORT))  # of the names that a certificate can have


@pytest.fixture
def record() -> RoundRecord:
    """Every device of the largest cohort is among the survivors, and dropped out after its update arrived."""
    step = max((step.value for step in Step), key=len)
    return RoundRecord(
        round=1,
        previous=None,
        offer="0" * 64,
        plan="0" * 64,
        entries=2**40,
        root="0" * 64,
        survivors=LONGEST,
        groups=(),
        dropped=dict.fromkeys(LONGEST, step),
        blamed=(),
        reason=None,
        aborted=None,
        spoiled=None,
        sum="0" * 64,
        version=1,
        adapter="0" * 64,
        optimizer="0" * 64,
        bytes_up=2**40,
        bytes_down=2**40,
        seconds=1.5,
        epsilon=None,
        metrics={"accuracy": 0.5, "loss": 0.5},
    )


def test_the_largest_cohort_with_the_longest_names_fits_into_a_record(record: RoundRecord) -> None:
    raw = record.sign(KEY)
    assert RoundRecord.accept(raw, [KEY.public]) == record
    assert MAX_ENVELOPE / 4 < len(raw) < MAX_ENVELOPE / 1.5
