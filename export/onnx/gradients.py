"""The gradients of an exported training graph, held to those of torch's autograd on the same weights.

Every slot is compared, for batches of several shapes with rows of different lengths, as devices run them.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from adapters.bundle import TRAINING
from adapters.graphinputs import GIVEN, LORA_A, LORA_B, PROMPT
from adapters.layout import Floats, Tensors
from adapters.peft.inputs import LABELS
from adapters.traininggraph import TrainingBatch, TrainingGraph, batch_of
from aggregation.errors import ConfigError
from export.onnx.dequantize import BITS, round_weights
from export.onnx.exported import Profile
from export.onnx.headers import Slots
from export.onnx.peftmodel import SlottedModel, with_inputs

SHAPES = ((1, 1), (2, 3), (5, 9), (4, 32))  # texts × tokens of the longest
RANK, COUNT = 3, 5  # of the adapters that are tried: their rank, as many virtual tokens, and labels
LIMIT = 1e-4  # of a difference, relative to the largest gradient of its slot and ``SMALL``
SMALL = 1e-2  # a gradient below it is rounding error in part: that by a query of a text with one token is 0 in truth
MAX_REASON = 200  # characters of ONNX Runtime's message


def check_gradients(
    folder: Path, slotted: SlottedModel, slots: Slots, profile: Profile, ids: Sequence[int], longest: int
) -> float:
    """Compare the training graph in ``folder`` with torch.

    Args:
        folder: Of the base.
        slotted: The model in float32 that was exported.
        slots: Of the base.
        profile: Of the base; torch gets the weights as it stores them.
        ids: The tokens of a text; the texts that are compared are drawn from them.
        longest: Tokens of the longest text that the base reads.

    Returns:
        The largest difference of a gradient, relative to the largest gradient of its slot and ``SMALL``.

    Raises:
        ConfigError: The graph does not run, or its loss or a gradient is further from torch's than ``LIMIT``; about
            ``loss`` or the slot.
    """
    model = SlottedModel(copy.deepcopy(slotted.model), slotted.inputs)
    if profile in BITS:
        round_weights(model.model, BITS[profile])
    module = with_inputs(model).requires_grad_(False)
    graph = TrainingGraph((folder / TRAINING).read_bytes(), folder)
    longest -= RANK if PROMPT in slots else 0
    rng, worst = np.random.default_rng(0), 0.0
    for texts, length in SHAPES:
        batch, inputs = _drawn(rng, slots, ids, texts, min(length, longest))
        expected = _in_torch(module, batch, inputs)
        try:
            loss, found = graph.gradients(batch, inputs)
        except Exception as error:  # onnxruntime raises classes without a common base
            reason = " ".join(str(error).split())[:MAX_REASON]
            raise ConfigError(f"the training graph does not run: {reason}", about="training") from error
        both = found | {"loss": np.array(loss)}
        for name, wanted in expected.items():
            if not wanted.size:
                continue
            difference = float(np.abs(both[name] - wanted).max()) / (float(np.abs(wanted).max()) + SMALL)
            if not difference <= LIMIT:
                raise ConfigError(
                    f"{name}: the training graph is {difference:.2g} from torch, at most {LIMIT:g}: export the base "
                    "with --no-training",
                    about=name,
                    value=difference,
                )
            worst = max(worst, difference)
    return worst


def _in_torch(module: torch.nn.Module, batch: TrainingBatch, inputs: Tensors) -> Tensors:
    """The loss and the gradient by each slot."""
    adapter = {name: torch.from_numpy(value).requires_grad_() for name, value in inputs.items()}
    logits = module(torch.from_numpy(batch.ids), torch.from_numpy(batch.mask), adapter)
    losses = cross_entropy(logits, torch.from_numpy(batch.targets), reduction="none")
    loss = (losses * torch.from_numpy(batch.shares)).sum()
    gradients = torch.autograd.grad(loss, list(adapter.values()))
    return {"loss": loss.detach().numpy()} | {n: g.numpy() for n, g in zip(adapter, gradients, strict=True)}


def _drawn(
    rng: np.random.Generator, slots: Slots, ids: Sequence[int], texts: int, longest: int
) -> tuple[TrainingBatch, Tensors]:
    """A batch with rows of different lengths and shares, and an adapter whose updates are as large as what it reads."""
    lengths = rng.permutation([max(1, longest - 2 * row) for row in range(texts)])
    shares = rng.random(texts) / texts
    batch = batch_of(
        [rng.choice(ids, n).tolist() for n in lengths], rng.integers(0, COUNT, texts).tolist(), shares.tolist()
    )
    inputs: dict[str, Floats] = {}
    for name, dimensions in slots.items():
        shape = [_size(text, texts) for text in dimensions]
        width = shape[0] if name.endswith((LORA_A, LORA_B)) else shape[-1]
        inputs[name] = (rng.standard_normal(shape) / np.sqrt(width)).astype(np.float32)
    return batch, inputs


def _size(text: str, texts: int) -> int:
    """Of a dimension; a vector is there in batches of several texts, and not in others."""
    if text.startswith(GIVEN):
        return min(texts - 1, 1)
    return int(text) if text.isdigit() else COUNT if text == LABELS else RANK
