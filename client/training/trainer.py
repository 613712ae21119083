"""Trains an adapter with AdamW on a device's examples, and scores it on held-out examples.

Training is deterministic for given tensors, examples and generator on one machine with one number of threads: the model
stays in evaluation mode (no dropout), and the generator orders the examples. Rounds, masks and messages are not handled
here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adapters import classifier
from adapters.base import Base
from adapters.layout import Layout, Tensors
from adapters.lorasb import frozen_factor, square_name
from adapters.parts import Part, part_of
from adapters.peftconfig import PeftConfig
from adapters.task import MAX_LOSS, Task
from aggregation.errors import DataError
from client.training.batches import batches
from client.training.descent import finite
from client.training.examples import Example, Score

LORA_B = ".lora_B.default"  # ends the path of a layer's B in peft's model


class Trainer:
    """A frozen base with one adapter, and its tokenizer. Threads may share it: one trains or embeds at a time."""

    def __init__(self, base: Base, task_labels: int, config: PeftConfig) -> None:
        self.base, self._lock = base, Lock()
        with flushed_denormals():  # torch's threads keep what holds when they start
            self.model: PeftModel = classifier.build(base, task_labels, config)
        # On short texts, without fused kernels, a step of multilingual-e5-small takes a fifth less time.
        self.model.get_base_model().encoder.set_attn_implementation("eager")
        self.adapter = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.layout = Layout.of(classifier.tensors(self.model))
        self.tokenizer = classifier.tokenizer(base, self.model)

    def train(
        self,
        start: Tensors,
        examples: Sequence[Example],
        task: Task,
        *,
        epochs: int,
        rng: np.random.Generator,
        step: Callable[[], object] = lambda: None,
    ) -> Tensors:
        """Train for ``epochs`` passes over ``examples``, starting from ``start``, with cross-entropy and AdamW.

        Args:
            start: Tensors in ``layout``; the caller checks them.
            examples: At least one.
            task: Batch size, learning rate, weight decay and proximal term; parts that it does not train stay.
            epochs: Passes over the examples.
            rng: Draws the order of the examples.
            step: Called before each batch; an exception that it raises ends the training.

        Returns:
            Tensors in ``layout``, and R if the task trains it (``adapters.lorasb``), float32 and finite. Guarantee:
            equal arguments give equal tensors, whatever was trained before, and the base does not change.

        Raises:
            DataError: There are no examples, or the loss or a tensor is not finite.
        """
        if not examples:
            raise DataError("there are no examples to train on; add some", about="examples", value=0)
        with self._lock, flushed_denormals():
            return self._train(start, examples, task, epochs, rng, step)

    def _train(
        self,
        start: Tensors,
        examples: Sequence[Example],
        task: Task,
        epochs: int,
        rng: np.random.Generator,
        step: Callable[[], object],
    ) -> Tensors:
        classifier.load(self.model, start)
        tokens = self._tokens([e.text for e in examples])
        labels = torch.tensor([e.label for e in examples])

        def loss(batch: list[int]) -> Tensor:
            return cross_entropy(self._forward(*classifier.padded([tokens[i] for i in batch])), labels[batch])

        order = batches([len(ids) for ids in tokens], task.batch_size, epochs, rng)
        with squares(self.model, task) as extra:
            fit(self.adapter | extra, order, loss, task, step)
        return finite(classifier.tensors(self.model) | values(extra))

    def score(self, adapter: Tensors, examples: Sequence[Example]) -> Score:
        """Score an adapter on ``examples``; all zeros if there are none.

        Args:
            adapter: Tensors in ``layout``.
            examples: Their order makes no difference.

        Returns:
            Correct answers, examples, and the sum of the cross-entropies in nats, each at most ``MAX_LOSS``.
        """
        logits = self.logits(adapter, [e.text for e in examples])
        if not examples:
            return Score(0, 0, 0.0)
        labels = torch.tensor([e.label for e in examples])
        losses = cross_entropy(torch.from_numpy(logits), labels, reduction="none").clamp(max=MAX_LOSS)
        correct = int((torch.from_numpy(logits).argmax(1) == labels).sum())
        return Score(correct, len(examples), float(losses.sum()))

    def logits(self, adapter: Tensors, texts: Sequence[str]) -> NDArray[np.float32]:
        """Logits, shape ``(len(texts), labels)``; ``(0, 0)`` without texts."""
        if not texts:
            return np.zeros((0, 0), np.float32)
        with self._lock, torch.inference_mode(), flushed_denormals():
            classifier.load(self.model, adapter)
            return classifier.in_batches(self._forward, self._tokens(texts)).numpy()

    def embed(self, texts: Sequence[str], adapter: Tensors | None = None) -> NDArray[np.float32]:
        """Embeddings, shape ``(len(texts), hidden)``, each of L2 norm 1.

        Args:
            texts: In any number.
            adapter: With which the base embeds them; None: the frozen base alone.
        """
        base = self.model.get_base_model()
        if not texts:
            return np.zeros((0, base.encoder.config.hidden_size), np.float32)
        alone = self.model.disable_adapter() if adapter is None else nullcontext()
        with self._lock, torch.inference_mode(), flushed_denormals(), alone:
            if adapter is not None:
                classifier.load(self.model, adapter)
            return classifier.in_batches(base.embed, self._tokens(texts)).numpy()

    def _forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits, shape ``(texts, labels)``, of token ids of shape ``(texts, longest)``."""
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask)
        return logits

    def _tokens(self, texts: Sequence[str]) -> list[Tensor]:
        return [torch.tensor(encoding.ids) for encoding in self.tokenizer.encode_batch(list(texts))]


def fit(
    adapter: Mapping[str, nn.Parameter],
    order: Iterable[list[int]],
    loss_of: Callable[[list[int]], Tensor],
    task: Task,
    step: Callable[[], object],
) -> None:
    """Minimize a loss with AdamW over the parts of an adapter that a task trains, in place.

    Args:
        adapter: Its parameters, by peft's names.
        order: Batches, as indices of examples.
        loss_of: Batch → its mean loss.
        task: Learning rate, weight decay, proximal term and parts.
        step: Called before each batch; an exception that it raises ends the training.

    Raises:
        DataError: The adapter has none of the parts, or a loss is not finite.
    """
    for name, parameter in adapter.items():
        parameter.requires_grad_(part_of(name) in task.trained)
    parameters = [parameter for parameter in adapter.values() if parameter.requires_grad]
    if not parameters:
        raise DataError("the adapter has none of the parts that the task trains", about="task.trained")
    anchors = [parameter.detach().clone() for parameter in parameters] if task.proximal else []
    optimizer = torch.optim.AdamW(parameters, lr=task.learning_rate, weight_decay=task.weight_decay)
    for batch in order:
        step()
        loss = loss_of(batch)
        if not torch.isfinite(loss):
            raise DataError("the training loss is not finite; lower the learning rate", about="training.loss")
        if anchors:  # FedProx (Li et al. 2020); Ditto's personal objective is the same (Li et al. 2021)
            distance = torch.stack([((p - a) ** 2).sum() for p, a in zip(parameters, anchors, strict=True)]).sum()
            loss = loss + task.proximal / 2 * distance
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@contextmanager
def squares(model: nn.Module, task: Task) -> Iterator[dict[str, nn.Parameter]]:
    """R of each LoRA layer of a model, zero at first, while the block runs; none if the task does not train R.

    Args:
        model: Of peft.
        task: Of the round.

    Yields:
        Name of R → parameter, shape ``(rank, rank)``.
    """
    found, hooks = dict[str, nn.Parameter](), []
    for path, layer in model.named_modules():
        if Part.R in task.trained and path.endswith(LORA_B):
            name = f"{path.removesuffix('.default')}.weight"
            found[square_name(name)] = square = nn.Parameter(torch.zeros(layer.in_features, layer.in_features))
            frozen = torch.from_numpy(frozen_factor(name, tuple(layer.weight.shape)))
            hooks.append(layer.register_forward_hook(_adding(square, frozen)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def values(parameters: Mapping[str, nn.Parameter]) -> Tensors:
    """Copies of the parameters as float32 arrays."""
    return {name: np.array(parameter.detach().numpy()) for name, parameter in parameters.items()}


def _adding(square: Tensor, frozen: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook of a layer that computes B z: it makes that (B + F R) z."""

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + inputs[0] @ square.T @ frozen.T

    return add


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Compute with zero in place of denormal numbers, in this thread and those that torch starts meanwhile.

    A processor takes up to a hundred times as long for them, so that an adapter could slow down a step for some
    examples alone.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)  # the coordinator of a simulation computes in this process as well


@lru_cache(maxsize=2)
def load_trainer(base: Base, labels: int, config: PeftConfig) -> Trainer:
    """A trainer that stays loaded for the next message. Its methods load the adapter that they are given."""
    return Trainer(base, labels, config)
