"""Keys in files: made once, for their owner only, and read strictly."""

import os
from pathlib import Path

import pytest

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, TrustError
from aggregation.pki.identity import IdentityKey
from edgeadapt.formats.keyfiles import make_key, read_key, read_public_keys
from tests.support import refused


def test_a_new_key_is_for_its_owner_only_and_its_public_half_for_everyone(tmp_path: Path) -> None:
    key, public = make_key(tmp_path / "new" / "vendor.pem", SystemEntropy())
    assert public == tmp_path / "new" / "vendor.pub.pem"
    modes = {path.name: path.stat().st_mode & 0o777 for path in public.parent.iterdir()}
    assert modes == {"vendor.pem": 0o600, "vendor.pub.pem": 0o644}
    assert read_key(tmp_path / "new" / "vendor.pem") == key
    assert read_public_keys(public) == (key.public,)


@pytest.mark.parametrize("existing", ["vendor.pem", "vendor.pub.pem"])
def test_a_key_is_never_replaced(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_bytes(b"old")
    with refused(ConfigError, existing):
        make_key(tmp_path / "vendor.pem", SystemEntropy())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {existing: b"old"}


@pytest.mark.parametrize("full", ["vendor.pem", "vendor.pub.pem"])
def test_a_full_disk_leaves_no_key_and_the_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    def sync(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").resolve().name == full:
            raise OSError(28, "No space left on device")  # as a write does, which has no name

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match=rf"No space left.*/{full}"):
        make_key(tmp_path / "vendor.pem", SystemEntropy())
    assert list(tmp_path.iterdir()) == []


def test_a_missing_key_is_named_with_the_remedy(tmp_path: Path) -> None:
    with refused(ConfigError, "vendor.pem") as caught:
        read_key(tmp_path / "vendor.pem")
    assert "edgeadapt bundle key" in str(caught.value)
    with refused(ConfigError, "trust.pem") as caught:
        read_public_keys(tmp_path / "trust.pem")
    assert "--trust" in str(caught.value)


def test_several_public_keys_are_read_in_order(tmp_path: Path) -> None:
    keys = [IdentityKey.generate(SystemEntropy()).public for _ in range(3)]
    (tmp_path / "trust.pem").write_bytes(b"\n".join(key.to_pem() for key in keys) + b"\n")
    assert read_public_keys(tmp_path / "trust.pem") == tuple(keys)


def test_a_damaged_and_a_private_key_are_refused_with_the_files_name(tmp_path: Path) -> None:
    path, key = tmp_path / "trust.pem", IdentityKey.generate(SystemEntropy())
    for raw in (key.to_pem(), b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"):
        path.write_bytes(raw)
        with pytest.raises(TrustError) as caught:
            read_public_keys(path)
        assert str(path) in str(caught.value)
    path.write_bytes(key.public.to_pem())
    with pytest.raises(TrustError) as caught:
        read_key(path)
    assert str(path) in str(caught.value)


def test_a_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "trust.pem").write_bytes(bytes(2**16 + 1))
    with refused(DataError, "trust.pem"):
        read_public_keys(tmp_path / "trust.pem")
