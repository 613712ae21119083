"""Signing keys on disk: made once, readable by their owner alone, never replaced.

The private half signs cards and sidecars; the public half is what devices pin in their ``trust.pem``.
"""

from pathlib import Path

from adapters.storage import PRIVATE, PUBLIC, create
from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, TrustError, of_file
from aggregation.pki.identity import IdentityKey, PublicKey

MAX_PEM = 2**16  # bytes
PEM_END = b"-----END PUBLIC KEY-----"


def make_key(path: Path, entropy: Entropy) -> tuple[IdentityKey, Path]:
    """Write a new key to ``path``, its public half beside it, and return the key and the place of the public half.

    Raises:
        ConfigError: One of the two files is there already: whoever pinned the old key could not verify the new one's
            signatures.
        OSError: The folder cannot be written. Neither file is there then.
    """
    public = path.with_name(f"{path.stem}.pub.pem")
    key = IdentityKey.generate(entropy)
    path.parent.mkdir(parents=True, exist_ok=True)
    _create(path, key.to_pem(), PRIVATE)
    try:
        _create(public, key.public.to_pem(), PUBLIC)
    except BaseException:
        path.unlink()
        raise
    return key, public


def read_key(path: Path) -> IdentityKey:
    """The private key in ``path``.

    Raises:
        ConfigError: There is no such file.
        TrustError: It is no Ed25519 key in PEM form.
    """
    raw = _read(path, "make one with 'edgeadapt export key'")
    with of_file(path):
        return IdentityKey.from_pem(raw)


def public_keys(path: Path) -> tuple[PublicKey, ...]:
    """The public keys in ``path``, one after the other in PEM form, or the public half of a private one.

    Raises:
        ConfigError: There is no such file.
        TrustError: It holds anything else.
    """
    raw = _read(path, "name the public keys that you trust with --trust")
    if b"PRIVATE KEY" in raw:
        return (IdentityKey.from_pem(raw).public,)
    parts = raw.split(PEM_END)
    if parts.pop().strip() or not parts:
        raise TrustError(f"{path} is not a list of public keys in PEM form", about=path.name)
    return tuple(PublicKey.from_pem(part.strip() + b"\n" + PEM_END + b"\n") for part in parts)


def _read(path: Path, hint: str) -> bytes:
    if not path.is_file():
        raise ConfigError(f"there is no key at {path}: {hint}", about=path.name)
    with path.open("rb") as file:
        return file.read(MAX_PEM)


def _create(path: Path, content: bytes, mode: int) -> None:
    try:
        create(path, content, mode)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists, and keys are not replaced: name a new file", about=path.name) from error
