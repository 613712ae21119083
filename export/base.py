"""The exported base: graph and tokenizer as bytes, with what is needed to make adapter files for it."""

import json
from dataclasses import dataclass, field

from onnx import checker
from peft import PeftModel
from tokenizers import Tokenizer

from adapters.base import Base
from adapters.files import sha256
from adapters.manifest import BaseCard
from aggregation.errors import ConfigError
from export import graph
from export.plan import Plan, plan
from export.quantize import Profile, quantize

MODEL, TOKENIZER = "model.onnx", "tokenizer.json"


@dataclass(frozen=True, slots=True)
class ExportedBase:
    """A frozen base as a device runs it. One export serves every adapter of the same plan, whatever its rank."""

    base_digest: str
    profile: Profile
    plan: Plan
    slots: dict[str, tuple[str, ...]]  # graph inputs that an adapter fills → dimensions as text
    model: bytes = field(repr=False)  # ONNX
    tokenizer: bytes = field(repr=False)  # JSON of the tokenizers library

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the base's folder, without the card."""
        return {MODEL: self.model, TOKENIZER: self.tokenizer}

    @property
    def card(self) -> BaseCard:
        """What the signer says of these files."""
        digests = {name: sha256(blob) for name, blob in self.files.items()}
        return BaseCard(self.base_digest, self.profile.value, digests, self.slots)


def export_base(model: PeftModel, base: Base, profile: Profile) -> ExportedBase:
    """Export the base under ``model``; takes seconds, and no tensor of the adapter gets into the result.

    Raises:
        ConfigError: The model cannot be exported (``plan``, ``graph.trace``), or its tokenizer has no limit.
    """
    found = plan(model)
    finished = graph.with_defaults(quantize(graph.trace(model, found), profile))
    checker.check_model(finished)
    return ExportedBase(
        base_digest=base.digest,
        profile=profile,
        plan=found,
        slots=graph.slots(finished),
        model=finished.SerializeToString(deterministic=True),
        tokenizer=_tokenizer(base),
    )


def _tokenizer(base: Base) -> bytes:
    """The base's tokenizer, cut off at what the model can read and without padding, which the device does not need."""
    tokenizer = Tokenizer.from_file(str(base.folder / "tokenizer.json"))
    positions = json.loads((base.folder / "config.json").read_bytes()).get("max_position_embeddings")
    limits = [n for n in (positions, (tokenizer.truncation or {}).get("max_length")) if n]
    if not limits:
        raise ConfigError(f"neither config.json nor tokenizer.json in {base.folder} limits the length of a text")
    tokenizer.enable_truncation(min(limits))
    tokenizer.no_padding()
    return str(tokenizer.to_str()).encode()
