"""Trains an adapter of a language model with the training graph of its bundle: ``LanguageTrainer`` without torch.

It scores with the forward pass of the same graph, so a device holds the weights once. Of the same batches, both
trainers make the same adapter, up to rounding and the quantization of the base.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from cachetools import LRUCache, cached
from numpy.typing import NDArray
from tokenizers import Tokenizer

from adapters.bundle import GENERATION, TOKENIZER, VerifiedBase
from adapters.classifiergraph import pad
from adapters.graphinputs import VIRTUAL
from adapters.layout import Floats, Tensors
from adapters.lorasb import unfolded
from adapters.parts import Part
from adapters.peftconfig import PeftConfig
from adapters.task import MAX_LOSS, Task
from adapters.traininggraph import TrainingBatch
from aggregation.errors import ConfigError, DataError
from client.training.batches import batches, parts
from client.training.control import TOKENS, UNLIMITED, TrainingControl
from client.training.denormals import without_denormals
from client.training.descent import descend
from client.training.encoding import Encoded, Template, TextEncoder, learned_tokens
from client.training.examples import Example, Score
from client.training.slotgraph import SlotGraph, unusable

SETTINGS, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"  # of a base; either may hold the template


class LanguageGraphTrainer:
    """A verified language model with a training graph, and its tokenizer. It holds no adapter."""

    def __init__(self, base: VerifiedBase, config: PeftConfig, threads: int = 1) -> None:
        """Load the base.

        Args:
            base: Of a bundle.
            config: Of the adapters: as ``SlotGraph`` takes it.
            threads: For matrix products.

        Raises:
            ConfigError: The base has no training graph, or no slot for the method; its virtual tokens leave no room for
                a text; or a file cannot be loaded.
            TrustError: A file of the bundle changed since it was verified.
        """
        self.base, self.config = base, config
        self._slot_graph = SlotGraph(base, config, {}, threads)
        self.layout = self._slot_graph.layout
        try:
            stated = json.loads(base.files[GENERATION])["model"]
            end, context, vocabulary = stated["eos_token_id"], int(stated["context_length"]), int(stated["vocab_size"])
            tokenizer = Tokenizer.from_str(base.files[TOKENIZER].decode())
            first_end = int(end[0] if isinstance(end, list) else end)
        except Exception as error:  # tokenizers raises classes without a common base
            raise unusable(base, error) from error
        at_layers = {name: shape for name, shape in self._slot_graph.filled.items() if name not in VIRTUAL}
        if rows := [name for name, shape in at_layers.items() if vocabulary in shape]:
            raise ConfigError(
                f"{rows[0]} has a row for each token: an adapter of it would show which tokens the examples have; name "
                "other layers",
                about="target_modules",
            )
        template = _template(base) if _has_template(base) else None
        self._encoder = TextEncoder.of(tokenizer, template, first_end, context, config.num_virtual_tokens)
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
        """Train for ``epochs`` passes over ``examples``. Arguments, result and errors: as ``LanguageTrainer.train``."""
        if not examples:
            raise DataError("there are no examples to train on; add some", about="examples", value=0)
        encoded = [self._encoder.encode(example) for example in examples]

        def gradients_of(values: Tensors, batch: list[int]) -> tuple[float, Tensors]:
            texts = [encoded[i] for i in batch]
            runs = self._batches(texts, [1 / learned_tokens(texts)] * len(texts), control.tokens)
            return self._slot_graph.gradients(values, (run for _, run in runs))

        order = list(batches([len(each.ids) for each in encoded], task.batch_size, epochs, rng))
        begun = unfolded(start) if Part.R in task.trained else start
        with without_denormals():
            return descend(begun, order, gradients_of, task, step, epochs=epochs, control=control)

    def is_cut(self, example: Example) -> bool:
        """Whether an example has more tokens than are learned. Raises as ``TextEncoder.encode``."""
        return self._encoder.encode(example).cut

    def gradients(
        self, adapter: Tensors, examples: Sequence[Example], shares: Sequence[float]
    ) -> tuple[float, Tensors]:
        """The sum of each example's mean cross-entropy a learned token, in nats, times its share, and its gradients.

        Arguments and errors are those of ``GraphTrainer.gradients``.
        """
        encoded = [self._encoder.encode(example) for example in examples]
        of_a_token = [share / len(each.learned) for each, share in zip(encoded, shares, strict=True)]
        with without_denormals():
            return self._slot_graph.gradients(adapter, (run for _, run in self._batches(encoded, of_a_token)))

    def score(self, adapter: Tensors, examples: Sequence[Example]) -> Score:
        """Score an adapter on ``examples``. Arguments and result are those of ``LanguageTrainer.score``."""
        correct = loss = 0.0
        for text, nats, hits in self._scored(adapter, examples):
            correct += float(hits.mean())
            loss += min(-float(nats.sum(dtype=np.float64)) / text.size, MAX_LOSS)
        return Score(correct, len(examples), loss)

    def least_probability(self, adapter: Tensors, examples: Sequence[Example]) -> float:
        """The lowest probability of a learned token of ``examples``, of which there is one. Raises as ``score``."""
        return math.exp(min(float(nats.min()) for _, nats, _ in self._scored(adapter, examples)))

    def _scored(
        self, adapter: Tensors, examples: Sequence[Example]
    ) -> Iterator[tuple[Encoded, Floats, NDArray[np.bool_]]]:
        """The examples by length, each with the log-likelihood of its learned tokens and which are the most likely."""
        encoded = sorted(map(self._encoder.encode, examples), key=lambda each: len(each.ids))
        inputs = self._slot_graph.inputs_of(adapter)
        for texts, batch in self._batches(encoded, [0.0] * len(encoded)):
            try:
                with without_denormals():
                    nats, hits = self._slot_graph.graph.scores(batch, inputs)
            except Exception as error:  # onnxruntime raises classes without a common base
                raise self._slot_graph.failed(error) from error
            ends = np.cumsum([len(each.learned) for each in texts])[:-1]
            yield from zip(texts, np.split(nats, ends), np.split(hits, ends), strict=True)

    def tensors_of(self, inputs: Tensors) -> Tensors:
        """The tensors, under peft's names, of an adapter that is given by graph input (``SlotGraph.tensors_of``)."""
        return self._slot_graph.tensors_of(inputs)

    def inputs_of(self, adapter: Tensors) -> Tensors:
        """The graph inputs of an adapter, one for each slot."""
        return self._slot_graph.inputs_of(adapter)

    def _batches(
        self, texts: Sequence[Encoded], shares: Sequence[float], at_once: int = TOKENS
    ) -> Iterator[tuple[list[Encoded], TrainingBatch]]:
        """Texts in runs of at most ``at_once`` tokens. ``shares``: of the loss, of each learned token of a text."""
        for places in parts([len(each.ids) + self.config.num_virtual_tokens for each in texts], at_once):
            run = [texts[place] for place in places]
            ids, mask = pad([each.ids.tolist() for each in run])
            positions = np.concatenate([each.learned + row * ids.shape[1] for row, each in enumerate(run)])
            targets = np.concatenate([each.targets[each.learned] for each in run])
            of_a_token = np.repeat([shares[place] for place in places], [len(each.learned) for each in run])
            yield run, TrainingBatch(ids, mask, targets, of_a_token.astype(np.float32), positions)


def _has_template(base: VerifiedBase) -> bool:
    if CHAT_TEMPLATE in base.manifest.files:
        return True
    return SETTINGS in base.manifest.files and bool(json.loads(base.read(SETTINGS)).get("chat_template"))


def _template(base: VerifiedBase) -> Template:
    """What renders messages as the base's chat template does, with the library that answers."""

    @cache
    def tokenizer() -> Any:
        from client.inference.engine import genai

        og = genai()
        return og.Tokenizer(og.Model(og.Config(str(base.folder))))  # which opens the model, and then needs it no more

    def render(messages: list[dict[str, str]], answer: bool) -> str:
        try:
            text = tokenizer().apply_chat_template(messages=json.dumps(messages), add_generation_prompt=answer)
        except RuntimeError as error:
            reason = f"the chat template does not accept the examples ({' '.join(str(error).split())[:200]})"
            raise ConfigError(reason, about="chat_template") from error
        return str(text)

    return render


def _key(base: VerifiedBase, config: PeftConfig) -> object:
    return base.folder, tuple(sorted(base.manifest.files.items())), config


@cached(LRUCache(maxsize=1), key=_key)
def load_language_graph_trainer(base: VerifiedBase, config: PeftConfig) -> LanguageGraphTrainer:
    """A trainer that stays loaded for the next message."""
    return LanguageGraphTrainer(base, config)
