"""Trains an adapter of a causal language model on a device's texts, and scores it on held-out texts.

A text without a prompt is continued from its first token, which is not learned. A text with one is the answer to it,
in the base's chat template if it has one; only the answer is learned. A text is cut off at ``MAX_TOKENS``, or earlier
if the base reads fewer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from threading import RLock

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from adapters import causal, pretrained
from adapters.base import Base
from adapters.classifier import padded
from adapters.layout import Layout, Tensors
from adapters.peftconfig import PeftConfig
from adapters.task import MAX_LOSS, Task
from aggregation.errors import ConfigError, DataError
from client.training.batches import batches, parts
from client.training.control import UNLIMITED, TrainingControl
from client.training.descent import finite
from client.training.examples import Example, Score
from client.training.trainer import fit, flushed_denormals, squares, values

MAX_TOKENS = 128  # of a prompt with its text
EVALUATION_BATCH = 16  # texts
IGNORED = -100  # the label of a token that is not learned, as torch's cross-entropy has it


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text for training.

    Attributes:
        ids: Of all tokens, shape ``(tokens,)``.
        targets: The next token at each position, ``IGNORED`` where it is not learned; shape ``(tokens,)``.
        size: Bytes of the text that the learned tokens stand for, at least 1.
    """

    ids: Tensor
    targets: Tensor
    size: int


class LanguageTrainer:
    """A frozen language model with one adapter, and its tokenizer. Threads may share it: one trains at a time."""

    def __init__(self, base: Base, config: PeftConfig) -> None:
        self.base, self._lock = base, RLock()
        with flushed_denormals():
            self.model = causal.build(base, config)
        causal.require_private(self.model)
        self.longest = min(MAX_TOKENS, causal.room(self.model) or MAX_TOKENS)
        self.adapter = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.layout = Layout.of(causal.tensors(self.model))
        self.tokenizer = Tokenizer.from_file(str(base.folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.template = pretrained.chat_template(base)
        self.end = pretrained.end_token(self.model)

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
            encoded = self.encode(examples)

            def losses(batch: list[int]) -> Iterator[Tensor]:
                learned = sum(int((encoded[i].targets != IGNORED).sum()) for i in batch)
                for part in parts([len(encoded[i].ids) for i in batch], control.tokens):
                    logits, targets = self._forward([encoded[batch[i]] for i in part])
                    flat = logits.flatten(0, 1), targets.flatten()
                    yield cross_entropy(*flat, ignore_index=IGNORED, reduction="sum") / learned

            order = list(batches([len(each.ids) for each in encoded], task.batch_size, epochs, rng))
            with squares(self.model, task) as extra:
                now = partial(causal.tensors, self.model)
                fit(self.adapter | extra, order, losses, task, step, epochs=epochs, control=control, tensors=now)
            return finite(causal.tensors(self.model) | values(extra))

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
        """Tokens and targets of each example, in order.

        Raises:
            ConfigError: The chat template does not begin an answer with its prompt.
            DataError: The prompt leaves no room for a token of the text.
        """
        return [self._encode(example) for example in examples]

    def _encode(self, example: Example) -> Encoded:
        prompt, text, after = self._rendered(example)
        asked = self.tokenizer.encode(prompt, add_special_tokens=False).ids if prompt else []
        found = self.tokenizer.encode(text, add_special_tokens=False)
        closing = self.tokenizer.encode(after, add_special_tokens=False).ids if after else [self.end]
        ids = [*asked, *found.ids, *closing]
        first = max(len(asked), 1)  # the first token that is learned
        if len(ids) <= first or first >= self.longest:
            raise DataError(
                f"a prompt leaves no room for its text within {self.longest} tokens", about="example.prompt"
            )
        ids = ids[: self.longest]
        targets = [IGNORED] * len(ids)
        for at, (_, following) in enumerate(pairwise(ids)):
            if at + 1 >= first:
                targets[at] = following
        # Offsets are in characters of the text, which its first token may begin without being learned.
        spans = found.offsets[first - len(asked) : len(ids) - len(asked)]
        size = len(text[spans[0][0] : spans[-1][1]].encode()) if spans else 0
        return Encoded(torch.tensor(ids), torch.tensor(targets), max(size, 1))

    def _rendered(self, example: Example) -> tuple[str, str, str]:
        """What comes before the text, the text, and what closes it: the end token where that is empty."""
        if not example.prompt or self.template is None:
            return example.prompt, example.text, ""
        asked = {"role": "user", "content": example.prompt}
        prompt = self.template([asked], True)
        whole = self.template([asked, {"role": "assistant", "content": example.text}], False)
        before, found, after = whole.removeprefix(prompt).partition(example.text)
        if not whole.startswith(prompt) or before or not found:
            raise ConfigError("the base's chat template changes a prompt or an answer", about="chat_template")
        return prompt, example.text, after

    def _forward(self, batch: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Logits, shape ``(batch, longest, vocabulary)``, and targets, ``(batch, longest)``."""
        ids, mask = padded([each.ids for each in batch])
        targets = torch.full_like(ids, IGNORED)
        for row, each in zip(targets, batch, strict=True):
            row[: len(each.targets)] = each.targets
        # Prompt tuning has logits of its virtual tokens as well, before those of a text.
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]
        return logits, targets


@lru_cache(maxsize=2)
def load_language_trainer(base: Base, config: PeftConfig) -> LanguageTrainer:
    """A trainer that stays loaded for the next message. Its methods load the adapter that they are given."""
    return LanguageTrainer(base, config)
