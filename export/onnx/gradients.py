"""The gradients of an exported training graph, held to those of torch's autograd on the same weights. Every slot is
compared, for batches of several shapes with rows of different lengths, as devices run them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from aggregation.errors import ConfigError, one_line
from edgeadapt.bases.traininggraph import OWN_BIAS, WEIGHT_NORM, TrainingBatch, TrainingGraph, batch_of
from edgeadapt.formats.bundle import LOWER, TRAINING
from edgeadapt.formats.graphinputs import GIVEN, LORA_A, LORA_B, OUTPUT_SCALE, PREFIX, PROMPT, RANKED, VIRTUAL
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.methods.peft.inputs import LABELS
from export.onnx.headers import Slots
from export.onnx.peftmodel import LayerInput, ReplacedInput

SHAPES = ((1, 1), (2, 3), (5, 9), (4, 32))  # texts × tokens of the longest
RANK, COUNT = 3, 5  # rank and virtual tokens of the adapters that are tried, and labels
LIMIT = 1e-4  # largest difference, relative to the largest gradient of its slot and ``SMALL``
STATES_LIMIT = 0.2  # relative difference of states: with one scale for all activations of a MatMul, half of it
LANGUAGE_LIMIT = 2e-3  # the same of a language model: thirty layers in float32 round off more (docs/decisions/0070)
SMALL = 1e-2  # a gradient below it is rounding error in part: that by a query of a text with one token is 0 in truth


def check_gradients(
    folder: Path,
    module: torch.nn.Module,
    slots: Slots,
    ids: Sequence[int],
    most: tuple[int, int],
    *,
    language: bool = False,
) -> float:
    """Compare the training graph in ``folder``, a base's, with torch.

    ``module`` is the model that was exported, in float32 with the weights as the graph stores them, frozen; the texts
    that are compared are drawn from ``ids``, and have tokens from the first number of ``most`` to the second. Where a
    graph of the lower layers computes states, both go on from these, which are within ``STATES_LIMIT`` of torch's.
    Returns the largest difference of a gradient, relative to the largest
    gradient of its slot and ``SMALL``. Raises ConfigError: the graph does not run, or its loss or a gradient is further
    from torch's than ``LIMIT``, or ``LANGUAGE_LIMIT``; about ``loss`` or the slot."""
    module.requires_grad_(False)
    lower = (folder / LOWER).read_bytes() if (folder / LOWER).exists() else None
    graph = TrainingGraph((folder / TRAINING).read_bytes(), folder, lower=lower)
    shortest, longest = most
    virtual = slots.keys() & VIRTUAL.keys()
    count = min(RANK, (longest - 1) // len(virtual)) if virtual else 0
    longest -= count * len(virtual)
    rng, worst, limit = np.random.default_rng(0), 0.0, LANGUAGE_LIMIT if language else LIMIT
    for texts, length in SHAPES:
        batch, inputs = _drawn(rng, slots, ids, texts, (shortest, min(length, longest)), count)
        if PROMPT in slots:
            inputs[PROMPT] = _embedded(module, rng.choice(ids, len(inputs[PROMPT])))
        batch = _learned(rng, batch, ids) if language else _labelled(rng, batch, module, inputs)
        try:
            states = None if graph.lower is None else graph.lower.states(batch.ids, batch.mask)
            loss, gradients = graph.gradients(batch, inputs)
            norms = graph.weight_norms(inputs, graph.normed)
            biases = graph.own_biases()
        except Exception as error:  # onnxruntime raises classes without a common base
            reason = one_line(error)
            raise ConfigError(f"the training graph does not run: {reason}", about="training") from error
        try:
            with nullcontext() if states is None else _from_states(module, batch, inputs, states):
                expected = _in_torch(module, batch, inputs)
        except RuntimeError as error:  # torch's: the states come from above a slot
            reason = "the gradients of these slots cannot be compared from states: export the base with --layers 0"
            raise ConfigError(reason, about="--layers") from error
        both = gradients | {"loss": np.array(loss)} | {path + WEIGHT_NORM: value for path, value in norms.items()}
        both |= {path + OWN_BIAS: value for path, value in biases.items()}
        for name, wanted in (expected | _for_dora(module, inputs)).items():
            if not wanted.size:
                continue
            difference = float(np.abs(both[name] - wanted).max()) / (float(np.abs(wanted).max()) + SMALL)
            if not difference <= limit:
                raise ConfigError(
                    f"{name}: the training graph is {difference:.2g} from torch, at most {limit:g}: export the base "
                    "with --no-training",
                    about=name,
                )
            worst = max(worst, difference)
    return worst


def _in_torch(module: torch.nn.Module, batch: TrainingBatch, inputs: Tensors) -> Tensors:
    adapter = {name: torch.from_numpy(value).requires_grad_() for name, value in inputs.items()}
    positions = [] if batch.positions is None else [torch.from_numpy(batch.positions)]
    logits = module(torch.from_numpy(batch.ids), torch.from_numpy(batch.mask), *positions, adapter)
    losses = cross_entropy(logits, torch.from_numpy(batch.targets), reduction="none")
    loss = (losses * torch.from_numpy(batch.shares)).sum()
    gradients = torch.autograd.grad(loss, list(adapter.values()))
    return {"loss": loss.detach().numpy()} | {n: g.numpy() for n, g in zip(adapter, gradients, strict=True)}


@contextmanager
def _from_states(module: torch.nn.Module, batch: TrainingBatch, inputs: Tensors, states: Floats) -> Iterator[None]:
    """While the block runs, let the module that returns the states, within rounding, return these instead. Raises
    ConfigError: no module's output is near them."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Callable[[torch.nn.Module, Any, Any], None]:
        return lambda _, __, output: outputs.update({path: output[0] if isinstance(output, tuple) else output})

    def replaced(_: torch.nn.Module, __: Any, output: Any) -> Any:
        values = torch.from_numpy(states)
        return (values, *output[1:]) if isinstance(output, tuple) else values

    hooks = [each.register_forward_hook(keep(path)) for path, each in module.named_modules()]
    _in_torch(module, batch, inputs)
    for hook in hooks:
        hook.remove()
    read = batch.mask.astype(bool) if batch.mask.shape == states.shape[:2] else np.ones(states.shape[:2], bool)
    same = {n: v.detach().numpy()[read] for n, v in outputs.items() if getattr(v, "shape", None) == states.shape}
    distances = {n: float(np.linalg.norm(v - states[read]) / np.linalg.norm(v)) for n, v in same.items()}
    nearest = min(distances, key=lambda name: distances[name], default="")
    if not distances.get(nearest, np.inf) <= STATES_LIMIT:
        raise ConfigError(
            f"{LOWER}: its states are not those of any module in torch: export the base with --layers 0", about=LOWER
        )
    hook = module.get_submodule(nearest).register_forward_hook(replaced)
    try:
        yield
    finally:
        hook.remove()


def _for_dora(module: torch.nn.Module, inputs: Tensors) -> Tensors:
    """Compute the norms of the weights with an update, and the biases, of the layers with slots for DoRA."""
    tensors: dict[str, Floats] = {}
    for layer in module.modules():
        if not (isinstance(layer, LayerInput) and {LORA_A, OUTPUT_SCALE} <= layer.kinds):
            continue
        base: Any = layer.base.module if isinstance(layer.base, ReplacedInput) else layer.base
        update = inputs[layer.path + LORA_A] @ inputs[layer.path + LORA_B]
        tensors[layer.path + WEIGHT_NORM] = np.linalg.norm(base.weight.detach().numpy() + update.T, axis=1)
        if base.bias is not None:
            tensors[layer.path + OWN_BIAS] = base.bias.detach().numpy()
    return tensors


def _drawn(
    rng: np.random.Generator, slots: Slots, ids: Sequence[int], texts: int, most: tuple[int, int], virtual: int
) -> tuple[TrainingBatch, Tensors]:
    """Draw a batch with rows of different lengths and shares, and an adapter with updates as large as its inputs."""
    lengths = rng.permutation([max(most[0], most[1] - 2 * row) for row in range(texts)])
    shares = rng.random(texts) / texts
    batch = batch_of([rng.choice(ids, n).tolist() for n in lengths], [0] * texts, shares.tolist())
    inputs: dict[str, Floats] = {}
    for name, dimensions in slots.items():
        shape = [_size(text, texts, virtual) for text in dimensions]
        # Keys and values are about 1; among much smaller ones, a short text would multiply what torch rounds off.
        width = 1 if name == PREFIX else shape[0] if name.endswith(RANKED) else shape[-1]
        inputs[name] = (rng.standard_normal(shape) / np.sqrt(width)).astype(np.float32)
    return batch, inputs


def _embedded(module: Any, ids: NDArray[np.int64]) -> Floats:
    """Embed tokens, as which prompts begin. Smaller ones, normalized, multiply what torch rounds off."""
    inner = getattr(module, "model", module).inner
    with torch.no_grad():
        rows: Floats = inner.get_input_embeddings()(torch.from_numpy(ids)).numpy()
    return rows


def _labelled(
    rng: np.random.Generator, batch: TrainingBatch, module: torch.nn.Module, inputs: Tensors
) -> TrainingBatch:
    with torch.no_grad():
        logits = module(
            torch.from_numpy(batch.ids),
            torch.from_numpy(batch.mask),
            {n: torch.from_numpy(v) for n, v in inputs.items()},
        )
    return replace(batch, targets=rng.integers(0, logits.shape[1], len(batch.targets)))


def _learned(rng: np.random.Generator, batch: TrainingBatch, ids: Sequence[int]) -> TrainingBatch:
    read = np.flatnonzero(batch.mask)
    positions = np.sort(rng.choice(read, 1 + len(read) // 2, replace=False))
    shares = (rng.random(len(positions)) / len(positions)).astype(np.float32)
    return TrainingBatch(batch.ids, batch.mask, rng.choice(ids, len(positions)), shares, positions)


def _size(text: str, texts: int, virtual: int) -> int:
    """Choose the size of a dimension; vectors and virtual tokens are there in batches of several texts only."""
    if text.startswith(GIVEN):
        return min(texts - 1, 1)
    if text in VIRTUAL.values():
        return virtual if texts > 1 else 0
    return int(text) if text.isdigit() else COUNT if text == LABELS else RANK
