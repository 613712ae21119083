"""Computes with the training graph of a bundle, which puts adapters into the slots of its base. It needs no torch. A
classifier answers with the graph with which the device answers; a language model with the forward pass of the training
graph, so that a device holds the weights once."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from aggregation.errors import ConfigError, DataError, one_line
from client.inference.session import require_mean_head
from client.training.denormals import without_denormals
from client.training.encoding import Template, TextEncoder
from client.training.trainer import ClassifierTrainer, LanguageTrainer
from edgeadapt.bases.classifiergraph import MAX_TOKENS, ClassifierGraph
from edgeadapt.bases.readers import open_reader
from edgeadapt.bases.states import Tokens
from edgeadapt.bases.traininggraph import TrainingBatch, TrainingGraph, missing_slots
from edgeadapt.formats.bundle import GENERATION, LOWER, TOKENIZER, TRAINING, WEIGHTS, VerifiedBase
from edgeadapt.formats.graphinputs import (
    ENDINGS,
    INPUT_SCALE,
    LORA_A,
    LORA_B,
    OFFSET,
    OUTPUT_SCALE,
    PEFT_PREFIX,
    PREFIX,
    REPLACED,
    VECTORS,
    VIRTUAL,
    empty_inputs,
    from_inputs,
    gradients_of_tensors,
    layer_of,
    to_inputs,
)
from edgeadapt.formats.layout import Floats, Layout, Tensors
from edgeadapt.formats.peftconfig import PeftConfig, layer_number, require_gradients
from edgeadapt.methods.peft.dora import NormsOf, gradients_of_magnitudes, magnitudes, with_magnitudes, with_scales
from edgeadapt.methods.peft.inputs import LABELS, is_saved
from edgeadapt.methods.peft.lowrank import FACTORS, as_lora, factor_shapes, gradients_of_factors, trimmed
from edgeadapt.methods.peft.methods import VIRTUAL_TOKENS, from_peft_tensors, to_peft_tensors

SETTINGS, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"  # either file of a base may hold the template
V = TypeVar("V")
VECTORS_OF: dict[str, str | tuple[str, ...]] = {  # method → the slots that it fills
    **{"IA3": OUTPUT_SCALE, "BEFT": OFFSET, "LN_TUNING": REPLACED},
    **{method.upper(): endings for method, endings in ENDINGS.items()},
}
KINDS: dict[str | tuple[str, ...], str] = {
    **{LORA_A: "low-rank", OUTPUT_SCALE: "scale", INPUT_SCALE: "input-scale", OFFSET: "offset", REPLACED: "norms"},
    **{endings: method.replace("_", "-") for method, endings in ENDINGS.items()},
}


class GraphEngine:
    """A ``trainer.Engine``: a verified base's training graph, and the slots that adapters of a configuration fill."""

    answering: ClassifierGraph  # the graph with which the device classifies

    def __init__(self, base: VerifiedBase, config: PeftConfig, head: Mapping[str, Sequence[int]]) -> None:
        """Load the graph, to compute with one thread. ``config``: of a method for which the base has slots, without
        biases of the base. ``head``: graph inputs of a classifier's head, and their shapes.

        Raises ConfigError: the base lacks a training graph that can be loaded and has the gradients, or a slot for the
        method, or biases shall be trained; TrustError: the graph changed since it was verified."""
        if TRAINING not in base.manifest.files:
            raise ConfigError(
                f"the base in {base.folder} has no training graph: export it with 'bundle make --training', or name "
                "the base itself and install the extra train",
                about=TRAINING,
            )
        require_gradients(config)
        self.base, self.config = base, config
        slots, content = base.manifest.slots, base.read(TRAINING)
        lower = base.read(LOWER) if LOWER in base.manifest.files else None
        try:
            with without_denormals():  # the threads of the session inherit it
                self.graph = TrainingGraph(content, base.folder, lower=lower)
        except Exception as error:  # onnxruntime raises classes without a common base
            raise _unusable(base, error) from error
        self.states = self.graph.lower.cache if self.graph.lower else None
        if self.states:
            self.states.source = f"{base.manifest.files[LOWER]}/{base.manifest.files[WEIGHTS]}"
        if missing := missing_slots(self.graph, slots):
            reason = f"the training graph in {base.folder} has no gradient of {missing[0]!r}: export the base again"
            raise ConfigError(reason, about=TRAINING)
        filled = _filled(base, head, config)
        layers = sorted(name.removesuffix(LORA_A) for name in filled if name.endswith(LORA_A))
        factors = config.peft_type in FACTORS  # ``as_lora`` puts their scaling into B
        self._scaling = {path: 1.0 if factors else config.scaling_of(path) for path in layers}
        self._biases: dict[str, Floats] = {}
        if config.use_dora:
            self._biases = {
                path: bias for path, bias in self._of_graph(self.graph.own_biases).items() if path in layers
            }
            filled |= _filled_by_dora(base, layers, self._biases)
            if odd := sorted(set(layers) - set(self.graph.normed)):
                reason = f"the training graph in {base.folder} has no norm of {odd[0]!r}: export the base again"
                raise ConfigError(reason, about=TRAINING)
        self.filled = filled
        self.empty = empty_inputs({name: slots[name] for name in slots if name not in filled})
        zeros = {name: np.zeros(shape, np.float32) for name, shape in filled.items()}
        if factors:
            sizes = {path: (filled[path + LORA_A][0], filled[path + LORA_B][1]) for path in layers}
            shapes = factor_shapes(config, sizes) | {PEFT_PREFIX + name: shape for name, shape in head.items()}
            self.layout = Layout.of({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
        else:
            self.layout = Layout.of(self._of_inputs(zeros))

    def tensors_of(self, inputs: Tensors) -> Tensors:
        """Invert ``inputs_of``. Raises DataError for another layout."""
        filled = {name: value for name, value in inputs.items() if value.size}
        if odd := sorted(filled.keys() & self.empty.keys()):
            reason = f"the adapter changes {odd[0]!r}, which its method does not train: export it again"
            raise DataError(reason, about=odd[0])
        tensors = self._of_inputs(filled)
        self.layout.check(tensors)
        return tensors

    def inputs_of(self, adapter: Tensors) -> Tensors:
        """Make the graph inputs of an adapter, one for each slot. Law: ``tensors_of(inputs_of(a))`` is ``a``, rounded,
        but of the methods in ``FACTORS``, whose inputs are LoRA's."""
        return self._inputs(self._tensors(adapter), self._weight_norms)

    def training(self, start: Tensors, trained: Collection[str]) -> AbstractContextManager[object]:
        return without_denormals()

    def gradients(self, adapter: Tensors, batches: Iterable[TrainingBatch]) -> tuple[float, Tensors]:
        """Sum the batches' losses, and their gradients by peft's tensors. Raises DataError: the graph does not run."""
        tensors = self._tensors(adapter)
        norms = self._weight_norms(tensors, magnitudes(tensors))
        inputs = self._inputs(tensors, lambda *_: norms)
        loss, total = 0.0, dict[str, Floats]()
        for batch in batches:
            some, by_input = self._of_graph(partial(self.graph.gradients, batch, inputs))
            loss += some
            total = {name: total[name] + value if total else value for name, value in by_input.items()}
        scaled = {name: value for name, value in total.items() if name not in self.empty}
        # What a method names otherwise has the numbers of a slot in another shape.
        by_input = gradients_of_magnitudes(gradients_of_tensors(scaled, self._scaling), tensors, norms, self._biases)
        return loss, gradients_of_factors(to_peft_tensors(by_input, self.config), self.config, adapter)

    def logits(self, adapter: Tensors, tokens: Sequence[Tokens]) -> Floats:
        return self._rows(self.inputs_of(adapter), tokens)

    def embed(self, adapter: Tensors | None, tokens: Sequence[Tokens]) -> Floats:
        """Embed with the logits of a head that is the identity. Raises ConfigError as ``require_mean_head``."""
        require_mean_head(self.base)
        inputs = self.inputs_of(adapter) if adapter is not None else empty_inputs(self.base.manifest.slots)
        with without_denormals():
            return self.answering.embed(tokens, inputs)

    def scores(self, adapter: Tensors, batches: Iterable[TrainingBatch]) -> list[tuple[Floats, NDArray[np.bool_]]]:
        inputs = self.inputs_of(adapter)
        return [self._of_graph(partial(self.graph.scores, batch, inputs)) for batch in batches]

    def _rows(self, inputs: Tensors, tokens: Sequence[Tokens]) -> Floats:
        with without_denormals():
            return self.answering.rows(tokens, inputs)

    def _of_inputs(self, inputs: Tensors) -> Tensors:
        """Name inputs as peft does. Law: it is the inverse of ``_inputs``, without what is empty."""
        tensors = with_magnitudes(from_inputs(inputs, self._scaling), self.config, self._weight_norms)
        return to_peft_tensors(tensors, self.config)

    def _tensors(self, adapter: Tensors) -> Tensors:
        """Name and shape peft's tensors of another method than LoRA as graphs have them."""
        named = {spec.name: adapter[spec.name] for spec in self.layout.tensors}
        tensors = as_lora(self.config, from_peft_tensors(named, self.config, {}))[1]
        return trimmed(tensors, self.base.manifest.slots) if self.config.peft_type == "VERA" else tensors

    def _inputs(self, tensors: Tensors, norms_of: NormsOf) -> Tensors:
        return to_inputs(with_scales(tensors, norms_of, self._biases), self._scaling) | self.empty

    def _weight_norms(self, tensors: Tensors, layers: Sequence[str]) -> dict[str, Floats]:
        """Compute ``edgeadapt.methods.peft.dora.weight_norms`` of the weights that the graph computes with."""
        names = (PEFT_PREFIX + path + kind for path in layers for kind in (LORA_A, LORA_B))
        pairs = to_inputs({name: tensors[name] for name in names}, self._scaling)
        return self._of_graph(lambda: self.graph.weight_norms(pairs, layers))

    def _of_graph(self, run: Callable[[], V]) -> V:
        try:
            with without_denormals():
                return run()
        except Exception as error:  # onnxruntime raises classes without a common base
            reason = f"the training graph in {self.base.folder} does not run ({one_line(error)})"
            raise DataError(f"{reason}: export the base again", about=TRAINING) from error


def classifier(base: VerifiedBase, labels: int, config: PeftConfig) -> ClassifierTrainer:
    """Make a trainer of a classifier whose head, of ``labels`` rows, is the base's own or over the mean of its tokens.
    Raises ConfigError, TrustError: as ``GraphEngine``; or the tokenizer cannot be loaded."""
    head = {
        name: tuple(labels if size == LABELS else int(size) for size in shape)
        for name, shape in base.manifest.slots.items()
        if is_saved(name)
    }
    engine, slots = GraphEngine(base, config, head), base.manifest.slots
    try:
        with without_denormals():  # the threads of the session inherit it
            engine.answering = ClassifierGraph.open(base.files, base.folder, slots, base.manifest.independent_rows)
        tokenizer = open_reader(base.files[TOKENIZER])
        longest = int((tokenizer.truncation or {"max_length": MAX_TOKENS})["max_length"])
        tokenizer.enable_truncation(min(MAX_TOKENS, longest))
        tokenizer.no_padding()
    except Exception as error:  # tokenizers and onnxruntime raise classes without a common base
        raise _unusable(base, error) from error
    base.check()
    return ClassifierTrainer(engine, tokenizer)


def language(base: VerifiedBase, config: PeftConfig) -> LanguageTrainer:
    """Make a trainer of a language model. Raises ConfigError, TrustError: as ``GraphEngine``; the adapter has a row for
    each token; its virtual tokens leave no room for a text; or a file cannot be loaded or changed."""
    engine = GraphEngine(base, config, {})
    try:
        stated = json.loads(base.files[GENERATION])["model"]
        end, context, vocabulary = stated["eos_token_id"], int(stated["context_length"]), int(stated["vocab_size"])
        tokenizer = Tokenizer.from_str(base.files[TOKENIZER].decode())
        first_end = int(end[0] if isinstance(end, list) else end)
    except Exception as error:  # json and tokenizers raise classes without a common base
        raise _unusable(base, error) from error
    if rows := [name for name, shape in engine.filled.items() if vocabulary in shape and name not in VIRTUAL]:
        raise ConfigError(
            f"{rows[0]} has a row for each token: an adapter of it would show which tokens the examples have; name "
            "other layers",
            about="target_modules",
        )
    template = _template(base) if _has_template(base) else None
    base.check()
    return LanguageTrainer(engine, TextEncoder.of(tokenizer, template, first_end, context, config.num_virtual_tokens))


def _has_template(base: VerifiedBase) -> bool:
    if CHAT_TEMPLATE in base.manifest.files:
        return True
    return SETTINGS in base.manifest.files and bool(json.loads(base.read(SETTINGS)).get("chat_template"))


def _template(base: VerifiedBase) -> Template:
    """Make what renders messages as the base's chat template does, with the library that answers."""

    @cache
    def tokenizer() -> Any:
        from client.inference.engine import genai  # in an extra, which classifiers do not need

        og = genai()
        return og.Tokenizer(og.Model(og.Config(str(base.folder))))  # needs the model only to be opened

    def render(messages: list[dict[str, str]], answer: bool) -> str:
        try:
            text = tokenizer().apply_chat_template(messages=json.dumps(messages), add_generation_prompt=answer)
        except RuntimeError as error:
            reason = f"the chat template does not accept the examples ({one_line(error)})"
            raise ConfigError(reason, about="chat_template") from error
        return str(text)

    return render


def _unusable(base: VerifiedBase, error: Exception) -> ConfigError:
    reason = f"the base in {base.folder} cannot be loaded for training: {one_line(error)}"
    return ConfigError(reason, about=TRAINING)


def _targeted(path: str, targets: Sequence[str], layers: Collection[int] = ()) -> bool:
    return (not layers or layer_number(path) in layers) and any(
        path == target or path.endswith(f".{target}") for target in targets
    )


def _filled(base: VerifiedBase, head: Mapping[str, Sequence[int]], config: PeftConfig) -> dict[str, tuple[int, ...]]:
    """Map the graph inputs that an adapter fills to their shapes. Raises ConfigError if a target fills none."""
    slots = base.manifest.slots

    def shape(name: str, open_: int) -> tuple[int, ...]:
        return tuple(int(text) if text.isdigit() else open_ for text in slots[name])

    shapes = {name: tuple(given) for name, given in head.items()}
    if name := VIRTUAL_TOKENS.get(config.peft_type):
        if name not in slots:
            raise _missing(base, name, config.peft_type, "prefix" if name == PREFIX else "prompt")
        shapes[name] = shape(name, config.num_virtual_tokens)
    for name in slots:
        path = layer_of(name)
        if name in head or not _targeted(path, config.target_modules, config.layers_to_transform):
            continue
        if config.peft_type in ("LORA", *FACTORS) and name.endswith((LORA_A, LORA_B)):
            rank = config.rank_of(path)
            shapes[name] = shape(name, rank**2 if config.peft_type == "LOHA" else rank)
        feeds = config.peft_type == "IA3" and _targeted(path, config.feedforward_modules)
        if name.endswith(INPUT_SCALE if feeds else VECTORS_OF.get(config.peft_type, INPUT_SCALE)) and (
            feeds or config.peft_type in VECTORS_OF
        ):
            shapes[name] = shape(name, 1 if name.endswith(VECTORS) else config.r)
    adapted = {layer_of(name) for name in shapes if name not in head}
    for target in config.target_modules:
        if not any(_targeted(path, (target,)) for path in adapted):
            feeds = target in config.feedforward_modules
            kind = KINDS[INPUT_SCALE if feeds else VECTORS_OF.get(config.peft_type, LORA_A)]
            raise _missing(base, target, config.peft_type, f"{kind} at such layers", f"{kind} slot at")
    if missing := sorted(set(config.layers_to_transform) - {layer_number(path) for path in adapted}):
        raise ConfigError(
            f"the base in {base.folder} has no slots in layer {missing[0]}, which the adapter changes: export it with "
            "--layers for as many",
            about="--layers",
        )
    return shapes


def _filled_by_dora(base: VerifiedBase, layers: Sequence[str], biases: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Map the scales and offsets of DoRA to their shapes. Raises ConfigError if the base has no slot for one."""
    slots = base.manifest.slots
    names = [path + OUTPUT_SCALE for path in layers] + [path + OFFSET for path in layers if path in biases]
    if missing := sorted(set(names) - set(slots)):
        raise _missing(base, missing[0], "DoRA", "low-rank,scale,offset")
    return {name: (1, int(slots[name][1])) for name in names}


def _missing(base: VerifiedBase, slot: str, needs: str, kinds: str, of: str = "slot") -> ConfigError:
    reason = f"the base in {base.folder} has no {of} {slot!r}, which {needs} needs: export it with --slots {kinds}"
    return ConfigError(reason, about="--slots")
