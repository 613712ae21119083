"""Trains an adapter of a classifier with the training graph of its bundle, and scores it: ``Trainer`` without torch.

The gradients come from ONNX Runtime (``adapters.traininggraph``), the steps from NumPy (``descent``), and logits from
the graph with which the device answers. Of the same batches, both trainers make the same adapter, up to rounding and
the quantization of the base.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
from cachetools import LRUCache, cached
from numpy.typing import NDArray
from tokenizers import Tokenizer

from adapters.bundle import MODEL, TOKENIZER, TRAINING, VerifiedBase
from adapters.classifiergraph import ENCODER, MAX_TOKENS, ClassifierGraph, open_session
from adapters.graphinputs import (
    INPUT_SCALE,
    LORA_A,
    LORA_B,
    OFFSET,
    OUTPUT_SCALE,
    REPLACED,
    VECTORS,
    from_inputs,
    gradients_of_tensors,
    layer_of,
    to_inputs,
)
from adapters.layout import Floats, Layout, Tensors
from adapters.lorasb import frozen_factor, square_name, unfolded
from adapters.parts import Part, part_of
from adapters.peft.methods import from_peft_tensors, to_peft_tensors
from adapters.peftconfig import PeftConfig
from adapters.task import MAX_LOSS, Task
from adapters.traininggraph import TrainingGraph, batch_of, missing_slots
from aggregation.errors import ConfigError, DataError
from client.training.batches import batches, parts
from client.training.control import TOKENS, UNLIMITED, TrainingControl
from client.training.denormals import without_denormals
from client.training.descent import descend
from client.training.examples import Example, Score

VECTORS_OF = {"IA3": OUTPUT_SCALE, "BEFT": OFFSET, "LN_TUNING": REPLACED}  # method → the slots that it fills
HEAD = ("classifier.bias", "classifier.weight")  # over the mean of the tokens, as federations train it


class GraphTrainer:
    """A verified base with a training graph, and its tokenizer. It holds no adapter."""

    def __init__(self, base: VerifiedBase, labels: int, config: PeftConfig, threads: int = 1) -> None:
        """Load the base.

        Args:
            base: Of a bundle.
            labels: Rows of the head.
            config: Of the adapters: LoRA, IA3, LN_TUNING or BEFT at layers that have slots.
            threads: For matrix products.

        Raises:
            ConfigError: The base has no training graph, another head than federations train, or no slot for the method;
                or a file cannot be loaded.
            TrustError: A file of the bundle changed since it was verified.
        """
        self.base, self.config, self._slots = base, config, base.manifest.slots
        _check(base, config)
        layers = sorted(name.removesuffix(LORA_A) for name in self._slots if name.endswith(LORA_A))
        filled = _filled(self._slots, labels, config)
        self._scaling = {path: config.scaling_of(path) for path in layers if path + LORA_A in filled}
        self._empty = _empty(self._slots, set(self._slots) - set(filled))
        zeros = {name: np.zeros(shape, np.float32) for name, shape in filled.items()}
        self.layout = Layout.of(to_peft_tensors(from_inputs(zeros, self._scaling), config))
        self.hidden = int(self._slots[HEAD[1]][1])
        training = base.read(TRAINING)
        try:
            self._tokenizer = Tokenizer.from_str(base.files[TOKENIZER].decode())
            longest = int((self._tokenizer.truncation or {"max_length": MAX_TOKENS})["max_length"])
            self._tokenizer.enable_truncation(min(MAX_TOKENS, longest))
            self._tokenizer.no_padding()
            with without_denormals():  # which the threads of the sessions inherit
                session = open_session(base.files[MODEL], base.folder, self._slots, threads)
                self._training = TrainingGraph(training, base.folder, threads)
        except Exception as error:  # tokenizers and onnxruntime raise classes without a common base
            reason = f"the base in {base.folder} cannot be loaded for training: {' '.join(str(error).split())[:200]}"
            raise ConfigError(reason, about=TRAINING) from error
        if missing := missing_slots(self._training, self._slots):
            reason = f"the training graph in {base.folder} has no gradient of {missing[0]!r}: export the base again"
            raise ConfigError(reason, about=TRAINING, value=missing)
        self._graph = ClassifierGraph(session, self._slots, base.manifest.independent_rows)
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
        tokens, labels = self._tokens([e.text for e in examples]), [e.label for e in examples]

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
        tokens = self._tokens([example.text for example in examples])
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
        given = {name: value for name, value in inputs.items() if value.size}
        if odd := sorted(given.keys() & self._empty.keys()):
            reason = f"the adapter changes {odd[0]!r}, which a training graph cannot train with its method"
            raise DataError(f"{reason}: use an adapter of LoRA, IA3, LN_TUNING or BEFT", about=odd[0])
        tensors = to_peft_tensors(from_inputs(given, self._scaling), self.config)
        self.layout.check(tensors)
        return tensors

    def inputs_of(self, adapter: Tensors) -> Tensors:
        """The graph inputs of an adapter, one for each slot. Law: ``tensors_of(inputs_of(a))`` is ``a``, rounded."""
        return self._inputs(adapter)

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
        return self._run(self._inputs(adapter), texts) if texts else np.zeros((0, 0), np.float32)

    def embed(self, texts: Sequence[str], adapter: Tensors | None = None) -> NDArray[np.float32]:
        """Embeddings, shape ``(len(texts), hidden)``. Arguments are those of ``Trainer.embed``.

        They are the logits of a head that is the identity.
        """
        if not texts:
            return np.zeros((0, self.hidden), np.float32)
        bias, weight = HEAD
        inputs = self._inputs(adapter) if adapter is not None else _empty(self._slots, set(self._slots) - set(HEAD))
        identity = {bias: np.zeros(self.hidden, np.float32), weight: np.eye(self.hidden, dtype=np.float32)}
        return self._run(inputs | identity, texts)

    def _run(self, inputs: Tensors, texts: Sequence[str]) -> Floats:
        tokens = self._tokens(texts)
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
        """The loss of a batch, and its gradients by peft's tensors, and by R for those that have one."""
        squares = {name: values[square_name(name)] for name in values if square_name(name) in values and _is_b(name)}
        factors = {name: frozen_factor(name, values[name].shape) for name in squares}
        inputs = self._inputs(values | {name: values[name] + factors[name] @ r for name, r in squares.items()})
        loss, total = 0.0, dict[str, Floats]()
        for part in parts([len(ids) for ids in tokens], at_once):
            batch = batch_of([tokens[i] for i in part], [labels[i] for i in part], [shares[i] for i in part])
            try:
                some, found = self._training.gradients(batch, inputs)
            except Exception as error:  # onnxruntime raises classes without a common base
                reason = f"the training graph in {self.base.folder} does not run ({' '.join(str(error).split())[:200]})"
                raise DataError(f"{reason}: export the base again", about=TRAINING) from error
            loss += some
            total = {name: total[name] + value if total else value for name, value in found.items()}
        scaled = {name: value for name, value in total.items() if name not in self._empty}
        # What a method names otherwise has the numbers of a slot in another shape.
        gradients = to_peft_tensors(gradients_of_tensors(scaled, self._scaling), self.config)
        return loss, gradients | {square_name(name): factors[name].T @ gradients[name] for name in squares}

    def _inputs(self, adapter: Tensors) -> Tensors:
        """The graph inputs of an adapter of this layout."""
        named = {spec.name: adapter[spec.name] for spec in self.layout.tensors}
        return to_inputs(from_peft_tensors(named, self.config, {}), self._scaling) | self._empty

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts))]


def _key(base: VerifiedBase, labels: int, config: PeftConfig) -> object:
    return base.folder, tuple(sorted(base.manifest.files.items())), labels, config


@cached(LRUCache(maxsize=2), key=_key)
def load_graph_trainer(base: VerifiedBase, labels: int, config: PeftConfig) -> GraphTrainer:
    """A trainer that stays loaded for the next message."""
    return GraphTrainer(base, labels, config)


def _check(base: VerifiedBase, config: PeftConfig) -> None:
    """Refuse what cannot be trained with this base."""
    if TRAINING not in base.manifest.files:
        raise ConfigError(
            f"the base in {base.folder} has no training graph: export it with 'export base --training', or name the "
            "base itself and install the extra train",
            about=TRAINING,
        )
    if config.peft_type not in ("LORA", *VECTORS_OF) or config.use_dora:
        method = "DoRA" if config.use_dora else config.peft_type
        raise ConfigError(
            f"a training graph trains LoRA, IA3, LN_TUNING and BEFT, not {method}: install the extra train",
            about="task.peft_config",
        )
    slots = base.manifest.slots
    ends = (LORA_A, LORA_B, *VECTORS)
    trained = {name for name in slots if name.startswith(ENCODER) and name.endswith(ends)} | set(HEAD)
    if odd := sorted(trained ^ set(slots)):
        raise ConfigError(
            f"the base in {base.folder} has a slot {odd[0]!r}, which federations do not train: export it with --head "
            "mean, without virtual tokens",
            about=odd[0],
        )


def _targeted(path: str, targets: Sequence[str]) -> bool:
    """Whether peft puts an adapter at a layer: a target is its path, or the end of it."""
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _empty(slots: dict[str, tuple[str, ...]], names: Collection[str]) -> Tensors:
    """Inputs that change nothing: of rank 0, and vectors that are not given."""
    shapes = {name: tuple(int(text) if text.isdigit() else 0 for text in slots[name]) for name in sorted(names)}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def _filled(slots: dict[str, tuple[str, ...]], labels: int, config: PeftConfig) -> dict[str, tuple[int, ...]]:
    """The graph inputs that an adapter fills, and their shapes."""

    def shape(name: str, open_: int) -> tuple[int, ...]:
        return tuple(int(text) if text.isdigit() else open_ for text in slots[name])

    found = {name: shape(name, labels) for name in HEAD}
    for name in slots:
        path = layer_of(name)
        if name in HEAD or not _targeted(path, config.target_modules):
            continue
        if config.peft_type == "LORA" and name.endswith((LORA_A, LORA_B)):
            found[name] = shape(name, config.rank_of(path))
        feeds = config.peft_type == "IA3" and _targeted(path, config.feedforward_modules)
        if name.endswith(INPUT_SCALE if feeds else VECTORS_OF.get(config.peft_type, INPUT_SCALE)) and (
            feeds or config.peft_type in VECTORS_OF
        ):
            found[name] = shape(name, 1)
    return found


def _is_b(name: str) -> bool:
    return part_of(name) is Part.B
