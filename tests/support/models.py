"""Tiny frozen bases with seeded weights, their exports, and bundles of them: fixtures for the conftest files.

A conftest takes all of them, ``globals().update(models.FIXTURES)``, because they need each other. The classifier reads
with a tokenizer like those of real bases; the language models, of several architectures, read single letters.
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM

from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from client.inference.engine import GenerationEngine
from client.inference.generate import Generator
from client.inference.library import Library
from edgeadapt.bases.base import Base, find_base
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods import causal
from edgeadapt.methods.classifier import build, load, tensors
from edgeadapt.methods.peft.inputs import AdapterInputs, LoraSlot
from export.bundle.write import AdapterSource, add_adapter, write_bundle
from export.causal import export_causal
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from export.onnx.peftmodel import SlottedModel, saved_slot

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


def wordpiece() -> Tokenizer:
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


def adapter_inputs(model: PeftModel) -> AdapterInputs:
    """The slots of every layer and module that the model's adapter changes, with peft's own scaling."""
    modules = dict(model.base_model.model.named_modules())
    loras = [LoraSlot(path, float(m.scaling["default"])) for path, m in modules.items() if isinstance(m, LoraLayer)]
    saved = {path: m for path, m in modules.items() if isinstance(m, ModulesToSaveWrapper)}
    slots = [saved_slot(path, wrapper.modules_to_save["default"]) for path, wrapper in saved.items()]
    return AdapterInputs("default", tuple(loras), tuple(slots))


def slotted_of(model: PeftModel) -> SlottedModel:
    """The base in ``model``, with slots for its adapter."""
    inner: Any = copy.deepcopy(model).unload()
    return SlottedModel(inner.eval(), adapter_inputs(model))


def with_biases(base: Base, folder: Path) -> Base:
    """A copy of a base in ``folder``, whose biases are not zeros."""
    shutil.copytree(base.folder, folder, dirs_exist_ok=True)
    values, drawn = load_file(folder / "model.safetensors"), np.random.default_rng(3)
    moved = {name: value + 0.2 * drawn.standard_normal(value.shape, np.float32) for name, value in values.items()}
    changed = {name: moved[name] if name.endswith(".bias") else value for name, value in values.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return find_base(str(folder))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, make_base: Callable[..., Base]) -> Base:
    return make_base(tmp_path_factory.mktemp("base"), tokenizer=wordpiece())


@pytest.fixture(scope="session")
def model(tiny_base: Base) -> PeftModel:
    """The tiny classifier; its adapter's values are those of ``draw(model, 0)``."""
    built = build(tiny_base, len(LABELS), PeftConfig.lora(rank=4, alpha=8))
    load(built, draw(built, 0))
    return built


@pytest.fixture(scope="session")
def exported(model: PeftModel, tiny_base: Base) -> ExportedBase:
    return export_classifier(slotted_of(model), tiny_base, Profile.FP32)


@pytest.fixture(scope="session")
def exported_int8(model: PeftModel, tiny_base: Base) -> ExportedBase:
    return export_classifier(slotted_of(model), tiny_base, Profile.NATIVE_INT8)


@pytest.fixture(scope="session")
def vendor() -> IdentityKey:
    return IdentityKey.generate(SystemEntropy())


@pytest.fixture(scope="session")
def household() -> IdentityKey:
    return IdentityKey.generate(SystemEntropy())


Source = Callable[..., AdapterSource]


@pytest.fixture(scope="session")
def source(model: PeftModel) -> Source:
    """Makes adapter sources: other values for another ``seed``."""

    def make(name: str = "global", seed: int = 0, version: int = 3, parent: str | None = None) -> AdapterSource:
        values = draw(model, seed)
        # Any digest of the values will do: the device has no blob to compare it with.
        digest = hashlib.sha256(b"".join(values[name].tobytes() for name in sorted(values))).hexdigest()
        return AdapterSource(name, values, LABELS, version, digest, parent)

    return make


@pytest.fixture
def bundle(tmp_path: Path, exported: ExportedBase, source: Source, vendor: IdentityKey, household: IdentityKey) -> Path:
    """A bundle with a global adapter, and the pinned keys of vendor and household next to it."""
    write_bundle(tmp_path / "bundle", exported, [source()], key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem() + household.public.to_pem())
    return tmp_path / "bundle"


@pytest.fixture
def with_anna(bundle: Path, exported: ExportedBase, source: Source, household: IdentityKey) -> Path:
    add_adapter(bundle, exported.adapter_inputs, source("anna", seed=7, parent="a" * 64), key=household)
    return bundle


@pytest.fixture
def add(bundle: Path, exported: ExportedBase, household: IdentityKey) -> Callable[[AdapterSource], None]:
    return lambda source: add_adapter(bundle, exported.adapter_inputs, source, key=household)


# Language models

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LETTERS = (*SPECIAL, chr(288), *(chr(code) for code in range(33, 127)))  # chr(288) is a space to the tokenizer
TOKENIZER = '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}'
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

MakeLm = Callable[..., Base]


@pytest.fixture(scope="session")
def make_lm(tmp_path_factory: pytest.TempPathFactory) -> MakeLm:
    """Makes a base of an architecture in transformers' words; keywords are keys of its configuration.

    A key that the architecture does not take has the value ``...``.
    """

    def make(kind: str = "llama", **settings: Any) -> Base:
        folder = tmp_path_factory.mktemp(kind)
        sizes = {
            "vocab_size": len(LETTERS),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        }
        given = {name: value for name, value in (sizes | settings).items() if value is not ...}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, value in model.named_parameters():
                noise = 0.2 * torch.randn(value.shape, generator=generator)
                value.copy_(noise + 1 if "norm" in name or "ln_" in name else noise)
        model.save_pretrained(folder)
        tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(LETTERS)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(TOKENIZER)
        return find_base(str(folder))

    return make


@pytest.fixture(scope="session")
def llama(make_lm: MakeLm) -> Base:
    return make_lm()


@pytest.fixture(scope="session")
def drawn() -> Callable[[PeftModel, int], Tensors]:
    """Gives a model's adapter random values, and returns them."""

    def draw(model: PeftModel, seed: int) -> Tensors:
        rng = np.random.default_rng(seed)
        values = {
            name: 0.3 * rng.standard_normal(value.shape, dtype=np.float32)
            for name, value in causal.tensors(model).items()
        }
        causal.load(model, values)
        return values

    return draw


TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ':' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)


@pytest.fixture(scope="session")
def lm_base(make_lm: Any) -> Any:
    """A language model of two layers that reads 256 tokens, one for each letter, and has a chat template."""
    base = make_lm(max_position_embeddings=256)
    settings = base.folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
    return base


@pytest.fixture(scope="session")
def lm_model(lm_base: Any) -> Callable[[int, int], Any]:
    """Makes the torch model with an adapter: rank and seed of its values. One with rank 0 is the bare base."""

    def make(rank: int, seed: int) -> Any:
        model = causal.build(lm_base, PeftConfig.lora(rank=rank, alpha=2 * rank, targets=("q_proj", "v_proj")))
        rng = np.random.default_rng(seed)
        values = {n: (0.4 * rng.standard_normal(v.shape)).astype(np.float32) for n, v in causal.tensors(model).items()}
        causal.load(model, values)
        return model

    return make


@pytest.fixture(scope="session")
def lm_exported(lm_base: Any) -> ExportedBase:
    return export_causal(lm_base, ("q_proj", "v_proj"), Profile.FP32, max_rank=16)


@pytest.fixture(scope="session")
def lm_source(lm_model: Callable[[int, int], Any]) -> Callable[..., AdapterSource]:
    @cache
    def made(rank: int, seed: int) -> AdapterSource:
        model = lm_model(rank, seed)
        return AdapterSource("global", causal.tensors(model), (), 3, "a" * 64, adapter_inputs=adapter_inputs(model))

    def make(name: str = "global", rank: int = 4, seed: int = 1, **fields: Any) -> AdapterSource:
        return replace(made(rank, seed), name=name, **fields)

    return make


@pytest.fixture
def lm_bundle(tmp_path: Path, lm_exported: ExportedBase, lm_source: Any, vendor: IdentityKey) -> Path:
    """A language model with a global adapter of rank 4 and a personal one of rank 6, both in float32."""
    sources = [lm_source(), lm_source("anna", 6, 2, parent="b" * 64)]
    write_bundle(tmp_path / "lm", lm_exported, sources, key=vendor, form="fp32")
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    return tmp_path / "lm"


@pytest.fixture
def engine(lm_bundle: Path) -> GenerationEngine:
    return GenerationEngine(Library.open(lm_bundle, None).base, 1)


@pytest.fixture
def generator(lm_bundle: Path, engine: GenerationEngine) -> Generator:
    return Generator(Library.open(lm_bundle, None), engine, loaded=8, loaded_bytes=2**20)


FIXTURES = {name: value for name, value in globals().items() if isinstance(value, type(tiny_base))}
