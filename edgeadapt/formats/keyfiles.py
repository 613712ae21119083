"""Keys in files, all in PEM form: Ed25519 signing keys, which are never replaced, lists of trusted public keys, and the
TLS key of a state directory with its certificate, which both are replaced."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, EdgeAdaptError, TrustError, of_file
from aggregation.pki.certificates import load, to_der
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.pki.tls import TlsKey
from edgeadapt.formats.storage import PRIVATE, PUBLIC, create, locked, read

MAX_PEM = 2**16  # bytes
TLS_KEY, NEXT_TLS_KEY, TLS_CERTIFICATE = "tls.key", "next.tls.key", "tls.pem"  # in a state directory
TLS_LOCK = "tls.lock"  # held while one of the two keys is replaced
PATIENCE = 10.0  # seconds for that lock
# Stricter than RFC 7468, which permits text before a key: two readers of the file must see the same keys.
_BLOCK = re.compile(rb"-----BEGIN PUBLIC KEY-----[A-Za-z0-9+/=\s]*-----END PUBLIC KEY-----")


def make_key(path: Path, entropy: Entropy) -> tuple[IdentityKey, Path]:
    """Write a new signing key to ``path`` and its public half to ``NAME.pub.pem``; return the key and the second path.
    Raises ConfigError: one of the two files exists. Who pinned the old key could not verify what the new one signs;
    OSError: the folder cannot be written. Neither file is left."""
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
    """Read the signing key in ``path``. Raises ConfigError if it is missing, TrustError for other content."""
    raw = _read(path, "make one with 'edgeadapt bundle key'")
    with of_file(path):
        return IdentityKey.from_pem(raw)


def read_public_keys(path: Path) -> tuple[PublicKey, ...]:
    """Read the public keys in ``path``: at least one, in PEM form, and nothing else. Raises as ``read_key``."""
    raw = _read(path, "name the public keys that you trust with --trust")
    blocks = _BLOCK.findall(raw)
    if not blocks or _BLOCK.sub(b"", raw).strip():
        raise TrustError(f"{path} is not a list of public keys in PEM form", about=path.name)
    with of_file(path):
        return tuple(PublicKey.from_pem(block + b"\n") for block in blocks)


def tls_pair(folder: Path, remedy: str, *, rename: bool = True) -> tuple[TlsKey, bytes]:
    """Read the TLS key in a state directory, which has ``TLS_CERTIFICATE``, and that certificate, PEM.

    The next key is in a file of its own until the certificate for it has replaced the old one; the key that belongs to
    the certificate is then the right one. So a kill at any instant leaves a pair. ``remedy``: what to do if they do not
    belong to each other. ``rename``: let the next key have the name of the one in use once it is. Raises TrustError: a
    file is damaged, or no key belongs to the certificate."""
    name, key, certificate = _certified(folder)
    if name != TLS_KEY:  # the next one; or none, as another process may just have renamed that
        with suppress(OSError), locked(folder / TLS_LOCK, timeout=PATIENCE):  # a folder that cannot be written
            name, key, certificate = (_renamed if rename else _certified)(folder)
    if key is None:
        raise TrustError(f"{folder / TLS_CERTIFICATE} is not for the key in {TLS_KEY}: {remedy}", about=TLS_KEY)
    return key, certificate


def tls_key_path(folder: Path) -> Path:
    """Locate the key that ``tls_pair`` reads. Raises as ``tls_pair``."""
    return folder / (_certified(folder)[0] or TLS_KEY)


@contextmanager
def next_tls_key(folder: Path) -> Iterator[Path]:
    """Yield where to write the next TLS key of a state directory, while no other process replaces a key. Raises
    ConfigError: the key there is in use, and could not be renamed; TimeoutError: another process replaces a key, and
    does not end."""
    with locked(folder / TLS_LOCK, timeout=PATIENCE):
        if not (folder / TLS_CERTIFICATE).exists():
            yield folder / TLS_KEY
            return
        used = ""
        with suppress(EdgeAdaptError):  # a damaged certificate is for no key
            used, _, _ = _renamed(folder)
        if used == NEXT_TLS_KEY:
            text = f"the key in use is {folder / NEXT_TLS_KEY}: put it in the place of {TLS_KEY} first"
            raise ConfigError(f"{text}, or the next one would replace it", about=NEXT_TLS_KEY)
        yield folder / NEXT_TLS_KEY


def _renamed(folder: Path) -> tuple[str, TlsKey | None, bytes]:
    """Return ``_certified`` after the next key has got its name if it is the right one; call it under the lock."""
    name, key, certificate = _certified(folder)
    if name == NEXT_TLS_KEY:
        with suppress(OSError):  # as in a container, where the old key is a file of its own
            (folder / NEXT_TLS_KEY).replace(folder / TLS_KEY)
            name = TLS_KEY
    return name, key, certificate


def _certified(folder: Path) -> tuple[str, TlsKey | None, bytes]:
    """Return name and content of the file with the certified key, and the certificate; no name without such a file."""
    certificate = read(folder / TLS_CERTIFICATE, MAX_PEM)
    with of_file(folder / TLS_CERTIFICATE):
        certified = load(to_der(certificate)).public_key()
    damaged = None
    for name in (TLS_KEY, NEXT_TLS_KEY):
        try:
            with of_file(folder / name):
                key = TlsKey(read(folder / name, MAX_PEM))
        except (FileNotFoundError, IsADirectoryError):
            continue
        except EdgeAdaptError as error:
            damaged = damaged or error
            continue
        if key.public() == certified:
            return name, key, certificate
    if damaged is not None:
        raise damaged
    return "", None, certificate


def _read(path: Path, remedy: str) -> bytes:
    if not path.is_file():
        raise ConfigError(f"there is no key at {path}: {remedy}", about=path.name)
    return read(path, MAX_PEM)


def _create(path: Path, content: bytes, mode: int) -> None:
    try:
        create(path, content, mode)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists, and keys are not replaced: name a new file", about=path.name) from error
