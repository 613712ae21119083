"""Trains an adapter of a causal language model on a device's texts (``encoding``) with torch, and scores it."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from threading import RLock

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from adapters import causal, pretrained
from adapters.base import Base
from adapters.classifier import padded
from adapters.layout import Layout, Tensors
from adapters.peftconfig import PeftConfig
from adapters.task import MAX_LOSS, Task
from aggregation.errors import DataError
from client.training.batches import batches, parts
from client.training.control import UNLIMITED, TrainingControl
from client.training.encoding import IGNORED, Encoded, TextEncoder, learned_tokens
from client.training.examples import Example, Score
from client.training.trainer import fit, flushed_denormals, squares, values

EVALUATION_BATCH = 16  # texts


class LanguageTrainer:
    """A frozen language model with one adapter, and its tokenizer. Threads may share it: one trains at a time."""

    def __init__(self, base: Base, config: PeftConfig) -> None:
        self.base, self._lock = base, RLock()
        with flushed_denormals():
            self.model = causal.build(base, config)
        causal.require_private(self.model)
        self.adapter = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.layout = Layout.of(causal.tensors(self.model))
        self.encoder = TextEncoder.of(
            pretrained.tokenizer(base),
            pretrained.chat_template(base),
            pretrained.end_token(self.model),
            getattr(self.model.get_base_model().config, "max_position_embeddings", None),
            config.num_virtual_tokens,
        )

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
        """Train for ``epochs`` passes over ``examples``, starting from ``start``.

        The loss is the mean cross-entropy of a batch's learned tokens. Arguments, result and
        errors are those of ``trainer.Trainer.train``; an example has a text and maybe a prompt.
        """
        if not examples:
            raise DataError("there are no examples to train on; add some", about="examples", value=0)
        with self._lock, flushed_denormals():
            causal.load(self.model, start)
            encoded, virtual = self.encode(examples), task.peft_config.num_virtual_tokens

            def losses(batch: list[int]) -> Iterator[Tensor]:
                learned = learned_tokens([encoded[i] for i in batch])
                for part in parts([len(encoded[i].ids) + virtual for i in batch], control.tokens):
                    logits, targets = self._forward([encoded[batch[i]] for i in part])
                    flat = logits.flatten(0, 1), targets.flatten()
                    yield cross_entropy(*flat, ignore_index=IGNORED, reduction="sum") / learned

            order = list(batches([len(each.ids) for each in encoded], task.batch_size, epochs, rng))
            with squares(self.model, task) as extra:
                now = partial(causal.tensors, self.model)
                fit(self.adapter | extra, order, losses, task, step, epochs=epochs, control=control, tensors=now)
            return causal.tensors(self.model) | values(extra)

    def score(self, adapter: Tensors, examples: Sequence[Example]) -> Score:
        """Score an adapter on ``examples``; all zeros if there are none.

        Args:
            adapter: Tensors in ``layout``.
            examples: Their order makes no difference.

        Returns:
            The sums over the examples of the share of learned tokens that are the most probable ones, and of the
            cross-entropy in nats for each byte of the text, at most ``MAX_LOSS``.
        """
        correct = loss = 0.0
        encoded = sorted(self.encode(examples), key=lambda each: len(each.ids))
        with self._lock, torch.inference_mode(), flushed_denormals():
            causal.load(self.model, adapter)
            for at in range(0, len(encoded), EVALUATION_BATCH):
                batch = encoded[at : at + EVALUATION_BATCH]
                logits, targets = self._forward(batch)
                for row, wanted, each in zip(logits, targets, batch, strict=True):
                    learned = wanted != IGNORED
                    nats = cross_entropy(row[learned], wanted[learned], reduction="sum")
                    correct += float((row[learned].argmax(1) == wanted[learned]).float().mean())
                    loss += min(float(nats) / each.size, MAX_LOSS)
        return Score(correct, len(examples), loss)

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Tokens and targets of each example, in order. Raises as ``TextEncoder.encode``."""
        return [self.encoder.encode(example) for example in examples]

    def _forward(self, batch: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Logits, shape ``(batch, longest, vocabulary)``, and targets, ``(batch, longest)``."""
        ids, mask = padded([torch.from_numpy(each.ids) for each in batch])
        targets = torch.full_like(ids, IGNORED)
        for row, each in zip(targets, batch, strict=True):
            row[: len(each.targets)] = torch.from_numpy(each.targets)
        # Prompt tuning has logits of its virtual tokens as well, before those of a text.
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]
        return logits, targets


@lru_cache(maxsize=2)
def load_language_trainer(base: Base, config: PeftConfig) -> LanguageTrainer:
    """A trainer that stays loaded for the next message. Its methods load the adapter that they are given."""
    return LanguageTrainer(base, config)
