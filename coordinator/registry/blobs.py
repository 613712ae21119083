"""Blobs under their content address, on any file system that fsspec knows: a folder by default.

A blob is written whole or not at all, and ``get`` returns only bytes that have the digest in their name. Signed
manifests say what a blob is.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from adapters.files import sha256
from adapters.registryfiles import blob_name
from adapters.storage import flush, sync
from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError


@dataclass(frozen=True, slots=True)
class Blobs:
    """A folder of blobs. ``get(put(blob)) == blob``."""

    fs: Any  # fsspec ships no types
    root: str

    @classmethod
    def open(cls, url: str) -> Self:
        """Open the folder at ``url``, and create it if it is missing.

        Raises:
            ConfigError: fsspec has no file system of that kind, or its package is not installed.
            EdgeAdaptError: The folder cannot be created.
        """
        try:
            fs, root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"the blob store's address is not usable: {error}", about="blobs.url", value=url
            ) from error
        blobs = cls(fs, root.rstrip("/") or root)
        with blobs._explained("cannot be opened"):
            fs.makedirs(blobs.root, exist_ok=True)
        return blobs

    def put(self, blob: bytes) -> str:
        """Store ``blob`` and return its digest. After the return it survives a power cut.

        It is written to a temporary name and moved to its place; a kill leaves at most a file that ends in ``.part``.

        Raises:
            EdgeAdaptError: The folder is full or cannot be written to. The other blobs are unchanged.
        """
        digest = sha256(blob)
        place = self._place(digest)
        with self._explained("cannot be written to; nothing was changed"):
            try:
                self._write(f"{place}.part", blob)
                self.fs.mv(f"{place}.part", place)
                self._settle()
            except OSError:
                with suppress(OSError):
                    self.fs.rm(f"{place}.part")
                raise
        return digest

    @contextmanager
    def reserved(self, blob: bytes) -> Iterator[None]:
        """Hold the space of a blob of that size: what is written after the block finds it.

        Raises:
            EdgeAdaptError: The folder is full or cannot be written to.
        """
        place = f"{self.root}/reserved.part"
        try:
            with self._explained("cannot be written to; nothing was changed"):
                self._write(place, blob)
            yield
        finally:
            with suppress(OSError):
                self.fs.rm(place)

    def get(self, digest: str) -> bytes:
        """The blob of that digest (SHA-256, hex).

        Raises:
            DataError: It is missing.
            TrustError: The file under its name has other content.
            EdgeAdaptError: It cannot be read.
        """
        with self._explained("cannot be read"):
            try:
                blob: bytes = self.fs.cat_file(self._place(digest))
            except FileNotFoundError as error:
                raise DataError(
                    f"blob {digest} is missing from {self._name}: restore it from a copy", about="blob", value=digest
                ) from error
        if sha256(blob) != digest:
            raise TrustError(
                f"blob {digest} in {self._name} was altered: restore it from a copy", about="blob", value=digest
            )
        return blob

    @property
    def _name(self) -> str:
        return str(self.fs.unstrip_protocol(self.root))  # without the credentials that a URL may hold

    def _place(self, digest: str) -> str:
        return f"{self.root}/{blob_name(digest)}"

    def _write(self, path: str, blob: bytes) -> None:
        with self.fs.open(path, "wb") as file:
            file.write(blob)
            if isinstance(self.fs, LocalFileSystem):
                flush(file)

    def _settle(self) -> None:
        # On a local disk a move is durable only once the folder is synced; an object store acknowledges durable writes.
        if isinstance(self.fs, LocalFileSystem):
            sync(Path(self.root))

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise EdgeAdaptError(f"blob store {self._name} {what}: {error.strerror or error}", about="blobs") from error
