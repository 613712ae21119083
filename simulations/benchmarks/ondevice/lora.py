"""The adapter that is measured: LoRA of rank 8 on queries and values, trained once and kept.

Its worth is that its perplexity means something; how it got there does not matter, so it is trained in this process, in
minutes, on what ``text.py`` gives.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters import causal, files
from adapters.base import Base
from adapters.cache import cached
from adapters.classifier import LoraSpec
from adapters.layout import Tensors
from simulations.benchmarks.ondevice.text import Tokens

ADAPTER = "adapter.safetensors"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the adapter is trained: AdamW, the rate falling to zero in a straight line."""

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    steps: int = 40
    windows: int = 8  # a step
    rate: float = 3e-3
    seed: int = 0

    @property
    def lora(self) -> LoraSpec:
        """Its shape."""
        return LoraSpec(self.rank, self.alpha, self.targets)

    def key(self, base: Base, windows: Tokens) -> str:
        """Names everything that the trained adapter depends on."""
        said = [dataclasses.asdict(self), base.digest, hashlib.sha256(windows.tobytes()).hexdigest()]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def trained(base: Base, recipe: Recipe, windows: Tokens, step: Callable[[], None]) -> Path:
    """The adapter's safetensors file in the user's cache, trained now if it is not there.

    Args:
        base: What it is for.
        recipe: How.
        windows: Shape ``(windows, tokens)``.
        step: Called after each step.

    Raises:
        ConfigError: The cache cannot be written, or the base has no such layers.
    """

    def make(folder: Path) -> None:
        (folder / ADAPTER).write_bytes(files.encode(_train(base, recipe, windows, step)))

    return cached(f"bench-adapter-{recipe.key(base, windows)}", make) / ADAPTER


def _train(base: Base, recipe: Recipe, windows: Tokens, step: Callable[[], None]) -> Tensors:
    model = causal.build(base, recipe.lora)
    generator = torch.Generator().manual_seed(recipe.seed)
    _begin(model, generator)
    trainable = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.rate)
    for done in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.rate * (1 - done / recipe.steps)
        chosen = torch.randint(len(windows), (recipe.windows,), generator=generator)
        optimizer.zero_grad()
        loss(model, torch.from_numpy(windows)[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        step()
    return causal.tensors(model)


def loss(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of every token of ``rows`` but the first of each."""
    scores = model(input_ids=rows).logits[:, :-1]
    return torch.nn.functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), rows[:, 1:].reshape(-1))


def _begin(model: torch.nn.Module, generator: torch.Generator) -> None:
    """A drawn as peft draws it but from ``generator``; B is zero as peft leaves it."""
    for name, value in model.named_parameters():
        if ".lora_A." in name:
            draw = torch.rand(value.shape, generator=generator)
            value.data.copy_((2 * draw - 1) / value.shape[1] ** 0.5)
