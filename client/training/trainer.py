"""Trains an adapter on a device's examples, and scores it on held-out examples.

Training is deterministic for given tensors, examples and generator on one machine with one number of threads: the model
stays in evaluation mode (no dropout), and the generator orders the examples. Rounds, masks and messages are not handled
here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from threading import RLock

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
from adapters.parts import Part, is_bias, part_of
from adapters.peftconfig import PeftConfig
from adapters.task import MAX_LOSS, Task
from aggregation.errors import DataError
from client.training.batches import batches, parts
from client.training.control import UNLIMITED, TrainingControl
from client.training.descent import descend
from client.training.examples import Example, Score

LORA_B = ".lora_B.default"  # ends the path of a layer's B in peft's model


class Trainer:
    """A frozen base with one adapter, and its tokenizer. Threads may share it: one trains or embeds at a time."""

    def __init__(self, base: Base, task_labels: int, config: PeftConfig) -> None:
        self.base, self._lock = base, RLock()
        with flushed_denormals():  # torch's threads keep what holds when they start
            self.model: PeftModel = classifier.build(base, task_labels, config)
        # On short texts, without fused kernels, a step of multilingual-e5-small takes a fifth less time.
        self.model.get_base_model().encoder.set_attn_implementation("eager")
        self.adapter = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._biases = values({name: p for name, p in self.adapter.items() if is_bias(name)})  # the base's own
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
        control: TrainingControl = UNLIMITED,
    ) -> Tensors:
        """Train for ``epochs`` passes over ``examples``, starting from ``start``, with cross-entropy.

        Args:
            start: Tensors in ``layout``; the caller checks them.
            examples: At least one.
            task: Batch size, optimizer and its settings; parts that it does not train stay.
            epochs: Passes over the examples.
            rng: Draws the order of the examples.
            step: Called before each batch; an exception that it raises ends the training.
            control: Limits of this device.

        Returns:
            Tensors in ``layout``, and R if the task trains it (``adapters.lorasb``), float32 and finite. Guarantee:
            equal arguments give equal tensors, whatever was trained before, and the base does not change.

        Raises:
            DataError: There are no examples.
        """
        if not examples:
            raise DataError("there are no examples to train on; add some", about="examples", value=0)
        with self._lock, flushed_denormals():
            return self._train(start, examples, task, epochs, rng, step, control)

    def _train(
        self,
        start: Tensors,
        examples: Sequence[Example],
        task: Task,
        epochs: int,
        rng: np.random.Generator,
        step: Callable[[], object],
        control: TrainingControl,
    ) -> Tensors:
        classifier.load(self.model, start)
        tokens = self._tokens([e.text for e in examples])
        labels = torch.tensor([e.label for e in examples])

        def losses(batch: list[int]) -> Iterator[Tensor]:
            for part in parts([len(tokens[i]) for i in batch], control.tokens):
                rows = [batch[i] for i in part]
                logits = self._forward(*classifier.padded([tokens[i] for i in rows]))
                yield cross_entropy(logits, labels[rows], reduction="sum") / len(batch)

        order = list(batches([len(ids) for ids in tokens], task.batch_size, epochs, rng))
        with squares(self.model, task) as extra:
            now = partial(classifier.tensors, self.model)
            fit(self.adapter | extra, order, losses, task, step, epochs=epochs, control=control, tensors=now)
        return classifier.tensors(self.model) | values(extra)

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
            else:  # peft leaves trained biases in place where it disables an adapter
                place({name: self.adapter[name] for name in self._biases}, self._biases)
            return classifier.in_batches(base.embed, self._tokens(texts)).numpy()

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(encoding.ids) for encoding in self.tokenizer.encode_batch(list(texts))]

    def _forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits, shape ``(texts, labels)``, of token ids of shape ``(texts, longest)``."""
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask)
        return logits

    def _tokens(self, texts: Sequence[str]) -> list[Tensor]:
        return [torch.tensor(ids) for ids in self.tokens(texts)]


def fit(
    adapter: Mapping[str, nn.Parameter],
    order: Sequence[list[int]],
    losses_of: Callable[[list[int]], Iterator[Tensor]],
    task: Task,
    step: Callable[[], object],
    *,
    epochs: int,
    control: TrainingControl,
    tensors: Callable[[], Tensors],
) -> None:
    """Minimize a loss over the parts of an adapter that a task trains, in place, as ``descent.descend``.

    Args:
        adapter: Its parameters, by peft's names.
        order, task, step, epochs, control: As of ``descend``.
        losses_of: Batch → the losses of its parts, which add up to its mean loss.
        tensors: The adapter of the parameters' values now, as ``control.held_out`` takes it.

    Raises:
        DataError: As ``descend``.
    """
    for name, parameter in adapter.items():
        parameter.requires_grad_(part_of(name) in task.trained)
    trained = {name: parameter for name, parameter in adapter.items() if parameter.requires_grad}

    def gradients_of(now: Tensors, batch: list[int]) -> tuple[float, Tensors]:
        place(adapter, now)
        total = 0.0
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
        for loss in losses_of(batch):
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total, {name: np.array(parameter.grad) for name, parameter in trained.items()}

    def held_out(now: Tensors) -> float:
        place(adapter, now)
        try:
            return control.held_out(tensors()) if control.held_out else 0.0
        finally:
            torch.set_flush_denormal(True)  # which scoring ended

    bounded = replace(control, held_out=held_out if control.held_out else None)
    place(adapter, descend(values(adapter), order, gradients_of, task, step, epochs=epochs, control=bounded))


def place(parameters: Mapping[str, nn.Parameter], found: Tensors) -> None:
    """Set parameters to the values of their names."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(found[name]))


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
