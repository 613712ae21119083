"""A base and an adapter read back from a bundle, with the trained model in torch: what ``compare`` compares.

The very files that ship are read back and verified; the trained model is opened as its users would open it, with peft.
"""

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from aggregation.errors import ConfigError, DataError
from edgeadapt.bases.base import find_base
from edgeadapt.formats.bundle import Bundle, VerifiedAdapter
from edgeadapt.formats.manifest import BaseManifest
from edgeadapt.methods.peft.folder import to_peft
from export.bundle.sources import Origin, as_slots, fitted
from export.bundle.trained import bare_model
from export.parity.compare import OnnxRunner


@dataclass(frozen=True, slots=True)
class ExportedPair:
    """A bundle's base and one of its adapters, ready to run, and the trained model in torch."""

    base: BaseManifest
    adapter: VerifiedAdapter
    runner: OnnxRunner
    model: PeftModel


def open_pair(bundle: Bundle, name: str, base_name: str, origin: Origin) -> ExportedPair:
    """Read back and verify the base and the adapter ``name`` of a bundle, which was exported from ``origin``.

    Raises ConfigError: ``base_name`` is another base than the bundle's. DataError: the adapter was exported from
    another file than ``origin``. TrustError: a file of the bundle is not what was signed.
    """
    verified = bundle.base()
    manifest, adapter = verified.manifest, bundle.adapter(name, verified.manifest)
    if (source := adapter.manifest.source) != origin.sha256:
        raise DataError(
            f"{name!r} in {bundle.folder} was exported from another file ({source[:12]}); export it again",
            about="source",
            value=source,
        )
    base = find_base(base_name)
    if base.digest != manifest.base_digest:
        raise ConfigError(
            f"{base_name} is the base {base.digest[:12]}, {bundle.folder} holds {manifest.base_digest[:12]}: name "
            "the base that was exported",
            about="--base",
            value=base.digest,
        )
    runner = OnnxRunner.open(verified.folder, manifest)
    verified.check()
    exported = fitted(as_slots(origin), manifest.base_digest, manifest.slots)
    inner = bare_model(base, manifest.task, exported.tensors, len(adapter.manifest.labels))
    return ExportedPair(manifest, adapter, runner, _trained(inner, origin))


def _trained(inner: Any, origin: Origin) -> PeftModel:
    """Attach the adapter with peft: the conversion of its method to LoRA is part of what is compared."""
    with tempfile.TemporaryDirectory(prefix="edgeadapt-") as folder:
        to_peft(origin.tensors, origin.peft_config, Path(folder) / "peft")
        with warnings.catch_warnings():  # peft uses a deprecated argument of transformers
            warnings.simplefilter("ignore", FutureWarning)
            return PeftModel.from_pretrained(inner, Path(folder) / "peft").eval()
