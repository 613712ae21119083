"""Blobs under their content address, on any file system that fsspec knows: a folder by default, or a bucket. A blob is
written whole or not at all, and ``get`` returns only bytes that have the digest in their name. Signed manifests say
what a blob is. The keys of a bucket come from where boto takes them, never from an address."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fsspec.core import url_to_fs

from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError
from edgeadapt.formats.registryfiles import blob_name
from edgeadapt.formats.storage import flush, sync

LARGEST = 2**30  # bytes
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "az"}  # have no folders; making one could make a bucket
# Seconds, and attempts, which s3fs repeats. By default a store that does not answer is an error after 15 minutes.
PATIENCE = {"connect_timeout": 10, "read_timeout": 30, "retries": {"mode": "standard", "total_max_attempts": 1}}


@dataclass(frozen=True, slots=True)
class Blobs:
    """Stores blobs in a folder. ``get(put(blob)) == blob``. Methods raise EdgeAdaptError if the store cannot be
    reached, read or written to; the other blobs are unchanged."""

    fs: Any  # fsspec ships no types
    root: str

    @classmethod
    def at(cls, url: str) -> Self:
        """Open the folder or bucket at ``url``, to read from. Raises ConfigError: fsspec has no file system of that
        kind, its package is not installed, or the address has a secret, which the error does not show."""
        scheme, _, rest = url.partition("://")
        if rest and "@" in rest.partition("/")[0]:
            text = "the blob store's address has keys in it: leave them out, and set them as boto takes them"
            raise ConfigError(text, about="blobs.url")
        options: dict[str, Any] = {"use_listings_cache": False} if scheme in OBJECT_STORES else {}
        if scheme in ("s3", "s3a"):
            options["config_kwargs"] = PATIENCE
        try:
            fs, root = url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"the blob store's address is not usable: {error}", about="blobs.url") from error
        except OSError as error:  # some file systems connect at once
            raise EdgeAdaptError(f"blob store {url} cannot be opened: {error}", about="blobs.url") from error
        return cls(fs, root.rstrip("/") or root)

    @classmethod
    def open(cls, url: str) -> Self:
        """Open it as ``at`` does, and create the folder if it is missing. A bucket is never created."""
        blobs = cls.at(url)
        if not blobs._is_bucket:
            with blobs._explained("cannot be opened"):
                blobs.fs.makedirs(blobs.root, exist_ok=True)
        return blobs

    def put(self, blob: bytes) -> str:
        """Store ``blob`` and return its digest. After the return it survives a power cut. It is written to a temporary
        name and moved to its place; a kill leaves at most a file that ends in ``.part``. A bucket takes an object whole
        or not at all."""
        digest = hashlib.sha256(blob).hexdigest()
        place = self._place(digest)
        with self._explained("cannot be written to; nothing was changed"):
            if self._is_bucket:
                self.fs.pipe_file(place, blob)
                return digest
            try:
                self._write(f"{place}.part", blob)
                self.fs.mv(f"{place}.part", place)
                if self._is_local:
                    sync(Path(self.root))  # a move is durable only then
            except OSError:
                with suppress(OSError):
                    self.fs.rm(f"{place}.part")
                raise
        return digest

    @contextmanager
    def reserved(self, blob: bytes) -> Iterator[None]:
        """Hold the space of a blob of that size: what is written after the block finds it. A bucket has the space. It
        must be there, and take an object, which stays and is empty."""
        place = f"{self.root}/reserved.part"
        if self._is_bucket:
            with self._explained("cannot be written to; nothing was changed"):
                self.fs.pipe_file(place, b"")
            yield
            return
        try:
            with self._explained("cannot be written to; nothing was changed"):
                self._write(place, blob)
            yield
        finally:
            with suppress(OSError):
                self.fs.rm(place)

    def get(self, digest: str) -> bytes:
        """Read the blob of that digest. Raises DataError if it is missing, TrustError for other content."""
        blob = self.read(digest)
        if hashlib.sha256(blob).hexdigest() != digest:
            raise TrustError(f"blob {digest} in {self.name} was altered: restore it from a copy", about="blob")
        return blob

    def read(self, digest: str, size: int | None = None) -> bytes:
        """Read what has that digest's name, unverified; empty if it is too large or does not have that size. Raises
        DataError if it is missing."""
        place = self._place(digest)
        with self._explained("cannot be read"):
            try:
                stored = self.fs.size(place)
                blob: bytes = self.fs.cat_file(place) if stored <= LARGEST and size in (None, stored) else b""
            except FileNotFoundError as error:
                reason = f"blob {digest} is missing from {self.name}: restore it from a copy"
                raise DataError(reason, about="blob") from error
        return blob

    @property
    def name(self) -> str:
        return str(self.fs.unstrip_protocol(self.root))

    @property
    def _is_local(self) -> bool:
        return "file" in self._protocols

    @property
    def _is_bucket(self) -> bool:
        return not OBJECT_STORES.isdisjoint(self._protocols)

    @property
    def _protocols(self) -> tuple[str, ...]:
        protocol: str | tuple[str, ...] = self.fs.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def _place(self, digest: str) -> str:
        return f"{self.root}/{blob_name(digest)}"

    def _write(self, path: str, blob: bytes) -> None:
        with self.fs.open(path, "wb") as file:
            file.write(blob)
            if self._is_local:
                flush(file)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except EdgeAdaptError:
            raise
        except Exception as error:  # a client of a store has errors of its own: those of boto have no common base
            if isinstance(error, MemoryError):
                raise
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise EdgeAdaptError(f"blob store {self.name} {what}: {reason}", about="blobs") from error
