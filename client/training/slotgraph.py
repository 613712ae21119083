"""A training graph with the adapters that one configuration puts into its slots, under peft's names.

``graphtrainer`` trains a classifier with it, ``languagegraph`` a language model.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from adapters.bundle import TRAINING, VerifiedBase
from adapters.graphinputs import (
    INPUT_SCALE,
    LORA_A,
    LORA_B,
    OFFSET,
    OUTPUT_SCALE,
    PEFT_PREFIX,
    PREFIX,
    REPLACED,
    from_inputs,
    gradients_of_tensors,
    layer_of,
    to_inputs,
)
from adapters.layout import Floats, Layout, Tensors
from adapters.lorasb import frozen_factor, square_name
from adapters.parts import Part, part_of
from adapters.peft.dora import NormsOf, gradients_of_magnitudes, magnitudes, with_magnitudes, with_scales
from adapters.peft.lowrank import FACTORS, as_lora, factor_shapes, gradients_of_factors, trimmed
from adapters.peft.methods import VIRTUAL_TOKENS, from_peft_tensors, to_peft_tensors
from adapters.peftconfig import PeftConfig, require_gradients
from adapters.traininggraph import TrainingBatch, TrainingGraph, missing_slots
from aggregation.errors import ConfigError, DataError
from client.training.denormals import without_denormals

V = TypeVar("V")
VECTORS_OF = {"IA3": OUTPUT_SCALE, "BEFT": OFFSET, "LN_TUNING": REPLACED}  # method → the slots that it fills
KINDS = {LORA_A: "low-rank", OUTPUT_SCALE: "scale", INPUT_SCALE: "input-scale", OFFSET: "offset", REPLACED: "norms"}


class SlotGraph:
    """The training graph of a verified base, and the slots that adapters of a configuration fill. Holds no adapter."""

    def __init__(self, base: VerifiedBase, config: PeftConfig, head: Mapping[str, Sequence[int]], threads: int) -> None:
        """Load the graph.

        Args:
            base: Of a bundle.
            config: Of the adapters: of a method for which the base has slots, without biases of the base.
            head: Graph inputs of a classifier's head, and their shapes.
            threads: For matrix products.

        Raises:
            ConfigError: The base has no training graph, or it cannot be loaded or lacks a gradient; or the base has no
                slot for the method, or biases shall be trained.
            TrustError: The graph changed since it was verified.
        """
        check_method(base, config)
        self.base, self.config = base, config
        slots, content = base.manifest.slots, base.read(TRAINING)
        try:
            with without_denormals():  # which the threads of the session inherit
                self.graph = TrainingGraph(content, base.folder, threads)
        except Exception as error:  # onnxruntime raises classes without a common base
            raise unusable(base, error) from error
        if missing := missing_slots(self.graph, slots):
            reason = f"the training graph in {base.folder} has no gradient of {missing[0]!r}: export the base again"
            raise ConfigError(reason, about=TRAINING, value=missing)
        filled = _filled(base, head, config)
        layers = sorted(name.removesuffix(LORA_A) for name in filled if name.endswith(LORA_A))
        factors = config.peft_type in FACTORS  # whose scaling ``as_lora`` puts into B
        self._scaling = {path: 1.0 if factors else config.scaling_of(path) for path in layers}
        self._biases: dict[str, Floats] = {}
        if config.use_dora:
            self._biases = {
                path: bias for path, bias in self._of_graph(self.graph.own_biases).items() if path in layers
            }
            filled |= _filled_by_dora(base, layers, self._biases)
            if odd := sorted(set(layers) - set(self.graph.normed)):
                reason = f"the training graph in {base.folder} has no norm of {odd[0]!r}: export the base again"
                raise ConfigError(reason, about=TRAINING, value=odd)
        self.filled, self.empty = filled, nothing(slots, set(slots) - set(filled))
        zeros = {name: np.zeros(shape, np.float32) for name, shape in filled.items()}
        if factors:
            sizes = {path: (filled[path + LORA_A][0], filled[path + LORA_B][1]) for path in layers}
            shapes = factor_shapes(config, sizes) | {PEFT_PREFIX + name: shape for name, shape in head.items()}
            self.layout = Layout.of({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
        else:
            self.layout = Layout.of(self._of_inputs(zeros))

    def tensors_of(self, inputs: Tensors) -> Tensors:
        """The tensors, under peft's names, of an adapter that is given by graph input.

        Raises:
            DataError: It is of another layout: of other layers or ranks, or has what is no LoRA.
        """
        given = {name: value for name, value in inputs.items() if value.size}
        if odd := sorted(given.keys() & self.empty.keys()):
            reason = f"the adapter changes {odd[0]!r}, which its method does not train: export it again"
            raise DataError(reason, about=odd[0])
        tensors = self._of_inputs(given)
        self.layout.check(tensors)
        return tensors

    def inputs_of(self, adapter: Tensors) -> Tensors:
        """The graph inputs of an adapter, one for each slot.

        Law: ``tensors_of(inputs_of(a))`` is ``a``, rounded, but of the methods in ``FACTORS``, whose inputs are LoRA's.
        """
        return self._inputs(self._tensors(adapter), self._weight_norms)

    def gradients(self, values: Tensors, batches: Iterable[TrainingBatch]) -> tuple[float, Tensors]:
        """The loss of some batches, and its gradients by peft's tensors, and by R for those that have one.

        Raises:
            DataError: The graph does not run.
        """
        squares = {name: values[square_name(name)] for name in values if square_name(name) in values and _is_b(name)}
        factors = {name: frozen_factor(name, values[name].shape) for name in squares}
        own = values | {name: values[name] + factors[name] @ r for name, r in squares.items()}
        tensors = self._tensors(own)
        norms = self._weight_norms(tensors, magnitudes(tensors))
        inputs = self._inputs(tensors, lambda *_: norms)
        loss, total = 0.0, dict[str, Floats]()
        for batch in batches:
            some, found = self._of_graph(partial(self.graph.gradients, batch, inputs))
            loss += some
            total = {name: total[name] + value if total else value for name, value in found.items()}
        scaled = {name: value for name, value in total.items() if name not in self.empty}
        # What a method names otherwise has the numbers of a slot in another shape.
        found = gradients_of_magnitudes(gradients_of_tensors(scaled, self._scaling), tensors, norms, self._biases)
        gradients = gradients_of_factors(to_peft_tensors(found, self.config), self.config, own)
        return loss, gradients | {square_name(name): factors[name].T @ gradients[name] for name in squares}

    def _of_inputs(self, inputs: Tensors) -> Tensors:
        """The tensors under peft's names. Law: it is the inverse of ``_inputs``, without what is empty."""
        tensors = with_magnitudes(from_inputs(inputs, self._scaling), self.config, self._weight_norms)
        return to_peft_tensors(tensors, self.config)

    def _tensors(self, adapter: Tensors) -> Tensors:
        """Tensors with peft's own of another method than LoRA named and shaped as graphs have them."""
        named = {spec.name: adapter[spec.name] for spec in self.layout.tensors}
        found = as_lora(self.config, from_peft_tensors(named, self.config, {}))[1]
        return trimmed(found, self.base.manifest.slots) if self.config.peft_type == "VERA" else found

    def _inputs(self, tensors: Tensors, norms_of: NormsOf) -> Tensors:
        return to_inputs(with_scales(tensors, norms_of, self._biases), self._scaling) | self.empty

    def _weight_norms(self, tensors: Tensors, layers: Sequence[str]) -> dict[str, Floats]:
        """As ``adapters.peft.dora.weight_norms``, of the weights that the graph computes with."""
        names = (PEFT_PREFIX + path + kind for path in layers for kind in (LORA_A, LORA_B))
        pairs = to_inputs({name: tensors[name] for name in names}, self._scaling)
        return self._of_graph(lambda: self.graph.weight_norms(pairs, layers))

    def _of_graph(self, run: Callable[[], V]) -> V:
        try:
            with without_denormals():
                return run()
        except Exception as error:  # onnxruntime raises classes without a common base
            raise self.failed(error) from error

    def failed(self, error: Exception) -> DataError:
        """What to raise where the graph does not run."""
        reason = f"the training graph in {self.base.folder} does not run ({' '.join(str(error).split())[:200]})"
        return DataError(f"{reason}: export the base again", about=TRAINING)


def check_method(base: VerifiedBase, config: PeftConfig) -> None:
    """Refuse a base without a training graph, and a method that none trains. Raises ConfigError."""
    if TRAINING not in base.manifest.files:
        raise ConfigError(
            f"the base in {base.folder} has no training graph: export it with 'export base --training', or name the "
            "base itself and install the extra train",
            about=TRAINING,
        )
    require_gradients(config)


def unusable(base: VerifiedBase, error: Exception) -> ConfigError:
    """What to raise where a file of the base cannot be loaded."""
    reason = f"the base in {base.folder} cannot be loaded for training: {' '.join(str(error).split())[:200]}"
    return ConfigError(reason, about=TRAINING)


def nothing(slots: Mapping[str, Sequence[str]], names: Collection[str]) -> Tensors:
    """Inputs that change nothing: of rank 0, and vectors that are not given."""
    shapes = {name: tuple(int(text) if text.isdigit() else 0 for text in slots[name]) for name in sorted(names)}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def _targeted(path: str, targets: Sequence[str]) -> bool:
    """Whether peft puts an adapter at a layer: a target is its path, or the end of it."""
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _filled(base: VerifiedBase, head: Mapping[str, Sequence[int]], config: PeftConfig) -> dict[str, tuple[int, ...]]:
    """The graph inputs that an adapter fills, and their shapes. Raises ConfigError if a target fills none."""
    slots = base.manifest.slots

    def shape(name: str, open_: int) -> tuple[int, ...]:
        return tuple(int(text) if text.isdigit() else open_ for text in slots[name])

    found = {name: tuple(given) for name, given in head.items()}
    if name := VIRTUAL_TOKENS.get(config.peft_type):
        if name not in slots:
            raise _missing(base, name, config.peft_type, "prefix" if name == PREFIX else "prompt")
        found[name] = shape(name, config.num_virtual_tokens)
    for name in slots:
        path = layer_of(name)
        if name in head or not _targeted(path, config.target_modules):
            continue
        if config.peft_type in ("LORA", *FACTORS) and name.endswith((LORA_A, LORA_B)):
            rank = config.rank_of(path)
            found[name] = shape(name, rank**2 if config.peft_type == "LOHA" else rank)
        feeds = config.peft_type == "IA3" and _targeted(path, config.feedforward_modules)
        if name.endswith(INPUT_SCALE if feeds else VECTORS_OF.get(config.peft_type, INPUT_SCALE)) and (
            feeds or config.peft_type in VECTORS_OF
        ):
            found[name] = shape(name, 1)
    adapted = {layer_of(name) for name in found if name not in head}
    for target in config.target_modules:
        if not any(_targeted(path, (target,)) for path in adapted):
            feeds = target in config.feedforward_modules
            kind = KINDS[INPUT_SCALE if feeds else VECTORS_OF.get(config.peft_type, LORA_A)]
            raise _missing(base, target, config.peft_type, f"{kind} at such layers", f"{kind} slot at")
    return found


def _filled_by_dora(base: VerifiedBase, layers: Sequence[str], biases: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The scales and offsets of DoRA, and their shapes. Raises ConfigError if the base has no slot for one."""
    slots = base.manifest.slots
    names = [path + OUTPUT_SCALE for path in layers] + [path + OFFSET for path in layers if path in biases]
    if missing := sorted(set(names) - set(slots)):
        raise _missing(base, missing[0], "DoRA", "low-rank,scale,offset")
    return {name: (1, int(slots[name][1])) for name in names}


def _missing(base: VerifiedBase, slot: str, needs: str, kinds: str, of: str = "slot") -> ConfigError:
    reason = f"the base in {base.folder} has no {of} {slot!r}, which {needs} needs: export it with --slots {kinds}"
    return ConfigError(reason, about="--slots", value=slot)


def _is_b(name: str) -> bool:
    return part_of(name) is Part.B
