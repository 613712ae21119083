"""Trains an adapter of a classifier with the training graph of its bundle, and scores it: ``Trainer`` without torch.

The gradients come from ONNX Runtime (``adapters.traininggraph``), the steps from NumPy (``descent``), and logits from
the graph with which the device answers. Of the same batches, both trainers make the same adapter, up to rounding and
the quantization of the base.
"""

from collections.abc import Callable, Sequence

import numpy as np
from cachetools import LRUCache, cached
from numpy.typing import NDArray
from tokenizers import Tokenizer

from adapters.bundle import MODEL, TOKENIZER, VerifiedBase
from adapters.classifiergraph import ENCODER, MAX_TOKENS, ClassifierGraph, open_session
from adapters.layout import Floats, Tensors
from adapters.lorasb import unfolded
from adapters.parts import Part
from adapters.peft.inputs import LABELS, is_saved
from adapters.peftconfig import PeftConfig
from adapters.task import MAX_LOSS, Task
from adapters.traininggraph import batch_of
from aggregation.errors import ConfigError, DataError
from client.training.batches import batches, parts
from client.training.control import TOKENS, UNLIMITED, TrainingControl
from client.training.denormals import without_denormals
from client.training.descent import descend
from client.training.examples import Example, Score
from client.training.slotgraph import SlotGraph, check_method, nothing, unusable

MEAN_HEAD = ("classifier.bias", "classifier.weight")  # over the mean of the tokens, as federations train it


class GraphTrainer:
    """A verified base with a training graph, and its tokenizer. It holds no adapter."""

    def __init__(self, base: VerifiedBase, labels: int, config: PeftConfig, threads: int = 1) -> None:
        """Load the base.

        Args:
            base: Of a bundle.
            labels: Rows of the head, which may be the base's own or one over the mean of its tokens.
            config: Of the adapters: as ``SlotGraph`` takes it.
            threads: For matrix products.

        Raises:
            ConfigError: The base has no training graph, or no slot for the method; or a file cannot be loaded.
            TrustError: A file of the bundle changed since it was verified.
        """
        check_method(base, config)
        self.base, self.config, slots = base, config, base.manifest.slots
        head = {
            name: tuple(labels if size == LABELS else int(size) for size in shape)
            for name, shape in slots.items()
            if is_saved(name)
        }
        self._slot_graph = SlotGraph(base, config, head, threads)
        self.layout = self._slot_graph.layout
        try:
            self._tokenizer = Tokenizer.from_str(base.files[TOKENIZER].decode())
            longest = int((self._tokenizer.truncation or {"max_length": MAX_TOKENS})["max_length"])
            self._tokenizer.enable_truncation(min(MAX_TOKENS, longest))
            self._tokenizer.no_padding()
            with without_denormals():  # which the threads of the session inherit
                session = open_session(base.files[MODEL], base.folder, slots, threads)
        except Exception as error:  # tokenizers and onnxruntime raise classes without a common base
            raise unusable(base, error) from error
        self._graph = ClassifierGraph(session, slots, base.manifest.independent_rows)
        base.check()

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
        """Train for ``epochs`` passes over ``examples``. Arguments, result and errors: as ``Trainer.train``."""
        if not examples:
            raise DataError("there are no examples to train on; add some", about="examples", value=0)
        tokens, labels = self.tokens([e.text for e in examples]), [e.label for e in examples]

        def gradients_of(values: Tensors, batch: list[int]) -> tuple[float, Tensors]:
            shares = [1 / len(batch)] * len(batch)
            ids, targets = [tokens[i] for i in batch], [labels[i] for i in batch]
            return self._gradients(values, ids, targets, shares, control.tokens)

        order = list(batches([len(ids) for ids in tokens], task.batch_size, epochs, rng))
        begun = unfolded(start) if Part.R in task.trained else start
        with without_denormals():
            return descend(begun, order, gradients_of, task, step, epochs=epochs, control=control)

    def gradients(
        self, adapter: Tensors, examples: Sequence[Example], shares: Sequence[float]
    ) -> tuple[float, Tensors]:
        """The sum of each example's cross-entropy in nats times its share, and the gradient by each tensor.

        Args:
            adapter: All tensors, under peft's names.
            examples: At least one.
            shares: Of each example.

        Raises:
            DataError: The training graph does not run.
        """
        tokens = self.tokens([example.text for example in examples])
        order = sorted(range(len(tokens)), key=lambda text: len(tokens[text]))
        with without_denormals():
            return self._gradients(
                adapter, [tokens[i] for i in order], [examples[i].label for i in order], [shares[i] for i in order]
            )

    def tensors_of(self, inputs: Tensors) -> Tensors:
        """The tensors, under peft's names, of an adapter that is given by graph input.

        Raises:
            DataError: It is of another layout: of other layers or ranks, or has what is no LoRA.
        """
        return self._slot_graph.tensors_of(inputs)

    def inputs_of(self, adapter: Tensors) -> Tensors:
        """The graph inputs of an adapter, one for each slot. Law: as of ``SlotGraph.inputs_of``."""
        return self._slot_graph.inputs_of(adapter)

    def unlike(self, examples: Sequence[Example], others: Sequence[Example]) -> list[Example]:
        """Those examples that the model reads as other tokens than each of ``others``, and than each example before.

        Texts that differ in capital letters or spaces are one text to many a tokenizer.
        """
        read, found = set(map(tuple, self.tokens([other.text for other in others]))), []
        for example, ids in zip(examples, self.tokens([example.text for example in examples]), strict=True):
            if tuple(ids) not in read:
                read.add(tuple(ids))
                found.append(example)
        return found

    def score(self, adapter: Tensors, examples: Sequence[Example]) -> Score:
        """Score an adapter on ``examples``. Arguments and result are those of ``Trainer.score``."""
        if not examples:
            return Score(0, 0, 0.0)
        logits = self.logits(adapter, [e.text for e in examples]).astype(np.float64)
        labels, rows = np.array([e.label for e in examples]), np.arange(len(examples))
        shifted = logits - logits.max(axis=1, keepdims=True)
        losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[rows, labels]
        correct = int((logits.argmax(axis=1) == labels).sum())
        return Score(correct, len(examples), float(np.minimum(losses, MAX_LOSS).sum()))

    def logits(self, adapter: Tensors, texts: Sequence[str]) -> NDArray[np.float32]:
        """Logits, shape ``(len(texts), labels)``; ``(0, 0)`` without texts."""
        return self._run(self._slot_graph.inputs_of(adapter), texts) if texts else np.zeros((0, 0), np.float32)

    def embed(self, texts: Sequence[str], adapter: Tensors | None = None) -> NDArray[np.float32]:
        """Embeddings, shape ``(len(texts), hidden)``. Arguments are those of ``Trainer.embed``.

        They are the logits of a head that is the identity.

        Raises:
            ConfigError: As ``require_mean_head``.
        """
        require_mean_head(self.base)
        (bias, weight), slots = MEAN_HEAD, self.base.manifest.slots
        hidden = int(slots[weight][1])
        if not texts:
            return np.zeros((0, hidden), np.float32)
        empty = nothing(slots, set(slots) - set(MEAN_HEAD))
        inputs = self._slot_graph.inputs_of(adapter) if adapter is not None else empty
        identity = {bias: np.zeros(hidden, np.float32), weight: np.eye(hidden, dtype=np.float32)}
        return self._run(inputs | identity, texts)

    def _run(self, inputs: Tensors, texts: Sequence[str]) -> Floats:
        tokens = self.tokens(texts)
        order = sorted(range(len(tokens)), key=lambda text: len(tokens[text]))  # texts of a run need little padding
        with without_denormals():
            rows = self._graph.mixed([tokens[text] for text in order], [inputs] * len(order))
        result: Floats = np.stack(rows)[np.argsort(order)]
        return result

    def _gradients(
        self,
        values: Tensors,
        tokens: Sequence[list[int]],
        labels: Sequence[int],
        shares: Sequence[float],
        at_once: int = TOKENS,
    ) -> tuple[float, Tensors]:
        """The loss of a batch, and its gradients, as ``SlotGraph.gradients``."""
        runs = parts([len(ids) for ids in tokens], at_once)
        batched = (
            batch_of([tokens[i] for i in run], [labels[i] for i in run], [shares[i] for i in run]) for run in runs
        )
        return self._slot_graph.gradients(values, batched)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts))]


def _key(base: VerifiedBase, labels: int, config: PeftConfig) -> object:
    return base.folder, tuple(sorted(base.manifest.files.items())), labels, config


@cached(LRUCache(maxsize=2), key=_key)
def load_graph_trainer(base: VerifiedBase, labels: int, config: PeftConfig) -> GraphTrainer:
    """A trainer of a federation's classifier, which stays loaded for the next message.

    Raises:
        ConfigError, TrustError: As ``require_mean_head`` and ``GraphTrainer``.
    """
    require_mean_head(base)
    return GraphTrainer(base, labels, config)


def require_mean_head(base: VerifiedBase) -> None:
    """Refuse a base with another head than one over the mean of its tokens, or with virtual tokens.

    Federations train such a head, and it alone has embeddings. Raises ConfigError.
    """
    saved = {name for name in base.manifest.slots if is_saved(name)}
    odd = sorted(saved ^ set(MEAN_HEAD)) + sorted(
        name for name in base.manifest.slots if name not in saved and not name.startswith(ENCODER)
    )
    if odd:
        raise ConfigError(
            f"the base in {base.folder} has a slot {odd[0]!r}, which is not of a head over the mean of the tokens: "
            "export it with --head mean, without virtual tokens",
            about=odd[0],
        )
