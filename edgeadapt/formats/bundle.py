"""A bundle on disk: the names of its files, and the one reader, which returns nothing unverified.

docs/reference/bundle-format.md lists the files. The rules, in the order in which they are checked:

1. The base manifest is signed by a trusted key.
2. The base's files are those that its manifest lists, with the digests that it states, and no others.
3. An adapter manifest is signed by a trusted key, under its own name.
4. The adapter is for this base and was released with its policy, and its file has the stated size and digest.
5. Its tensors are finite, fill exactly the slots of the graph, and have the stated layout, rank and labels; no rank is
   above the base's limit.

Nothing is parsed before it is verified, apart from the envelopes (``dsse.py``). Small files are used from the bytes
that were verified. Weights are mapped into memory from the folder; ``VerifiedBase.check`` then finds whether a file
changed since it was hashed. The caller decides which keys are trusted and which versions are too old."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from io import BufferedReader
from pathlib import Path
from stat import S_ISREG
from typing import Self, TypeVar

from aggregation.errors import DataError, TrustError
from aggregation.pki.identity import PublicKey
from edgeadapt.formats import container
from edgeadapt.formats.dsse import MAX_ENVELOPE
from edgeadapt.formats.graphinputs import check_slots, layout_of
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.manifest import AdapterManifest, BaseManifest, Manifest, Task, check_labels, check_name
from edgeadapt.formats.policy import NO_POLICY, Policy
from edgeadapt.formats.quantization import restore

TRUST = "trust.pem"
BASE, ADAPTERS = Path("base"), Path("adapters")
BASE_MANIFEST = BASE / "manifest.json"
MODEL, WEB_MODEL, WEIGHTS = "model.onnx", "web.onnx", "model.onnx.data"  # two graphs over one file of weights
TRAINING = "training.onnx"  # a third graph over the same weights, in bundles with which devices train
# Of a base with slots in its last layers alone: what computes the states that ``TRAINING`` reads, and what answers from
# them as ``MODEL`` does from tokens.
LOWER, UPPER = "lower.onnx", "upper.onnx"
CHAT = "chat.onnx"  # of a language model of that kind: ``MODEL``, which also goes on from the states that it returns
POLICY = "policy.json"  # what may be answered (``edgeadapt.formats.policy``)
PHRASES = "phrases.tsv"  # public phrases with their labels, which a device may rehearse and test (``phrases``)
KNOWLEDGE = "knowledge.jsonl"  # passages that answer questions (``passages``)
TOKENIZER, GENERATION = "tokenizer.json", "genai_config.json"
NEEDED: dict[Task, tuple[str, ...]] = {
    "text-classification": (MODEL, TOKENIZER),
    "text-generation": (MODEL, TOKENIZER, GENERATION),
}
MAX_HELD_FILE = 2**31  # bytes of a file of the base that is held in memory; also what protobuf can hold
MAX_BASE_FILE = 2**34  # bytes
M = TypeVar("M", bound=Manifest)


def manifest_path(name: str) -> Path:
    """Name an adapter's manifest, relative to the bundle. Raises ConfigError for a name that no adapter can have."""
    return ADAPTERS / f"{check_name(name)}.json"


def adapter_path(name: str) -> Path:
    """Name the file of an adapter, relative to the bundle. Raises as ``manifest_path``."""
    return ADAPTERS / f"{check_name(name)}.onnx_adapter"


def adapter_names(bundle: Path) -> list[str]:
    """List the adapters of a bundle by the names of their manifests, sorted; nothing is verified. Names with a leading
    dot belong to file managers."""
    return sorted(path.stem for path in (bundle / ADAPTERS).glob("*.json") if not path.name.startswith("."))


def read_file(path: Path, limit: int) -> bytes:
    """Read a file of a bundle. Raises DataError: it is missing, is not a regular file, or cannot be read; TrustError:
    it is larger than ``limit`` bytes. Nothing was read then."""
    with _opened(path, limit) as (file, status):
        return file.read(status.st_size)  # not the limit: a small machine would refuse that much memory


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """Identify the content of an open file without reading it. The system sets ctime at every write, and it cannot be
    set back without setting the machine's clock."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@dataclass(frozen=True, slots=True)
class HashedFile:
    """Holds a file's digest (SHA-256, hex), and its stamp from before it was read."""

    path: Path
    digest: str
    stamp: tuple[int, ...]

    @classmethod
    def of(cls, path: Path) -> Self:
        """Hash a file without holding it in memory. Raises as ``read_file``."""
        with _opened(path, MAX_BASE_FILE) as (file, status):
            return cls(path, file_digest(file, "sha256").hexdigest(), _stamp(status))

    def check(self) -> None:
        """Check that the path still leads to the file that was hashed. Raises TrustError if it changed."""
        try:
            same = _stamp(self.path.stat()) == self.stamp
        except FileNotFoundError:
            same = False
        if not same:
            reason = f"{self.path} changed while it was being loaded: try again, or copy the bundle again"
            raise TrustError(reason, about=self.path.name)


@dataclass(frozen=True, slots=True)
class VerifiedBase:
    """Holds a verified base: its folder, and the bytes of the files that its task needs in memory."""

    manifest: BaseManifest
    folder: Path
    files: dict[str, bytes] = field(repr=False)  # those that ``NEEDED`` names, and both parts of a cut graph
    hashed: tuple[HashedFile, ...] = field(repr=False)  # all
    policy: Policy = NO_POLICY

    @property
    def digest(self) -> str:
        return self.manifest.base_digest

    def read(self, name: str) -> bytes:
        """Read any listed file, verified again. Raises as ``Bundle.base``."""
        content = read_file(self.folder / name, MAX_BASE_FILE)
        if sha256(content).hexdigest() != self.manifest.files[name]:
            raise _altered(self.folder / name)
        return content

    def check(self) -> None:
        """Check that no file changed, after something was loaded from the folder itself. Raises TrustError."""
        for file in self.hashed:
            file.check()


@dataclass(frozen=True, slots=True)
class VerifiedAdapter:
    """Holds an adapter that may be used on the base for which it was verified."""

    manifest: AdapterManifest
    inputs: Tensors = field(repr=False)  # by graph input


@dataclass(frozen=True, slots=True)
class Bundle:
    """Reads a bundle with the keys that may have signed its manifests. Methods raise ConfigError if no adapter can have
    a name, DataError if a file is missing, and TrustError if it is damaged or altered, or no trusted key signed its
    manifest."""

    folder: Path
    trusted: tuple[PublicKey, ...]

    def base_manifest(self) -> BaseManifest:
        return self._accept(BaseManifest, self.folder / BASE_MANIFEST)

    def base(self) -> VerifiedBase:
        """Read the base (rules 1 and 2). Raises TrustError if a file is needed and not listed, or not listed at all."""
        manifest, folder = self.base_manifest(), self.folder / BASE
        needed = NEEDED[manifest.task] + ((LOWER, UPPER) if UPPER in manifest.files else ())
        needed += (POLICY,) if POLICY in manifest.files else ()
        if missing := [name for name in needed if name not in manifest.files]:
            raise TrustError(
                f"{self.folder / BASE_MANIFEST} lists no {missing[0]}: get a newer client, or copy the bundle again",
                about=missing[0],
            )
        _check_listed(folder, manifest)
        files = {name: read_file(folder / name, MAX_HELD_FILE) for name in needed}
        hashed = tuple(HashedFile.of(folder / name) for name in manifest.files)
        digests = {(file.path.name, file.digest) for file in hashed}
        digests |= {(name, sha256(content).hexdigest()) for name, content in files.items()}
        for name, digest in sorted(digests):
            if manifest.files[name] != digest:
                raise _altered(folder / name)
        policy = Policy.decode(files[POLICY]) if POLICY in files else NO_POLICY
        return VerifiedBase(manifest, folder, files, hashed, policy)

    def adapter_manifest(self, name: str) -> AdapterManifest:
        """Read an adapter's manifest (rule 3). Raises TrustError if it is another adapter's."""
        path = self.folder / manifest_path(name)
        if not path.exists():
            present = ", ".join(adapter_names(self.folder)) or "none"
            reason = f"{self.folder} has no manifest of an adapter {name!r}; it has: {present}"
            raise DataError(reason, about=path.name)
        manifest = self._accept(AdapterManifest, path)
        if manifest.name != name:
            reason = f"{path} was signed for the adapter {manifest.name[:64]!r}: copy the bundle again"
            raise TrustError(reason, about="adapter-manifest.name")
        return manifest

    def adapter(self, name: str, base: BaseManifest) -> VerifiedAdapter:
        """Read an adapter for ``base`` (rules 3 to 5). Raises DataError: the file is damaged, or the tensors are not
        finite, do not fit the base, or are not as stated; TrustError: the adapter is for another base."""
        manifest, path = self.adapter_manifest(name), self.folder / adapter_path(name)
        if manifest.base_digest != base.base_digest:
            raise TrustError(
                f"adapter {name!r} was made for another base: get one for {base.base_digest[:12]}, or open the bundle "
                "again if its base was replaced",
                about="adapter-manifest.base_digest",
            )
        if any(one.policy != base.files.get(POLICY) for one in self.governing(manifest, base)):
            reason = f"adapter {name!r} was released with another policy than the bundle has: copy the bundle again"
            raise TrustError(reason, about="adapter-manifest.policy")
        blob = read_file(path, manifest.size)
        if len(blob) != manifest.size or sha256(blob).hexdigest() != manifest.sha256:
            raise _altered(path)
        try:
            inputs = restore(container.unpack(blob), manifest.format)
        except DataError as error:
            raise DataError(f"{path}: {error}", about=error.about) from error
        _check_stated(inputs, manifest, base)
        return VerifiedAdapter(manifest, inputs)

    def governing(self, manifest: AdapterManifest, base: BaseManifest) -> list[AdapterManifest]:
        """List the manifests whose policy an adapter is under: its own, or of a private one those of the shared ones.
        Without any policy, a shared one that is damaged is left out, as if it was not there."""
        if manifest.parent is None:
            return [manifest]
        others, strict = [], POLICY in base.files or manifest.policy
        for name in adapter_names(self.folder):
            with nullcontext() if strict else suppress(TrustError):
                others.append(self.adapter_manifest(name))
        return [one for one in others if (one.parent, one.base_digest) == (None, base.base_digest)] or [manifest]

    def _accept(self, kind: type[M], path: Path) -> M:
        raw = read_file(path, MAX_ENVELOPE)
        try:
            return kind.accept(raw, self.trusted)
        except TrustError as error:
            reason = f"{path}: {error}; copy it again from a trusted source"
            raise TrustError(reason, about=error.about) from error


def _check_stated(inputs: Tensors, manifest: AdapterManifest, base: BaseManifest) -> None:
    """Check that an adapter is what its manifest states, and fits the base (rule 5)."""
    sizes = check_slots(inputs, base.slots)
    rank = max((size for symbol, size in sizes.items() if symbol.startswith("rank_")), default=0)
    if rank > base.max_rank:
        reason = f"adapter {manifest.name!r} has rank {rank}, above the base's limit of {base.max_rank}"
        raise DataError(reason, about="adapter-manifest.rank")
    measured = {
        "layout_digest": layout_of(inputs).digest,
        "rank": rank,
        "labels": sizes.get("labels", len(manifest.labels)),
    }
    stated = {"layout_digest": manifest.layout_digest, "rank": manifest.rank, "labels": len(manifest.labels)}
    if other := [field for field in measured if measured[field] != stated[field]]:
        reason = f"adapter {manifest.name!r} does not have the {other[0]} that its manifest states: export it again"
        raise DataError(reason, about=f"adapter-manifest.{other[0]}")
    if manifest.labels and base.task == "text-generation":
        reason = f"adapter {manifest.name!r} names labels, and a base for text-generation has none: export it again"
        raise DataError(reason, about="adapter-manifest.labels")
    check_labels(manifest.name, manifest.labels)


def _check_listed(folder: Path, manifest: BaseManifest) -> None:
    """Check that every file is signed: a library that is given the folder may read them. Names with a leading dot
    belong to file managers, and no library reads them."""
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if unlisted := sorted(present - set(manifest.files) - {BASE_MANIFEST.name}):
        reason = f"{folder / unlisted[0]} is not listed in the base manifest: remove it, or copy the bundle again"
        raise TrustError(reason, about=unlisted[0])


def _altered(path: Path) -> TrustError:
    return TrustError(f"{path} does not match the digest in its manifest: copy the bundle again", about=path.name)


@contextmanager
def _opened(path: Path, limit: int) -> Iterator[tuple[BufferedReader, os.stat_result]]:
    try:
        if not S_ISREG(path.stat().st_mode):  # a pipe would be waited for, and a device may never end
            raise DataError(f"{path} is not a regular file: copy the bundle again", about=path.name)
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size > limit:
                reason = f"{path} is larger than its limit of {limit} bytes: copy the bundle again"
                raise TrustError(reason, about=path.name)
            yield file, status
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: copy the bundle again", about=path.name) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): copy the bundle again", about=path.name) from error
