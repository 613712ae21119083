"""Contradictory specs, and offers that a device's policy refuses."""

import datetime as dt
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation import graph
from aggregation.errors import ConfigError, ProtocolError
from aggregation.pki import Authority, RevocationList
from aggregation.policy import Policy
from aggregation.privacy.accounting import Mechanism
from aggregation.spec import CORRUPT_FRACTION, MAX_ROUNDS, Adversary, Privacy
from tests.support import refused

SpecOf = Callable[..., Any]
BEGIN = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)


def policy(spec: Any, **changes: Any) -> Policy:
    return Policy(**{"known_bases": frozenset({spec.base_digest}), **changes})


@given(devices=st.integers(3, 2000))
def test_the_default_threshold_is_the_least_that_the_default_policy_accepts(devices: int) -> None:
    t, corrupt = graph.least_threshold(devices, CORRUPT_FRACTION), graph.count_of(devices, Policy().corrupt_fraction)
    least = min(Policy().minimum_survivors, devices // 2)  # devices that join fewer than 8 have a lower limit
    assert 2 * t > devices + corrupt
    assert 2 * (2 * t - devices - corrupt) >= least > 2 * (2 * (t - 1) - devices - corrupt)
    assert t <= devices


def test_a_safe_offer_is_accepted_with_default_limits(spec_of: SpecOf) -> None:
    spec = spec_of(10)
    policy(spec).check(spec, 10)


def test_the_smallest_default_cohort_guarantees_the_default_minimum_of_survivors(spec_of: SpecOf) -> None:
    cohort = Policy().minimum_cohort
    corrupt = graph.count_of(cohort, Policy().corrupt_fraction)
    assert Policy().minimum_survivors <= graph.least_threshold(cohort, CORRUPT_FRACTION) - corrupt
    policy(spec_of(cohort)).check(spec_of(cohort), cohort)


@pytest.mark.parametrize("corrupt_fraction", [0.0, 0.1, 0.25])
def test_the_minimum_of_survivors_counts_honest_devices(spec_of: SpecOf, corrupt_fraction: float) -> None:
    corrupt = graph.count_of(20, corrupt_fraction)
    limits = {"minimum_cohort": 20, "minimum_survivors": 17 - corrupt, "corrupt_fraction": corrupt_fraction}
    accepting = policy(spec_of(20), **limits)
    accepting.check(spec_of(20, threshold=16, minimum_survivors=17), 20)
    with refused(ProtocolError, "offer.minimum_survivors", peer="coordinator", value=16):
        accepting.check(spec_of(20, threshold=16, minimum_survivors=16), 20)


def test_a_small_fleet_with_lower_limits_joins(spec_of: SpecOf) -> None:
    """3 devices of which none is corrupt: two sums over two of them have a helper in common, or leave two devices."""
    limits = {"minimum_cohort": 3, "minimum_survivors": 2, "corrupt_fraction": 0.0}
    spec = spec_of(3, threshold=2, minimum_survivors=2)
    policy(spec, **limits).check(spec, 3)
    with refused(ProtocolError, "offer.combined", peer="coordinator", value=2):
        policy(spec, **{**limits, "minimum_survivors": 3}).check(spec, 3)


def test_an_offer_at_the_limits_is_accepted(spec_of: SpecOf) -> None:
    spec = spec_of(10)
    bits = spec.vector.ring_bits
    policy(
        spec, minimum_cohort=10, minimum_ring_bits=bits, maximum_ring_bits=bits, maximum_weight=100, maximum_rounds=3
    ).check(spec, 10)
    Policy(minimum_ring_bits=1, maximum_ring_bits=1)


@pytest.mark.parametrize(
    ("changes", "limits", "cohort", "about"),
    [
        ({}, {}, 7, "offer.cohort"),
        ({"threshold": 5, "minimum_survivors": 5}, {}, 10, "offer.threshold"),
        ({"threshold": 10, "minimum_survivors": 10}, {}, 9, "offer.threshold"),
        ({"threshold": 6, "minimum_survivors": 6}, {}, 10, "offer.combined"),
        ({}, {"corrupt_fraction": 0.3}, 10, "offer.combined"),
        ({}, {"corrupt_fraction": 0.4}, 10, "offer.threshold"),
        ({}, {"corrupt_fraction": 0}, 11, "offer.max_clients"),
        ({"vector": None}, {"corrupt_fraction": 0}, 11, "offer.degree"),
        ({"adversary": Adversary.HONEST_BUT_CURIOUS}, {}, 10, "offer.adversary"),
        ({"base_digest": "0" * 64}, {"known_bases": frozenset({"1" * 64})}, 10, "offer.base_digest"),
        ({"weight_cap": 2**20}, {}, 10, "offer.weight_cap"),
        ({"rounds": 65}, {}, 10, "offer.rounds"),
        ({}, {"minimum_ring_bits": 25}, 10, "offer.ring_bits"),
        ({}, {"maximum_ring_bits": 23}, 10, "offer.ring_bits"),
    ],
)
def test_an_offer_against_the_policy_is_refused_with_its_reason(
    spec_of: SpecOf,
    vector_of: Callable[..., Any],
    changes: dict[str, Any],
    limits: dict[str, Any],
    cohort: int,
    about: str,
) -> None:
    if "vector" in changes:
        changes = {"vector": vector_of(20)}
    spec = spec_of(10, **changes)
    with refused(ProtocolError, about, peer="coordinator"):
        policy(spec, **limits).check(spec, cohort)


def test_a_device_without_a_known_base_joins_no_session(spec_of: SpecOf) -> None:
    with refused(ProtocolError, "offer.base_digest", peer="coordinator"):
        Policy().check(spec_of(10), 10)


@pytest.mark.parametrize(
    "limits",
    [
        {"minimum_cohort": 2},
        {"minimum_survivors": 1},
        {"minimum_survivors": 8},  # of 8 devices 1 may be corrupt
        {"minimum_cohort": 4},
        {"corrupt_fraction": 1.0},
        {"corrupt_fraction": -0.1},
        {"minimum_ring_bits": 0},
        {"minimum_ring_bits": 40, "maximum_ring_bits": 30},
        {"maximum_ring_bits": 65},
    ],
)
def test_a_policy_that_protects_nobody_cannot_be_constructed(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Policy(**limits)


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 0},
        {"rounds": 10_000},
        {"threshold": 1},
        {"threshold": 11},
        {"minimum_survivors": 5},
        {"minimum_survivors": 11},
        {"degree": 3},
        {"degree": 10},
        {"clip_norm": 0.0},
        {"clip_norm": float("nan")},
        {"clip_norm": float("inf")},
        {"weight_cap": 0},
        {"weight_cap": 2**32 + 1},
        {"rounds": MAX_ROUNDS + 1},
        {"privacy": Privacy(Mechanism.SKELLAM, 3, 1e-6)},
        {"base_digest": "AB" * 32},
        {"base_digest": "ab"},
        {"layout_digest": ""},
    ],
)
def test_a_spec_that_contradicts_itself_cannot_be_constructed(spec_of: SpecOf, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        spec_of(10, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 1},
        {"rounds": MAX_ROUNDS},
        {"threshold": 2, "minimum_survivors": 2},
        {"threshold": 10, "minimum_survivors": 10},
        {"weight_cap": 1},
        {"weight_cap": 2**32},
    ],
)
def test_a_spec_at_its_limits_can_be_constructed(spec_of: SpecOf, changes: dict[str, Any]) -> None:
    spec_of(10, **changes)


# Revocation lists


@pytest.fixture
def revoked(entropy: Any) -> RevocationList:
    authority = Authority.create("fleet", entropy, BEGIN, BEGIN + 365 * DAY)
    return authority.revocations(1, {}, BEGIN, BEGIN + 30 * DAY)


def test_a_device_that_requires_a_revocation_list_joins_no_session_without_one() -> None:
    Policy().check_revocations(None, BEGIN)
    with refused(ProtocolError, "offer.revocations", peer="coordinator"):
        Policy(revocation_days=7).check_revocations(None, BEGIN)


def test_a_withheld_revocation_list_grows_too_old(revoked: RevocationList) -> None:
    Policy(revocation_days=7).check_revocations(revoked, BEGIN + 7 * DAY)
    with refused(ProtocolError, "offer.revocations.age", value=1):
        Policy(revocation_days=7).check_revocations(revoked, BEGIN + 8 * DAY)


def test_a_revocation_list_is_not_valid_after_its_own_end(revoked: RevocationList) -> None:
    for days in (0, 365):
        Policy(revocation_days=days).check_revocations(revoked, BEGIN + 30 * DAY)
        with refused(ProtocolError, "offer.revocations.next-update", value=1):
            Policy(revocation_days=days).check_revocations(revoked, BEGIN + 31 * DAY)


def test_a_negative_age_of_the_revocation_list_is_refused() -> None:
    with refused(ConfigError, "policy.revocation_days", value=-1):
        Policy(revocation_days=-1)
