"""Computes with torch, on the base itself: the engine of simulations, and of a device that has no bundle."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from threading import RLock
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from client.training.denormals import flushes
from client.training.encoding import TextEncoder
from client.training.trainer import ClassifierTrainer, LanguageTrainer, Trainer
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base
from edgeadapt.bases.states import SharedStates, StateCache
from edgeadapt.bases.tasks import OwnTask
from edgeadapt.bases.traininggraph import TrainingBatch
from edgeadapt.formats.layout import Floats, Layout, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods import causal, trainable
from edgeadapt.methods import classifier as classifiers
from edgeadapt.methods.frozen import FrozenLayers
from edgeadapt.methods.parts import is_bias

MOST_STATES = 2**28  # bytes of hidden states that are kept in memory


class TorchEngine:
    """A frozen model with one adapter, as ``trainer.Engine``. Threads may share it: one computes at a time."""

    def __init__(self, base: Base, model: PeftModel, config: PeftConfig) -> None:
        self._losses: Callable[[Tensor, Tensor], Tensor] = partial(cross_entropy, reduction="none")
        if isinstance(base.task, OwnTask):
            self._losses = base.task.loss
        self.base, self.config, self.model, self._lock = base, config, model, RLock()
        self._parameters = _parameters(model)
        whole = model.get_base_model()
        inner = whole.encoder if isinstance(whole, classifiers.PhraseClassifier) else whole
        self._frozen = FrozenLayers.of(
            inner, config, lambda ids, mask: inner(input_ids=ids, attention_mask=mask)[0][mask > 0]
        )
        source = f"{base.digest}/{self._frozen.first if self._frozen else 0}"
        shared = SharedStates.open(base.states, source) if base.states and self._frozen else None
        self._states = StateCache(MOST_STATES, np.float16, source, shared)
        own = {name: value for name, value in self._parameters.items() if is_bias(name)}
        self._biases = {name: np.array(value.detach()) for name, value in own.items()}  # the base's own
        self.layout = Layout.of(trainable.tensors(model))

    @property
    def states(self) -> StateCache | None:
        return self._states if self._frozen else None

    def share_states(self, tokens: Sequence[Sequence[int]], folder: Path) -> None:
        """Write the states of texts to a new folder, for ``Base.states`` of other engines; none without frozen layers.
        Those of texts of one length are computed together."""
        if self._frozen:
            with self._lock, flushed_denormals():
                compute = partial(self._frozen.states, together=True)
                SharedStates.write(folder, self._states.source, tokens, compute)

    @contextmanager
    def training(self, start: Tensors, trained: Collection[str]) -> Iterator[None]:
        with self._lock, flushed_denormals():
            trainable.load(self.model, self.layout.select(start))
            for name, parameter in self._parameters.items():
                parameter.requires_grad_(name in trained)
            yield

    def gradients(self, adapter: Tensors, batches: Iterable[TrainingBatch]) -> tuple[float, Tensors]:
        _place(self._parameters, adapter)
        trained = {name: value for name, value in self._parameters.items() if value.requires_grad}
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
        total = 0.0
        for batch in batches:
            losses = self._losses(self._logits(batch), torch.from_numpy(batch.targets))
            loss = (losses * torch.from_numpy(batch.shares)).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total, {name: np.array(value.grad).reshape(adapter[name].shape) for name, value in trained.items()}

    def logits(self, adapter: Tensors, tokens: Sequence[Sequence[int]]) -> Floats:
        return self._rows(lambda ids, mask: self.model(input_ids=ids, attention_mask=mask), adapter, tokens)

    def embed(self, adapter: Tensors | None, tokens: Sequence[Sequence[int]]) -> Floats:
        base = self.model.get_base_model()
        if not tokens:
            return np.zeros((0, base.width), np.float32)
        return self._rows(base.embed, adapter, tokens)

    def scores(self, adapter: Tensors, batches: Iterable[TrainingBatch]) -> list[tuple[Floats, NDArray[np.bool_]]]:
        with self._lock, torch.inference_mode(), flushed_denormals():
            trainable.load(self.model, adapter)
            return [self._score(batch) for batch in batches]

    def _score(self, batch: TrainingBatch) -> tuple[Floats, NDArray[np.bool_]]:
        logits, targets = self._logits(batch), torch.from_numpy(batch.targets)
        return -cross_entropy(logits, targets, reduction="none").numpy(), (logits.argmax(1) == targets).numpy()

    def _logits(self, batch: TrainingBatch) -> Tensor:
        """Compute the logits of each target, shape ``(targets, classes)``."""
        ids, mask = torch.from_numpy(batch.ids), torch.from_numpy(batch.mask)
        with self._resumed(ids, mask):
            output = self.model(input_ids=ids, attention_mask=mask)
        if batch.positions is None:
            labels: Tensor = output
            return labels
        # Prompt tuning has logits of its virtual tokens as well, before those of a text.
        words: Tensor = output.logits[:, -batch.ids.shape[1] :].flatten(0, 1)[torch.from_numpy(batch.positions)]
        return words

    def _rows(
        self, forward: Callable[[Tensor, Tensor], Tensor], adapter: Tensors | None, tokens: Sequence[Sequence[int]]
    ) -> Floats:
        def resumed(ids: Tensor, mask: Tensor) -> Tensor:
            with self._resumed(ids, mask):
                return forward(ids, mask)

        alone = self.model.disable_adapter() if adapter is None else nullcontext()
        with self._lock, torch.inference_mode(), flushed_denormals(), alone:
            if adapter is not None:
                trainable.load(self.model, adapter)
            else:  # peft leaves trained biases in place where it disables an adapter
                _place(self._parameters, self._biases)
            return classifiers.in_batches(resumed, [torch.tensor(ids) for ids in tokens]).numpy()

    def _resumed(self, ids: Tensor, mask: Tensor) -> AbstractContextManager[None]:
        """Within the block, begin with the kept states of the frozen layers, if there are such layers."""
        if self._frozen is None:
            return nullcontext()
        tokens = [row[:length].tolist() for row, length in zip(ids, mask.sum(1).tolist(), strict=True)]
        return self._frozen.resumed(self._states.rows(tokens, self._frozen.states))


def classifier(base: Base, labels: int, config: PeftConfig) -> ClassifierTrainer:
    """Make a trainer for the base's task. Raises ConfigError as ``edgeadapt.methods.classifier.build``."""
    with flushed_denormals():  # torch's threads keep what holds when they start
        model = classifiers.build(base, labels, config)
    # On short texts, without fused kernels, a step of multilingual-e5-small takes a fifth less time.
    model.get_base_model().encoder.set_attn_implementation("eager")
    return ClassifierTrainer(TorchEngine(base, model, config), classifiers.tokenizer(base, model), base.task)


def language(base: Base, config: PeftConfig) -> LanguageTrainer:
    """Make a trainer of a language model.

    Raises ConfigError: as ``causal.build`` and ``causal.require_private``; or virtual tokens leave no room for a text.
    """
    with flushed_denormals():
        model = causal.build(base, config)
    causal.require_private(model)
    encoder = TextEncoder.of(
        pretrained.tokenizer(base),
        pretrained.chat_template(base),
        pretrained.end_token(model),
        getattr(model.get_base_model().config, "max_position_embeddings", None),
        config.num_virtual_tokens,
    )
    return LanguageTrainer(TorchEngine(base, model, config), encoder)


def model_of(trainer: Trainer) -> PeftModel:
    """Return the model of a trainer with torch."""
    return cast(TorchEngine, trainer.engine).model


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Compute with zero instead of denormal numbers, in this thread and those that torch starts meanwhile.

    A processor takes up to a hundred times as long for them, so that an adapter could slow down a step for some
    examples alone.
    """
    before = flushes()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)  # the coordinator of a simulation computes in this process as well


def _parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Map peft's names to the trainable parameters."""
    left = {value.data_ptr(): value for value in model.parameters() if value.requires_grad}
    saved = get_peft_model_state_dict(model)
    parameters = {name: left.pop(value.data_ptr()) for name, value in saved.items() if value.data_ptr() in left}
    copied = [name for name in trainable.tensors(model) if name not in parameters]  # virtual tokens
    return parameters | (dict(zip(copied, left.values(), strict=True)) if left else {})


def _place(parameters: Mapping[str, nn.Parameter], values: Tensors) -> None:
    with torch.no_grad():
        for name in parameters.keys() & values.keys():
            parameters[name].copy_(torch.from_numpy(values[name]).view_as(parameters[name]))
