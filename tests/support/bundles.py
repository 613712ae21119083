"""Bundles that are altered as an attacker, or someone with a signing key, could alter them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from aggregation.pki.identity import IdentityKey
from edgeadapt.formats import container
from edgeadapt.formats.bundle import BASE_MANIFEST, adapter_path, manifest_path
from edgeadapt.formats.files import sha256
from edgeadapt.formats.manifest import AdapterManifest, BaseManifest


def flip(path: Path, where: float) -> None:
    """Flip the lowest bit of the byte at this fraction of a file."""
    raw = bytearray(path.read_bytes())
    raw[int(where * (len(raw) - 1))] ^= 1
    path.write_bytes(raw)


def stated(bundle: Path, name: str = "global") -> AdapterManifest:
    """What an adapter's manifest states, whoever signed it."""
    return AdapterManifest.unverified((bundle / manifest_path(name)).read_bytes())


def resign(bundle: Path, key: IdentityKey, name: str = "global", /, **changes: Any) -> None:
    """Write an adapter's manifest again with other values."""
    path = bundle / manifest_path(name)
    path.write_bytes(replace(AdapterManifest.unverified(path.read_bytes()), **changes).sign(key))


def resign_base(bundle: Path, key: IdentityKey, **changes: Any) -> None:
    """Write the base manifest again with other values."""
    path = bundle / BASE_MANIFEST
    path.write_bytes(replace(BaseManifest.unverified(path.read_bytes()), **changes).sign(key))


def resign_file(bundle: Path, key: IdentityKey, stored: dict[str, Any], name: str = "global", **changes: Any) -> None:
    """Write an adapter's file with these tensors, and its manifest with the file's size and digest."""
    blob = container.pack(stored)
    (bundle / adapter_path(name)).write_bytes(blob)
    resign(bundle, key, name, sha256=sha256(blob), size=len(blob), **changes)


LENGTHS: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda raw: raw[:-1],
    "trailing": lambda raw: raw + b"\0",
    "empty": lambda _: b"",
    "oversized": lambda raw: raw + bytes(2**21),
}
"""How a file can have another length."""
