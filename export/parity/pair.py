"""A base and an adapter as they lie in a bundle, beside the model that was trained: what ``parity`` compares.

The very files that ship are read back and verified; the trained model is opened as anybody would open it, through peft.
"""

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from adapters import pretrained
from adapters.base import Base, find_base
from adapters.classifier import ENCODER, PhraseClassifier
from adapters.layout import Tensors
from adapters.manifest import AdapterManifest, BaseManifest, Task
from adapters.ondevice import graph_name
from aggregation.errors import ConfigError, DataError
from aggregation.pki.identity import PublicKey
from export.bundle import read
from export.bundle.sources import Origin
from export.parity.compare import OnnxRunner
from export.peft.folder import to_peft


@dataclass(frozen=True, slots=True)
class ExportedPair:
    """A bundle's base and one adapter of it, ready to be asked, and the model in torch."""

    card: BaseManifest
    sidecar: AdapterManifest
    inputs: Tensors = field(repr=False)
    runner: OnnxRunner
    model: PeftModel


def open_pair(bundle: Path, name: str, trusted: Sequence[PublicKey], base_name: str, origin: Origin) -> ExportedPair:
    """Read back and verify.

    Args:
        bundle: With the base and the adapter.
        name: Of the adapter.
        trusted: The keys that may have signed the bundle's files.
        base_name: Where the base that was exported is found.
        origin: What the adapter was exported from.

    Raises:
        ConfigError: ``base_name`` is another base than the bundle's.
        DataError: The adapter was exported from another file than ``origin``.
        TrustError: A file of the bundle is not what was signed.
    """
    card = read.read_manifest(bundle, trusted)
    sidecar, inputs = read.read_adapter(bundle, name, card, trusted)
    if sidecar.source != origin.sha256:
        raise DataError(f"{name!r} in {bundle} was exported from another file ({sidecar.source[:12]}); export it again")
    base = find_base(base_name)
    if base.digest != card.base_digest:
        raise ConfigError(f"{base_name} is the base {base.digest[:12]}, {bundle} was made from {card.base_digest[:12]}")
    runner = OnnxRunner.open(read.read_base(bundle, card))
    return ExportedPair(card, sidecar, inputs, runner, _trained(base, card.task, origin, len(sidecar.labels)))


def _trained(base: Base, task: Task, origin: Origin, labels: int) -> PeftModel:
    inner = _bare(base, task, origin.tensors, labels)
    with tempfile.TemporaryDirectory(prefix="edgeadapt-") as folder:
        to_peft(origin.tensors, origin.method, Path(folder) / "peft")
        with warnings.catch_warnings():  # peft asks transformers in words of an older one
            warnings.simplefilter("ignore", FutureWarning)
            return PeftModel.from_pretrained(inner, Path(folder) / "peft").eval()


def _bare(base: Base, task: Task, tensors: Tensors, labels: int) -> Any:
    """The model that the adapter's names belong to."""
    if task == "text-generation":
        return pretrained.load(base, AutoModelForCausalLM)
    if not any(graph_name(name).startswith(ENCODER) for name in tensors):
        return pretrained.load(base, AutoModelForSequenceClassification, num_labels=labels)
    encoder = pretrained.load(base, AutoModel)
    return PhraseClassifier(encoder, encoder.config.hidden_size, labels)
