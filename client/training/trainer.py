"""Trains and scores adapters of a frozen base: an engine, which has the base, and an objective.

An engine gives the loss of a batch and its gradients: torch on the base itself (``torchengine``), or the training graph
of a bundle (``graphengine``). An objective turns examples into batches: a classifier's labels, or the tokens that a
language model learns. ``descent.descend`` takes the steps. Both engines make the same adapter of the same batches, up
to rounding and the quantization of a bundle's base. Training is deterministic on one machine with one number of
threads: the model stays in evaluation mode (no dropout), and the generator orders the examples."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aggregation.errors import DataError
from client.training.control import TOKENS, UNLIMITED, TrainingControl
from client.training.descent import GradientsOf, descend
from client.training.encoding import Encoded, TextEncoder
from client.training.examples import Example, Score, with_variants
from edgeadapt.bases.base import Base
from edgeadapt.bases.classifiergraph import pad
from edgeadapt.bases.media import MediaReader
from edgeadapt.bases.readers import Reader
from edgeadapt.bases.states import StateCache, Tokens
from edgeadapt.bases.tasks import Classification, Numbers, Objective, Target
from edgeadapt.bases.traininggraph import TrainingBatch
from edgeadapt.formats.bundle import VerifiedBase
from edgeadapt.formats.layout import Floats, Layout, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.lorasb import frozen_factor, square_name, unfolded
from edgeadapt.methods.parts import PARTS, Part, part_of
from edgeadapt.rounds.task import MAX_LOSS, Task

SURE = 0.8  # probability of a label at which a classifier has learned it
LIKELY = 0.5  # least probability of each token of an answer: the answering graph rounds otherwise
MAX_STEPS = 30  # steps of a lesson
MAX_SECONDS = 60.0  # seconds of a lesson, after which no further step begins

FrozenBase = Base | VerifiedBase
CLASSIFIES = Classification()


class LabelOrTarget(Protocol):
    @property
    def label(self) -> int: ...
    @property
    def target(self) -> Target: ...  # empty: the label counts


class Engine(Protocol):
    """A frozen base that computes with adapters, which are tensors under peft's names. Holds none."""

    layout: Layout

    @property
    def states(self) -> StateCache | None: ...  # of the layers below the adapted ones; None: it keeps none

    @property
    def base(self) -> FrozenBase: ...

    @property
    def config(self) -> PeftConfig: ...

    def training(self, start: Tensors, trained: Collection[str]) -> AbstractContextManager[object]:
        """While the block runs, give ``gradients`` by the tensors ``trained``, the others being those of ``start``."""
        ...

    def gradients(self, adapter: Tensors, batches: Iterable[TrainingBatch]) -> tuple[float, Tensors]:
        """Sum the batches' losses, and their gradients. Raises DataError if they cannot be computed."""
        ...

    def logits(self, adapter: Tensors, tokens: Sequence[Tokens]) -> Floats:
        """Compute a classifier's logits, shape ``(len(tokens), labels)``, for at least one text."""
        ...

    def embed(self, adapter: Tensors | None, tokens: Sequence[Tokens]) -> Floats:
        """Embed with a classifier or the frozen base alone: shape ``(len(tokens), hidden)``, rows of L2 norm 1."""
        ...

    def scores(self, adapter: Tensors, batches: Iterable[TrainingBatch]) -> list[tuple[Floats, NDArray[np.bool_]]]:
        """Compute a language model's log-likelihood of each target of each batch, and whether it is the likeliest."""
        ...


class Trainer:
    """An engine with an objective. Threads may share it."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.base, self.layout = engine, engine.base, engine.layout

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Make tokens and targets of each example, in order. Raises as ``TextEncoder.encode``."""
        raise NotImplementedError

    def score(self, adapter: Tensors, examples: Sequence[Example]) -> Score:
        """Score an adapter on held-out examples; all zeros if there are none."""
        raise NotImplementedError

    def train(
        self,
        start: Tensors,
        examples: Sequence[Example],
        task: Task,
        *,
        epochs: int,
        rng: np.random.Generator,
        control: TrainingControl = UNLIMITED,
    ) -> Tensors:
        """Train for ``epochs`` passes over ``examples`` and their variants. The loss is the mean cross-entropy of a
        batch's targets.

        Args:
            start: Tensors in ``layout``; the caller checks them.
            task: Batch size, optimizer and its settings, and variants; parts that it does not train stay.

        Returns:
            Tensors in ``layout``, and R if the task trains it (``edgeadapt.methods.lorasb``), float32 and finite.
            Guarantee: equal arguments give equal tensors, whatever was trained before, and the base does not change.

        Raises DataError: there are no examples, or as ``descend``."""
        if not examples:
            raise DataError("there are no examples to train on; add some", about="examples")
        every, encoded = with_variants(examples, task.variants), self.encode(examples)
        pairs = zip(examples, encoded, strict=True)
        tokens = [text.tokens for one, text in pairs for _ in with_variants([one], task.variants)]

        def of_batch(batch: list[int]) -> Iterator[TrainingBatch]:
            # Variants are as large as files, and made when they are needed.
            texts = self.encode([every[i] for i in batch]) if task.variants else [encoded[i] for i in batch]
            share = 1 / sum(len(text.targets) for text in texts)
            return (run for _, run in self._batches(texts, [share] * len(texts), control.tokens))

        order = list(batches(tokens, task.batch_size, epochs, rng))
        return self._descend(start, order, of_batch, task, epochs, control)

    def teach(
        self,
        start: Tensors,
        taught: Sequence[Example],
        rehearsed: Sequence[Example],
        rate: float,
        step: Callable[[], object] = lambda: None,
    ) -> Tensors:
        """Train on all examples at once, until ``taught``, at least one, are answered as they say.

        Half of the loss is that of what is taught and half that of what is rehearsed, so that this is not unlearned
        (Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal"). Each step after the last that is needed
        would cost time and move what the adapter answers otherwise. Training ends after at most ``MAX_STEPS``, and
        ``MAX_SECONDS`` and a step; without a step, if the adapter answers as taught. It uses AdamW with ``rate``.
        Raises DataError: as ``descend``, or as ``encode``."""
        half = 0.5 if rehearsed else 1.0
        shares = [half / len(group) for group in (taught, rehearsed) for _ in group]
        whole = self.weighted([*taught, *rehearsed], shares)
        control = TrainingControl(MAX_SECONDS, until=lambda adapter: self.has_learned(adapter, taught), step=step)
        task = Task(self.engine.config, (), 1, len(shares), rate, 0.0, 0.0, PARTS, PARTS)
        try:
            return self._descend(start, [[]] * MAX_STEPS, lambda _: whole, task, 1, control)
        except DataError as error:
            if error.about != "training.loss":
                raise
            reason = "the training loss is not finite: the base or the adapter in use is damaged; copy the bundle again"
            raise DataError(reason, about="training.loss") from error

    def weighted(self, examples: Sequence[Example], shares: Sequence[float]) -> list[TrainingBatch]:
        """Batch examples so that the loss is the sum of each example's mean cross-entropy in nats, times its share."""
        pairs = sorted(zip(self.encode(examples), shares, strict=True), key=lambda pair: pair[0].tokens)
        of_target = [share / len(text.targets) for text, share in pairs]
        return [batch for _, batch in self._batches([text for text, _ in pairs], of_target, TOKENS)]

    def has_learned(self, adapter: Tensors, taught: Sequence[Example]) -> bool:
        raise NotImplementedError

    def _descend(
        self,
        start: Tensors,
        order: Sequence[list[int]],
        of_batch: Callable[[list[int]], Iterable[TrainingBatch]],
        task: Task,
        epochs: int,
        control: TrainingControl,
    ) -> Tensors:
        begun, wanted = self.layout.select(start), {*task.trained}
        gradients_of: GradientsOf = lambda adapter, batch: self.engine.gradients(adapter, of_batch(batch))  # noqa: E731
        if Part.R in task.trained:
            gradients_of, begun, wanted = _by_squares(gradients_of, begun), unfolded(begun), wanted | {Part.B}
        with self.engine.training(begun, {name for name in begun if part_of(name) in wanted}):
            return descend(begun, order, gradients_of, task, epochs=epochs, control=control)

    def _batches(
        self, texts: Sequence[Encoded], shares: Sequence[float], at_once: int
    ) -> Iterator[tuple[list[Encoded], TrainingBatch]]:
        """Group texts in runs of at most ``at_once`` tokens. ``shares``: of the loss, of each target of a text."""
        virtual = self.engine.config.num_virtual_tokens
        for places in parts([text.tokens + virtual for text in texts], at_once):
            run = [texts[place] for place in places]
            ids, mask = pad([text.ids for text in run])
            targets = np.concatenate([text.targets for text in run])
            of_target = np.repeat([shares[place] for place in places], [len(text.targets) for text in run])
            positions = None
            if run[0].first is not None:
                rows = enumerate(run)
                positions = np.concatenate([text.positions + row * ids.shape[1] for row, text in rows])
            yield run, TrainingBatch(ids, mask, targets, of_target.astype(np.float32), positions)


class ClassifierTrainer(Trainer):
    """Trains a head over a text, picture or sound: an example's target is its label, or that of a task of others."""

    def __init__(self, engine: Engine, tokenizer: Reader, task: Objective = CLASSIFIES) -> None:
        super().__init__(engine)
        self.tokenizer, self.objective = tokenizer, task  # the tokenizer cuts off what is too long

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        tokens = self.tokens([example.text for example in examples])
        targets = [np.array([one.target], np.float32) if one.target else np.array([one.label]) for one in examples]
        cost = self.tokenizer.cost if isinstance(self.tokenizer, MediaReader) else 0
        pairs = zip(tokens, targets, strict=True)
        return [Encoded(np.asarray(ids, np.int64), target, None, cost=cost) for ids, target in pairs]

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]

    def unlike(self, examples: Sequence[Example], others: Sequence[Example]) -> list[Example]:
        """Keep examples that the model reads as other tokens than each of ``others``, and than each previous example.
        Texts that differ in capital letters or spaces are one text to many a tokenizer."""
        read, kept = set(map(tuple, self.tokens([other.text for other in others]))), []
        for example, ids in zip(examples, self.tokens([example.text for example in examples]), strict=True):
            if tuple(ids) not in read:
                read.add(tuple(ids))
                kept.append(example)
        return kept

    def score(self, adapter: Tensors, examples: Sequence[Example]) -> Score:
        """Score an adapter on ``examples``; all zeros if there are none. Returns the sum of the scores (correct
        answers), examples, and the sum of the losses, each at most ``MAX_LOSS``."""
        if not examples:
            return Score(0, 0, 0.0)
        scores, losses = self.rated(self.logits(adapter, [e.text for e in examples]), examples)
        return Score(float(scores.sum()), len(examples), float(losses.sum()))

    def rated(self, outputs: Floats, examples: Sequence[LabelOrTarget]) -> tuple[Numbers, Numbers]:
        """Rate the outputs of at least one text: scores and losses from 0 to ``MAX_LOSS``, shape ``(len(outputs),)``. A
        loss below 0, which some tasks have, is 0: it is summed within these bounds."""
        targets = np.array([one.target or (one.label,) for one in examples], np.float64)
        losses = self.objective.losses(outputs, targets)
        return self.objective.score(outputs, targets), np.clip(losses, 0.0, MAX_LOSS)

    def has_learned(self, adapter: Tensors, taught: Sequence[Example]) -> bool:
        likelihoods = probabilities(self.logits(adapter, [one.text for one in taught]))
        return bool((likelihoods[np.arange(len(taught)), [one.label for one in taught]] >= SURE).all())

    def logits(self, adapter: Tensors, texts: Sequence[str]) -> NDArray[np.float32]:
        """Compute logits, shape ``(len(texts), labels)``; ``(0, 0)`` without texts."""
        return self.engine.logits(adapter, self.tokens(texts)) if texts else np.zeros((0, 0), np.float32)

    def embed(self, texts: Sequence[str], adapter: Tensors | None = None) -> NDArray[np.float32]:
        """Embed texts, shape ``(len(texts), hidden)``, each of L2 norm 1; without an adapter the frozen base's. Raises
        ConfigError: the base has another head than one over the mean of its tokens."""
        return self.engine.embed(adapter, self.tokens(texts))


class LanguageTrainer(Trainer):
    """Trains a language model: an example's targets are the tokens of its text."""

    def __init__(self, engine: Engine, encoder: TextEncoder) -> None:
        super().__init__(engine)
        self.encoder = encoder

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        return [self.encoder.encode(example) for example in examples]

    def score(self, adapter: Tensors, examples: Sequence[Example]) -> Score:
        """Score an adapter on ``examples``; all zeros if there are none. Returns the sums over the examples of the
        share of learned tokens that are the most probable ones, and of the cross-entropy in nats for each byte of the
        text, at most ``MAX_LOSS``."""
        correct = loss = 0.0
        for text, nats, hits in self._scored(adapter, examples):
            correct += float(hits.mean())
            loss += min(-float(nats.sum(dtype=np.float64)) / text.size, MAX_LOSS)
        return Score(correct, len(examples), loss)

    def has_learned(self, adapter: Tensors, taught: Sequence[Example]) -> bool:
        return bool(min(np.exp(nats.min()) for _, nats, _ in self._scored(adapter, taught)) >= LIKELY)

    def _scored(
        self, adapter: Tensors, examples: Sequence[Example]
    ) -> Iterator[tuple[Encoded, Floats, NDArray[np.bool_]]]:
        """Yield the examples by length, each with the log-likelihood of its targets and which are the most likely."""
        encoded = sorted(self.encode(examples), key=lambda text: len(text.ids))
        runs = list(self._batches(encoded, [0.0] * len(encoded), TOKENS))
        scores = self.engine.scores(adapter, (batch for _, batch in runs))
        for (texts, _), (nats, hits) in zip(runs, scores, strict=True):
            ends = np.cumsum([len(text.targets) for text in texts])[:-1]
            yield from zip(texts, np.split(nats, ends), np.split(hits, ends), strict=True)


def probabilities(logits: Floats, temperature: float = 1.0) -> Floats:
    exponentials = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    result: Floats = exponentials / exponentials.sum(axis=1, keepdims=True)
    return result


def batches(lengths: Sequence[int], size: int, epochs: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Yield batches of texts of similar length, which need little padding, in random order.

    ``lengths`` are in tokens, ``size`` and the indices in texts; the last batch of the longest texts may be smaller.
    ``rng`` draws the order of the batches, and that of texts of equal length. Guarantee: an epoch contains every index
    exactly once.

    >>> list(batches([7, 2, 9], 2, 1, np.random.default_rng(0)))
    [[2], [1, 0]]
    """
    for _ in range(epochs):
        shuffled = rng.permutation(len(lengths))
        grouped = shuffled[np.argsort(np.asarray(lengths)[shuffled], kind="stable")]
        epoch = [grouped[start : start + size].tolist() for start in range(0, len(lengths), size)]
        yield from (epoch[i] for i in rng.permutation(len(epoch)))


def parts(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Split a batch into runs of at most ``tokens`` tokens with padding, each of one text or more.

    >>> list(parts([2, 3, 9], 6))
    [[0, 1], [2]]
    """
    part: list[int] = []
    longest = 0
    for place, length in enumerate(lengths):
        longest = max(longest, length)
        if part and longest * (len(part) + 1) > tokens:
            yield part
            part, longest = [], length
        part.append(place)
    if part:
        yield part


def _by_squares(gradients_of: GradientsOf, start: Tensors) -> GradientsOf:
    """Add gradients by R of Fed-SB, of an adapter in which each B becomes B + F R."""
    factors = {name: frozen_factor(name, value.shape) for name, value in start.items() if part_of(name) is Part.B}

    def by_squares(values: Tensors, batch: list[int]) -> tuple[float, Tensors]:
        own = {name: values[name] + f @ values[square_name(name)] for name, f in factors.items()}
        loss, gradients = gradients_of(values | own, batch)
        return loss, gradients | {square_name(name): f.T @ gradients[name] for name, f in factors.items()}

    return by_squares
