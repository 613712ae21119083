"""Computes with torch, on the base itself: the engine of simulations, and of a device that has no bundle.

The layers below the first that an adapter changes are frozen, so they give a text the same states in every step of a
training: they are computed once (``edgeadapt.bases.states``), and the model runs from them. How a family of models
calls its layers shows while one text passes them. That both ways give one answer is measured before either is used."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path
from threading import RLock
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from client.training.denormals import flushes
from client.training.encoding import TextEncoder
from client.training.trainer import ClassifierTrainer, LanguageTrainer, Trainer
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base
from edgeadapt.bases.mediaencoder import MediaEncoder
from edgeadapt.bases.states import SharedStates, StateCache, Tokens
from edgeadapt.bases.tasks import OwnTask
from edgeadapt.bases.traininggraph import TrainingBatch
from edgeadapt.formats.layout import Floats, Layout, Tensors
from edgeadapt.formats.peftconfig import LAYER, PeftConfig
from edgeadapt.methods import causal, trainable
from edgeadapt.methods import classifier as classifiers
from edgeadapt.methods.parts import is_bias

PROBE: tuple[tuple[int, ...], ...] = ((1, 2, 3, 4, 5), (6, 7, 3))  # tokens of two texts
TOLERANCE = 1e-4  # difference of an output, relative to the largest
AT_ONCE = 2048  # tokens
Run = Callable[[Tensor, Tensor], Tensor]  # token ids and mask, shape (texts, longest) → outputs without padding
MOST_STATES = 2**28  # bytes of hidden states that are kept in memory


class _ReachedError(Exception):
    """Leaves a model at the first layer above the frozen ones."""


class FrozenLayers:
    """The layers of a model below the adapted ones; not for several threads."""

    def __init__(self, layers: nn.ModuleList, first: int, run: Run) -> None:
        """``first``: number of the first adapted layer. ``run``: calls the model."""
        self._run, self.first = run, first
        self._given: Tensor | None = None  # states with which the model begins
        self._stops = False  # whether a call ends with the states
        self._reached: Tensor | None = None
        for number, layer in enumerate(layers):
            if number < first:
                layer.forward = self._passing(layer.forward)
        layers[first].register_forward_pre_hook(self._enter, with_kwargs=True)
        self.at_once = AT_ONCE

    @classmethod
    def of(cls, model: nn.Module, config: PeftConfig, run: Run) -> Self | None:
        """Find the frozen layers of an adapted model; None: there are none, or it cannot begin with states."""
        paths = [path for path, module in model.named_modules() if hasattr(module, "base_layer")]
        numbers = [inner for path in paths if (inner := LAYER.match(f".{path}"))]
        first = min((int(inner[1]) for inner in numbers), default=0)
        if not first or len(numbers) < len(paths) or config.bias == "all":
            return None
        lists = {path[: inner.start(1) - 2] for path, inner in zip(paths, numbers, strict=True)}
        if len(lists) != 1 or not isinstance(layers := model.get_submodule(lists.pop()), nn.ModuleList):
            return None
        reader, probe = (model.reader if isinstance(model, MediaEncoder) else None), PROBE
        if reader:
            probe = tuple(tuple(np.arange(reader.size) % most) for most in (251, 241))
        ids, mask = _padded([torch.tensor(row) for row in probe])
        with torch.inference_mode():
            whole, frozen = run(ids, mask), cls(layers, first, run)
            try:
                with frozen.resumed(frozen.states(probe)):
                    resumed = run(ids, mask)
            except Exception:  # of any family: it has states that are not a tensor for each text, say
                return None
        close = torch.allclose(resumed, whole, rtol=0, atol=TOLERANCE * float(whole.abs().max()))
        frozen.at_once *= reader.size // reader.cost if reader else 1
        return frozen if close else None

    def states(self, tokens: Sequence[Tokens], *, together: bool = False) -> list[Floats]:
        """Compute what enters the first adapted layer for each text, shape ``(tokens, hidden)``. Guarantee: a text's
        states do not depend on the others, unless those of one length are computed ``together``, which takes a fifth of
        the time: then they do by rounding."""
        result: list[Floats] = [None] * len(tokens)  # type: ignore[list-item]
        order = sorted(range(len(tokens)), key=lambda text: len(tokens[text]))
        for length, group in groupby(order, key=lambda text: len(tokens[text])):
            texts = [*group]
            for at in range(0, len(texts), size := max(self.at_once // length, 1) if together else 1):
                some = texts[at : at + size]
                given = torch.tensor(np.array([tokens[text] for text in some], np.int64))
                for text, row in zip(some, self._states(given), strict=True):
                    result[text] = row.numpy()
        return result

    @contextmanager
    def resumed(self, states: Sequence[Floats]) -> Iterator[None]:
        """Within the block, begin each call of the model with the states of its texts."""
        self._given = pad_sequence([torch.tensor(row) for row in states], batch_first=True)
        try:
            yield
        finally:
            self._given = None

    def _states(self, ids: Tensor) -> Tensor:
        self._stops = True
        try:
            with torch.inference_mode():
                self._run(ids, torch.ones_like(ids))
        except _ReachedError:
            pass
        finally:
            self._stops = False
        if self._reached is None:
            raise RuntimeError("the model left out the first adapted layer")
        reached, self._reached = self._reached, None
        return reached

    def _passing(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Make a layer pass on what it reads, in the form in which it answers, while states are given."""
        size = 0  # of the tuple in which it answers; 0: with a tensor

        def passing(*args: Any, **kwargs: Any) -> Any:
            nonlocal size
            if self._given is None:
                output = forward(*args, **kwargs)
                size = len(output) if isinstance(output, tuple) else 0
                return output
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *[None] * (size - 1)) if size else hidden

        return passing

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._stops:
            self._reached = args[0] if args else kwargs["hidden_states"]
            raise _ReachedError
        if self._given is None:
            return None
        if args:
            return (self._given, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._given}


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    ones = [torch.ones_like(row) for row in rows]
    return pad_sequence(list(rows), batch_first=True), pad_sequence(ones, batch_first=True)


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
        flat: Run = lambda states, mask: states.flatten(0, 1) if isinstance(inner, MediaEncoder) else states[mask > 0]  # noqa: E731
        self._frozen = FrozenLayers.of(
            inner, config, lambda ids, mask: flat(inner(input_ids=ids, attention_mask=mask)[0], mask)
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

    def share_states(self, tokens: Sequence[Tokens], folder: Path) -> None:
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

    def logits(self, adapter: Tensors, tokens: Sequence[Tokens]) -> Floats:
        return self._rows(lambda ids, mask: self.model(input_ids=ids, attention_mask=mask), adapter, tokens)

    def embed(self, adapter: Tensors | None, tokens: Sequence[Tokens]) -> Floats:
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
        self, forward: Callable[[Tensor, Tensor], Tensor], adapter: Tensors | None, tokens: Sequence[Tokens]
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
        tokens = [row[:length].numpy() for row, length in zip(ids, mask.sum(1).tolist(), strict=True)]
        return self._frozen.resumed(self._states.rows(tokens, self._frozen.states))


def classifier(base: Base, labels: int, config: PeftConfig) -> ClassifierTrainer:
    """Make a trainer for the base's task. Raises ConfigError as ``edgeadapt.methods.classifier.build``."""
    with flushed_denormals():  # torch's threads keep what holds when they start
        model = classifiers.build(base, labels, config)
    # On short texts, without fused kernels, a step of multilingual-e5-small takes a fifth less time.
    encoder = model.get_base_model().encoder
    getattr(encoder, "set_attn_implementation", lambda _: None)("eager")
    return ClassifierTrainer(TorchEngine(base, model, config), classifiers.tokenizer(base, model), base.task)


def language(base: Base, config: PeftConfig) -> LanguageTrainer:
    """Make a trainer of a language model. Raises ConfigError: as ``causal.build`` and ``causal.require_private``; or
    virtual tokens leave no room for a text."""
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
    return cast(TorchEngine, trainer.engine).model


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Compute with zero instead of denormal numbers, in this thread and those that torch starts meanwhile. A processor
    takes up to a hundred times as long for them, so that an adapter could slow down a step for some examples alone."""
    before = flushes()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)  # the coordinator of a simulation computes in this process as well


def _parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    left = {value.data_ptr(): value for value in model.parameters() if value.requires_grad}
    saved = get_peft_model_state_dict(model)
    parameters = {name: left.pop(value.data_ptr()) for name, value in saved.items() if value.data_ptr() in left}
    copied = [name for name in trainable.tensors(model) if name not in parameters]  # virtual tokens
    return parameters | (dict(zip(copied, left.values(), strict=True)) if left else {})


def _place(parameters: Mapping[str, nn.Parameter], values: Tensors) -> None:
    with torch.no_grad():
        for name in parameters.keys() & values.keys():
            parameters[name].copy_(torch.from_numpy(values[name]).view_as(parameters[name]))
