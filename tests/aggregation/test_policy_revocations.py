"""What a device's policy says of the authority's revocation list: having none, and how old it may be."""

import datetime as dt
from typing import Any

import pytest

from aggregation.errors import ConfigError, ProtocolError
from aggregation.pki import Authority
from aggregation.pki.revocation import RevocationList
from aggregation.policy import Policy
from tests.support import refused

BEGIN = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)


@pytest.fixture
def revoked(entropy: Any) -> RevocationList:
    authority = Authority.create("fleet", entropy, BEGIN, BEGIN + 365 * DAY)
    return authority.revocations(1, {}, BEGIN, BEGIN + 30 * DAY)


def test_a_device_that_requires_a_revocation_list_joins_no_session_without_one() -> None:
    Policy().check_revocations(None, BEGIN)
    with refused(ProtocolError, "offer.revocations"):
        Policy(revocation_days=7).check_revocations(None, BEGIN)


def test_a_withheld_revocation_list_grows_too_old(revoked: RevocationList) -> None:
    Policy(revocation_days=7).check_revocations(revoked, BEGIN + 7 * DAY)
    with refused(ProtocolError, "offer.revocations"):
        Policy(revocation_days=7).check_revocations(revoked, BEGIN + 8 * DAY)


def test_a_revocation_list_is_not_valid_after_its_own_end(revoked: RevocationList) -> None:
    for days in (0, 365):
        Policy(revocation_days=days).check_revocations(revoked, BEGIN + 30 * DAY)
        with refused(ProtocolError, "offer.revocations"):
            Policy(revocation_days=days).check_revocations(revoked, BEGIN + 31 * DAY)


def test_a_negative_age_of_the_revocation_list_is_refused() -> None:
    with refused(ConfigError, "policy.revocation_days"):
        Policy(revocation_days=-1)
