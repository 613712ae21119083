"""Training on the device: a few epochs of AdamW over the adapter's tensors, and its score on held-out examples.

Deterministic for a given start, examples and seed: the model stays in evaluation mode (no dropout), and the order of
the examples comes from an explicit generator. Nothing here knows of rounds, masks or messages.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from adapters import classifier
from adapters.base import Base
from adapters.layout import Layout, Tensors
from adapters.task import MAX_LOSS, Task
from aggregation.errors import DataError
from client.training.examples import Example

EVALUATION_BATCH = 64  # phrases; forward only, so larger than a training batch
MAX_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Score:
    """An adapter on some examples. ``loss`` is the sum of cross-entropies in nats, each clipped to ``MAX_LOSS``."""

    correct: int
    count: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of examples whose most probable label is theirs; NaN for no examples."""
        return self.correct / self.count if self.count else float("nan")


class Trainer:
    """The frozen base with one adapter slot, and the tokenizer that belongs to it."""

    def __init__(self, base: Base, task_labels: int, lora: classifier.LoraSpec) -> None:
        self.base = base
        self.model: PeftModel = classifier.build(base, task_labels, lora)
        self.layout = Layout.of(classifier.tensors(self.model))
        positions = self.model.get_base_model().encoder.config.max_position_embeddings
        self._tokenizer = _tokenizer(base.folder, min(MAX_TOKENS, positions))

    def train(self, start: Tensors, examples: Sequence[Example], task: Task, *, epochs: int, salt: str) -> Tensors:
        """The adapter after ``epochs`` passes over ``examples``, starting from ``start``.

        Args:
            start: In the layout of this trainer's model; checked by the caller.
            examples: At least one.
            task: Batch size, learning rate, weight decay and seed.
            epochs: Passes over the examples.
            salt: Mixed into the seed (a device's name and the round), so that devices shuffle differently.

        Raises:
            DataError: No examples, or loss or adapter are not finite (the learning rate is too high).
        """
        if not examples:
            raise DataError("there are no examples to train on")
        classifier.load(self.model, start)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=task.learning_rate, weight_decay=task.weight_decay)
        order, tokens = np.random.default_rng(seed(task, salt)), self._tokens([e.text for e in examples])
        labels = torch.tensor([e.label for e in examples])
        for batch in _batches([len(ids) for ids in tokens], task.batch_size, epochs, order):
            loss = cross_entropy(self._forward([tokens[i] for i in batch]), labels[batch])
            if not torch.isfinite(loss):
                raise DataError("the training loss is not finite: lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        trained = classifier.tensors(self.model)
        if not all(np.isfinite(tensor).all() for tensor in trained.values()):  # by the last step, which no loss follows
            raise DataError("the trained adapter is not finite: lower the learning rate")
        return trained

    def score(self, adapter: Tensors, examples: Sequence[Example]) -> Score:
        """The adapter's accuracy and loss on ``examples``."""
        logits = self.logits(adapter, [e.text for e in examples])
        if not examples:
            return Score(0, 0, 0.0)
        labels = torch.tensor([e.label for e in examples])
        losses = cross_entropy(torch.from_numpy(logits), labels, reduction="none").clamp(max=MAX_LOSS)
        correct = int((torch.from_numpy(logits).argmax(1) == labels).sum())
        return Score(correct, len(examples), float(losses.sum()))

    def logits(self, adapter: Tensors, texts: Sequence[str]) -> NDArray[np.float32]:
        """Logits, shape ``(len(texts), labels)``."""
        classifier.load(self.model, adapter)
        tokens = self._tokens(texts)
        with torch.inference_mode():
            rows = [self._forward(tokens[i : i + EVALUATION_BATCH]) for i in range(0, len(texts), EVALUATION_BATCH)]
        return torch.cat(rows).numpy() if rows else np.zeros((0, 0), np.float32)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit embeddings by the frozen base alone, shape ``(len(texts), hidden)``."""
        with torch.inference_mode(), self.model.disable_adapter():
            embeddings: Tensor = self.model.get_base_model().embed(*_padded(self._tokens(texts)))
        return embeddings.numpy()

    def _forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """Logits, shape ``(len(tokens), labels)``."""
        ids, mask = _padded(tokens)
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask)
        return logits

    def _tokens(self, texts: Sequence[str]) -> list[Tensor]:
        return [torch.tensor(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts))]


@lru_cache(maxsize=2)
def trainer(base: Base, labels: int, lora: classifier.LoraSpec) -> Trainer:
    """A process keeps the base loaded between messages; the adapter is set anew by every call."""
    return Trainer(base, labels, lora)


def _tokenizer(folder: Path, longest: int) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(longest)
    tokenizer.no_padding()
    return tokenizer


def _padded(tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both of shape ``(len(tokens), longest)``."""
    ids = pad_sequence(list(tokens), batch_first=True)
    return ids, pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)


def _batches(lengths: Sequence[int], size: int, epochs: int, order: np.random.Generator) -> Iterator[list[int]]:
    """Indices of each batch. Texts of like length go together, for less padding; ties and the order are drawn."""
    for _ in range(epochs):
        shuffled = order.permutation(len(lengths))
        grouped = shuffled[np.argsort(np.asarray(lengths)[shuffled], kind="stable")]
        batches = [grouped[start : start + size].tolist() for start in range(0, len(lengths), size)]
        yield from (batches[i] for i in order.permutation(len(batches)))


def seed(task: Task, salt: str) -> list[int]:
    """The seed of one device's random choices in one round, for ``numpy.random.default_rng``."""
    return [task.seed, int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "big")]
