"""An authority in a folder, with its key unlocked."""

from pathlib import Path

import pytest

from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority
from aggregation.pki.identity import IdentityKey
from aggregation.pki.revocation import RevocationList
from edgeadapt.authority import AuthorityStore

PASSPHRASE = b"correct horse battery"


def new_key() -> IdentityKey:
    return IdentityKey.generate(SystemEntropy())


def newest_list(store: AuthorityStore) -> RevocationList:
    return store.root.revocations((store.folder / "revoked.crl").read_bytes())


@pytest.fixture
def store(tmp_path: Path) -> AuthorityStore:
    return AuthorityStore.create(tmp_path / "authority", "fleet", 3650, 30, None)


@pytest.fixture
def signer(store: AuthorityStore) -> Authority:
    return store.unlock(None)
