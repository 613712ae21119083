"""A bundle read back by whoever exports: to measure what was written, or to give an adapter back to peft.

Signatures and digests are checked as a device does (``client.inference.trust``); versions are not, because
nothing is put to use here.
"""

from collections.abc import Sequence
from pathlib import Path

from adapters.dsse import MAX_ENVELOPE
from adapters.files import MAX_ADAPTER, sha256
from adapters.layout import Tensors
from adapters.manifest import AdapterManifest, BaseManifest
from adapters.ondevice import LORA_A, LORA_B, check_name, check_slots, from_graph
from adapters.peft.config import exactly
from adapters.peft.inputs import AdapterInputs, lora_paths
from adapters.peftconfig import PeftConfig
from aggregation.errors import DataError, TrustError
from aggregation.pki.identity import PublicKey
from export.bundle.adapter import decode
from export.bundle.write import BASE_MANIFEST

TRUST = "trust.pem"  # beside a bundle
MAX_BASE_FILE = 2**40  # bytes


def read_manifest(bundle: Path, keys: Sequence[PublicKey]) -> BaseManifest:
    """What is signed about the base of ``bundle``.

    Raises:
        DataError: There is no bundle.
        TrustError: The card is damaged, altered, or of an unknown signer.
    """
    return BaseManifest.accept(_read(bundle / BASE_MANIFEST, MAX_ENVELOPE), keys)


def read_base(bundle: Path, card: BaseManifest) -> dict[str, bytes]:
    """The files of the base, by name. Raises as ``read_manifest``."""
    files = {name: _read(bundle / BASE_MANIFEST.parent / name, MAX_BASE_FILE) for name in card.files}
    for name, blob in files.items():
        if sha256(blob) != card.files[name]:
            raise TrustError(
                f"{bundle / BASE_MANIFEST.parent / name} is not the file that was signed; export the base again",
                about=name,
            )
    return files


def read_adapter(
    bundle: Path, name: str, card: BaseManifest, keys: Sequence[PublicKey]
) -> tuple[AdapterManifest, Tensors]:
    """An adapter of ``bundle``: what is signed about it, and the graph inputs that its file holds.

    Raises:
        ConfigError: ``name`` cannot be an adapter's.
        DataError: A file is missing or not sound, or does not fit the base.
        TrustError: Sidecar or file are not what a trusted key signed for this base under this name.
    """
    path = bundle / "adapters" / check_name(name)
    if not path.with_name(f"{name}.json").is_file():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.json"))) or "none"
        raise DataError(f"{bundle} has no adapter {name!r}; it has: {there}", about=f"{name}.json", value=name)
    sidecar = AdapterManifest.accept(_read(path.with_name(f"{name}.json"), MAX_ENVELOPE), keys)
    if sidecar.name != name or sidecar.base_digest != card.base_digest:
        raise TrustError(f"the sidecar of {name!r} was signed for another name or base; export the adapter again")
    file = path.with_name(f"{name}.onnx_adapter")
    blob = _read(file, MAX_ADAPTER)
    if sha256(blob) != sidecar.sha256:
        raise TrustError(f"{file} is not the file that was signed; export the adapter again", about=file.name)
    inputs = decode(blob, sidecar.format)
    check_slots(inputs, card.slots)
    return sidecar, inputs


def unfolded(sidecar: AdapterManifest, inputs: Tensors) -> tuple[Tensors, PeftConfig]:
    """A bundle's adapter under peft's names, with the method that gives its layers their scaling.

    Layers that the adapter leaves alone are dropped. Where the sidecar knows no method, the scaling stays in B and
    the method says 1.

    Args:
        sidecar: Of the adapter.
        inputs: Its tensors by graph input.
    """
    kept = {name: value for name, value in inputs.items() if value.size}
    method = sidecar.peft_config or _folded(kept)
    renamed = from_graph(kept, dict.fromkeys(lora_paths(kept), 1.0))
    return from_graph(kept, AdapterInputs.of_tensors(method, renamed).scaling), method


def _folded(inputs: Tensors) -> PeftConfig:
    ranks = {path: inputs[path + LORA_A].shape[1] for path in sorted(lora_paths(inputs)) if path + LORA_B in inputs}
    rank = max(ranks.values(), default=1)
    pairs = tuple((exactly(path), size) for path, size in ranks.items() if size != rank)
    return PeftConfig("LORA", rank, rank, tuple(ranks), pairs, pairs)


def _read(path: Path, limit: int) -> bytes:
    try:
        if path.stat().st_size > limit:
            raise DataError(f"{path} is above the limit of {limit} bytes")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; is it a bundle, and is it whole?", about=path.name) from error
