"""Keys for tests of signed documents."""

import pytest

from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey


@pytest.fixture(scope="session")
def key() -> IdentityKey:
    return IdentityKey.generate(SystemEntropy())


@pytest.fixture(scope="session")
def stranger() -> IdentityKey:
    return IdentityKey.generate(SystemEntropy())
