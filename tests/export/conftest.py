"""The tiny base with a tokenizer like those of real bases, its exports, and bundles of them."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import edgeadapt
from adapters.base import Base
from adapters.classifier import LoraSpec, build, load, tensors
from adapters.layout import Layout, Tensors
from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from export.bundle.base import ExportedBase, export_base
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.quantize import Profile

LABELS = ("Light", "Lock", "Music", "Timer")
WORDS = (
    *("turn", "on", "off", "the", "a", "kitchen", "light", "lights", "door", "lock"),
    *("unlock", "play", "music", "set", "timer", "for", "ten", "minutes", "is", "open"),
)
PHRASES = (
    "turn on the kitchen lights",
    "lock the door",
    "play music",
    "set a timer for ten minutes",
    "is the door open",
    "turn off the light",
    "unlock",
)


def _tokenizer() -> Tokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *letters[1:], *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=16)  # as some bases ship it: the exporter has to undo this
    return tokenizer


def draw(model: PeftModel, seed: int, size: float = 0.3) -> Tensors:
    """Random values for every tensor of the model's adapter; the head's are larger, so that answers are clear."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(value.shape) * (3.0 if "classifier" in name else size)).astype(np.float32)
        for name, value in tensors(model).items()
    }


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, make_base: Callable[..., Base]) -> Base:
    return make_base(tmp_path_factory.mktemp("base"), tokenizer=_tokenizer())


@pytest.fixture(scope="session")
def model(tiny_base: Base) -> PeftModel:
    """The tiny classifier; its adapter's values are those of ``draw(model, 0)``."""
    built = build(tiny_base, len(LABELS), LoraSpec(rank=4, alpha=8))
    load(built, draw(built, 0))
    return built


@pytest.fixture(scope="session")
def exported(model: PeftModel, tiny_base: Base) -> ExportedBase:
    return export_base(model, tiny_base, Profile.FP32)


@pytest.fixture(scope="session")
def exported_int8(model: PeftModel, tiny_base: Base) -> ExportedBase:
    return export_base(model, tiny_base, Profile.NATIVE_INT8)


@pytest.fixture(scope="session")
def vendor() -> IdentityKey:
    return IdentityKey.generate(SystemEntropy())


@pytest.fixture(scope="session")
def household() -> IdentityKey:
    return IdentityKey.generate(SystemEntropy())


Source = Callable[..., AdapterSource]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """``edgeadapt export`` with these arguments, in this process."""

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["edgeadapt", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            edgeadapt.main()
        code = caught.value.code or 0
        assert isinstance(code, int)
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def source(model: PeftModel) -> Source:
    """Makes adapter sources: other values for another ``seed``."""

    def make(name: str = "global", seed: int = 0, version: int = 3, parent: str | None = None) -> AdapterSource:
        values = draw(model, seed)
        digest = Layout.of(values).digest  # any digest will do: the device has no blob to compare it with
        return AdapterSource(name, values, LABELS, version, digest, parent)

    return make


@pytest.fixture
def bundle(tmp_path: Path, exported: ExportedBase, source: Source, vendor: IdentityKey, household: IdentityKey) -> Path:
    """A bundle with a shared adapter, and the pinned keys of vendor and household beside it."""
    write_bundle(tmp_path / "bundle", exported, [source()], key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem() + household.public.to_pem())
    return tmp_path / "bundle"
