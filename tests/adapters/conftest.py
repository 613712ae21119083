"""Keys for tests of signed documents."""

import pytest

from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey


@pytest.fixture(scope="session")
def key() -> IdentityKey:
    """The signer that is trusted."""
    return IdentityKey.generate(SystemEntropy())


@pytest.fixture(scope="session")
def stranger() -> IdentityKey:
    """A signer that is not."""
    return IdentityKey.generate(SystemEntropy())
