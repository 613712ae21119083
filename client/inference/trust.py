"""What a device believes: files that a pinned key signed, intact, made for this base, and not older than before.

Rules, in the order in which they are checked:

1. The pinned keys lie outside the bundle: what ships inside never vouches for itself.
2. The base's card carries a pinned key's signature; the files of the base are those that it lists, with the digests
   that it names, and no others lie beside them.
3. An adapter's sidecar carries a pinned key's signature, its own name, and the base's digest.
4. The adapter file has the size and the digest that the sidecar names, down to the last byte.
5. Its tensors are finite, fill exactly the slots of the graph, have the layout, rank and labels of the sidecar, and no
   rank above the base's limit.
6. Its version is not below the highest that this device has accepted under that name for that base (``seen.py``).

Nothing is parsed before it is verified, apart from the signed documents themselves (``adapters/signed.py``). The small
files of the base are used from the bytes that were verified; the weights are mapped into memory from the folder, and
``VerifiedBase.check`` says after loading whether they are still the file that was (docs/explanation/inference.md says
what that leaves open).
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Self, TypeVar

import numpy as np  # noqa: F401  # before onnxruntime, whose C code prints and forgets a Ctrl-C while it imports numpy
import onnxruntime as ort

from adapters.dsse import MAX_ENVELOPE
from adapters.layout import Tensors
from adapters.manifest import AdapterManifest, BaseManifest, Task
from adapters.ondevice import check_labels, check_name, check_slots, layout_of, restore
from aggregation.errors import DataError, TrustError
from aggregation.pki.identity import PublicKey
from client.inference import intact
from client.inference.seen import SeenVersions

TRUST_FILE, CARD = "trust.pem", "card.json"
MODEL, TOKENIZER, GENAI = "model.onnx", "tokenizer.json", "genai_config.json"
NEEDED: dict[Task, tuple[str, ...]] = {
    "text-classification": (MODEL, TOKENIZER),
    "text-generation": (MODEL, TOKENIZER, GENAI),
}
MAX_KEYS = 2**16  # bytes
MAX_HELD_FILE = 2**31  # bytes, of what is held in memory; also what protobuf can hold
MAX_BASE_FILE = 2**34  # bytes
PEM_END = b"-----END PUBLIC KEY-----"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class VerifiedBase:
    """The base of a bundle, verified: its folder, and of ``NEEDED`` files the very bytes that were hashed."""

    card: BaseManifest
    folder: Path
    files: dict[str, bytes] = field(repr=False)
    hashed: tuple[intact.Hashed, ...] = field(repr=False)

    def check(self) -> None:
        """To be called after something was loaded from the folder itself: is it still what was verified?

        Raises:
            TrustError: A file was written or replaced since it was hashed.
        """
        for file in self.hashed:
            file.check()


@dataclass(frozen=True, slots=True)
class VerifiedAdapter:
    """An adapter that may be used on the base it was verified for."""

    sidecar: AdapterManifest
    inputs: Tensors = field(repr=False)  # by graph input


@dataclass(frozen=True, slots=True)
class Trust:
    """The pinned keys of a device, and the versions that it has accepted."""

    keys: tuple[PublicKey, ...]
    seen: SeenVersions

    @classmethod
    def open(cls, bundle: Path, pinned: Path | None = None) -> Self:
        """Read the keys from ``pinned``, or from ``trust.pem`` in the folder that holds the bundle.

        Raises:
            TrustError: No such file, no public key in it, or it lies inside the bundle.
        """
        bundle = bundle.resolve()
        file = bundle.parent / TRUST_FILE if pinned is None else pinned.absolute()
        if file.resolve().is_relative_to(bundle):
            raise TrustError(f"{file} lies in the bundle, which cannot vouch for itself; pin the keys elsewhere")
        if not file.is_file():
            raise TrustError(f"no pinned keys at {file}: put the vendor's public key there, or name it with --trust")
        parts = intact.read(file, MAX_KEYS).split(PEM_END)
        if parts.pop().strip() or not parts:
            raise TrustError(f"{file} is not a list of public keys in PEM form")
        keys = tuple(PublicKey.from_pem(part.strip() + b"\n" + PEM_END + b"\n") for part in parts)
        return cls(keys, SeenVersions(file.with_suffix(".seen.json")))

    def base(self, bundle: Path) -> VerifiedBase:
        """The base of a bundle (rule 2).

        Raises:
            TrustError: A file is damaged, altered, or signed by nobody pinned.
            DataError: A file is missing.
        """
        folder = bundle / "base"
        card = _accepted(BaseManifest.accept, folder / CARD, self.keys)
        needed = NEEDED[card.task]
        if missing := [name for name in needed if name not in card.files]:
            raise TrustError(f"{folder / CARD} lists no {missing[0]}; get a newer client, or fetch the bundle again")
        _check_listed(folder, card)
        files = {name: intact.read(folder / name, MAX_HELD_FILE) for name in needed}
        hashed = tuple(intact.hashed(folder / name, MAX_BASE_FILE) for name in card.files)
        found = {file.path.name: file.digest for file in hashed}
        for name, digest in card.files.items():
            if found[name] != digest or (name in files and sha256(files[name]).hexdigest() != digest):
                raise TrustError(f"{folder / name} is not the file that was signed; fetch the bundle again")
        return VerifiedBase(card, folder, files, hashed)

    def sidecar(self, bundle: Path, name: str) -> AdapterManifest:
        """What is said of an adapter (rule 3, without the base). Raises as ``base``, ConfigError for a bad name."""
        path = bundle / "adapters" / f"{check_name(name)}.json"
        if not path.is_file():
            known = ", ".join(adapter_names(bundle)) or "none"
            raise DataError(f"the bundle has no sidecar for an adapter {name!r}; it has: {known}")
        sidecar = _accepted(AdapterManifest.accept, path, self.keys)
        if sidecar.name != name:
            raise TrustError(f"{path} was signed for the adapter {sidecar.name!r}; fetch the bundle again")
        return sidecar

    def adapter(self, bundle: Path, base: VerifiedBase, name: str) -> VerifiedAdapter:
        """An adapter for ``base`` (rules 3 to 6). Notes its version.

        Raises:
            TrustError: Damaged, altered, signed by nobody pinned, for another base, or older than one accepted before.
            DataError: A file is missing, or its tensors are not finite or do not fit the base.
            ConfigError: ``name`` cannot be an adapter's.
        """
        sidecar = self.sidecar(bundle, name)
        if sidecar.base_digest != base.card.base_digest:
            raise TrustError(f"adapter {name!r} was made for another base; fetch one for {base.card.base_digest[:12]}")
        path = bundle / "adapters" / f"{name}.onnx_adapter"
        blob = intact.read(path, sidecar.size)
        if len(blob) != sidecar.size or sha256(blob).hexdigest() != sidecar.sha256:
            raise TrustError(f"{path} is not the file that was signed; fetch the adapter again")
        self.seen.refuse_older(sidecar)
        inputs = _tensors(blob, sidecar)
        _check_claims(inputs, sidecar, base.card)
        self.seen.note(sidecar)
        return VerifiedAdapter(sidecar, inputs)


def adapter_names(bundle: Path) -> list[str]:
    """The adapters of a bundle by their sidecars' file names, sorted; nothing of them is verified.

    Names with a leading dot are file managers' own.
    """
    return sorted(path.stem for path in (bundle / "adapters").glob("*.json") if not path.name.startswith("."))


def _accepted(accept: Callable[[bytes, Iterable[PublicKey]], T], path: Path, keys: Iterable[PublicKey]) -> T:
    """What a signed document says. Raises as ``accept`` and ``intact.read``, with the file's name."""
    raw = intact.read(path, MAX_ENVELOPE)
    try:
        return accept(raw, keys)
    except TrustError as error:
        raise TrustError(f"{path}: {error}; fetch it again from someone whom this device trusts") from error


def _tensors(blob: bytes, sidecar: AdapterManifest) -> Tensors:
    # The container can be read from a path only. A copy of the verified bytes: the file itself may change meanwhile.
    with tempfile.TemporaryDirectory(prefix="edgeadapt-") as folder:
        path = Path(folder) / "adapter"
        path.write_bytes(blob)
        try:
            values = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
        except Exception as error:  # onnxruntime raises several classes of its own, with no common base
            raise DataError(f"adapter {sidecar.name!r} is not a sound .onnx_adapter file; export it again") from error
        return restore({name: value.numpy() for name, value in values.items()}, sidecar.format)


def _check_claims(inputs: Tensors, sidecar: AdapterManifest, card: BaseManifest) -> None:
    sizes = check_slots(inputs, card.slots)
    if layout_of(inputs).digest != sidecar.layout_digest:
        raise DataError(f"adapter {sidecar.name!r} has another layout than its sidecar says; export it again")
    rows = sizes.get("labels", len(sidecar.labels))
    rank = max((size for symbol, size in sizes.items() if symbol.startswith("rank_")), default=0)
    if rows != len(sidecar.labels) or rank != sidecar.rank:
        raise DataError(f"adapter {sidecar.name!r} has other labels or ranks than its sidecar says; export it again")
    if rank > card.max_rank:
        raise DataError(f"adapter {sidecar.name!r} has rank {rank}, above the base's limit of {card.max_rank}")
    _check_labels(sidecar, card)


def _check_labels(sidecar: AdapterManifest, card: BaseManifest) -> None:
    if sidecar.labels and card.task == "text-generation":
        raise DataError(f"adapter {sidecar.name!r} names labels, of which a base for text-generation has none")
    check_labels(sidecar.name, sidecar.labels)


def _check_listed(folder: Path, card: BaseManifest) -> None:
    """Refuse files that nobody signed: a library that is given the folder may read more than it was told to.

    Names with a leading dot are left alone; file managers write such, and no library reads them.
    """
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if unlisted := sorted(found - set(card.files) - {CARD}):
        raise TrustError(
            f"{folder / unlisted[0]} is not listed in the signed card; remove it or fetch the bundle again"
        )
