"""The exported base: its files as bytes, with what is needed to make adapter files for it."""

from dataclasses import dataclass, field

from onnx import checker
from peft import PeftModel
from tokenizers import Tokenizer

from adapters import pretrained
from adapters.base import Base
from adapters.files import sha256
from adapters.manifest import BaseManifest, Task
from aggregation.errors import ConfigError
from export.onnx import graph, headers
from export.onnx.adapterinputs import plan
from export.onnx.calibrate import TEXT, TOKENS
from export.onnx.quantize import Profile, quantize
from export.onnx.slots import AdapterInputs
from export.onnx.tasks import readable

TOKENIZER = "tokenizer.json"
MAX_RANK = 64  # what one layer of an adapter may have, unless the exporter says otherwise


@dataclass(frozen=True, slots=True)
class ExportedBase:
    """A frozen base as a device runs it. One export serves every adapter of the same layers, whatever its rank."""

    base_digest: str
    task: Task
    profile: Profile
    plan: AdapterInputs
    slots: dict[str, tuple[str, ...]]  # graph inputs that an adapter fills → dimensions as text
    max_rank: int
    files: dict[str, bytes] = field(repr=False)  # of the base's folder, without the card

    @property
    def model(self) -> bytes:
        """The native header (ONNX); its weights are in ``files[headers.DATA]``."""
        return self.files[headers.NATIVE]

    @property
    def tokenizer(self) -> bytes:
        """JSON of the tokenizers library."""
        return self.files[TOKENIZER]

    @property
    def card(self) -> BaseManifest:
        """What the signer says of these files."""
        digests = {name: sha256(blob) for name, blob in self.files.items()}
        return BaseManifest(self.base_digest, self.task, self.profile.value, digests, self.slots, self.max_rank)


def export_base(model: PeftModel, base: Base, profile: Profile, max_rank: int = MAX_RANK) -> ExportedBase:
    """Export the classifier ``model``; takes seconds, and no tensor of the adapter gets into the result.

    Args:
        model: From ``adapters.classifier.build``; its adapter names the layers that get slots.
        base: The base under it.
        profile: How weights are stored.
        max_rank: What the card allows an adapter.

    Raises:
        ConfigError: The model cannot be exported (``plan``, ``graph.trace``), or its tokenizer has no limit.
    """
    found = plan(model)
    tokenizer = _tokenizer(base, model)
    ids = Tokenizer.from_str(tokenizer.decode()).encode(TEXT).ids[:TOKENS]
    traced = quantize(graph.trace(model, found), profile, ids)
    checker.check_model(traced)
    slots = graph.slots(traced)
    return ExportedBase(
        base_digest=base.digest,
        task="text-classification",
        profile=profile,
        plan=found,
        slots=slots,
        max_rank=max_rank,
        files=headers.split(traced, slots) | {TOKENIZER: tokenizer},
    )


def _tokenizer(base: Base, model: PeftModel) -> bytes:
    """The base's tokenizer, cut off at what the model can read and without padding, which the device does not need."""
    tokenizer, config = pretrained.tokenizer(base), pretrained.configuration(base)
    positions = getattr(config, "max_position_embeddings", None)  # whatever the family calls it
    limits = [n for n in (positions, (tokenizer.truncation or {}).get("max_length")) if n]
    if not limits:
        raise ConfigError(f"neither config.json nor tokenizer.json in {base.folder} limits the length of a text")
    tokenizer.enable_truncation(readable(model.base_model.model, config, min(limits)))
    tokenizer.no_padding()
    return str(tokenizer.to_str()).encode()
