"""Adapters that a hostile coordinator crafts so that few examples move them, and what it reads from a sum.

A trap is a head of which all labels but one have equal rows. The softmax chooses between the first label and the
trapping one, by the place of an embedding along a direction. Beyond a threshold it chooses the trapping label. Only
there do the loss's gradients by the embedding not cancel: Wᵀ (p - y) is zero where p and y select equal rows. So
whatever else of the adapter is trained is moved by those examples alone (Fowl et al. 2022, "Robbing the Fed"; Zhao et
al. 2023, "LOKI").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aggregation import rotation
from aggregation.ring import Ring
from aggregation.spec import SessionSpec
from client.training.examples import Example, Score
from client.training.trainer import ClassifierTrainer
from coordinator.settings import FederationSettings
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods import classifier
from edgeadapt.methods.lorasb import unfolded
from edgeadapt.methods.parts import Part
from edgeadapt.rounds.roundtask import Outcome
from edgeadapt.rounds.sums import noisy_vector
from edgeadapt.rounds.task import OptimizerName, Task, contribution, noisy_mean, shared_layout, update_of, weighted_mean

Vector = NDArray[np.float64]
WEIGHT, BIAS = "base_model.model.classifier.weight", "base_model.model.classifier.bias"
LABELS, TRAPPING = 4, 3  # of the head, and the one that no example has
LARGEST = 900.0  # number in a crafted adapter: devices accept 1000
EXACT = FederationSettings.model_validate({"rounds": 1, "aggregation": {"ring_bits": 32}})
ADAPTER = b"a" * 32  # stands for the digest of the adapter's file


def with_noise(epsilon: float) -> FederationSettings:
    """One round that says no more of a device than this epsilon."""
    noise = {"mechanism": "skellam", "epsilon": epsilon}
    return FederationSettings.model_validate({"rounds": 1, "privacy": noise, "aggregation": {"clip_norm": 1.0}})


def phrases(words: Sequence[str], count: int, seed: int) -> list[str]:
    """So many phrases of three to six words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, rng.integers(3, 7))) for _ in range(count)]


def task_of(config: PeftConfig, trained: Sequence[Part], **changes: Any) -> Task:
    """A task that a device accepts; by default one step of SGD over all examples."""
    settings: dict[str, Any] = {
        "labels": tuple(f"label {number}" for number in range(LABELS)),
        "epochs": 1,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "proximal": 0.0,
        "optimizer": OptimizerName.SGD,
    }
    task = Task(config, trained=tuple(trained), shared=tuple(trained), **settings | changes)
    return Task.decode(task.encode())


@dataclass(frozen=True, slots=True)
class Seen:
    """What a round shows of the shared tensors: the sum to the coordinator, the mean to whoever reads the adapters."""

    layout: Layout
    total: Vector
    mean: Vector

    def by_name(self, vector: Vector) -> Tensors:
        return self.layout.unflatten(vector.astype(np.float32))


def outcomes(
    trainer: ClassifierTrainer, start: Tensors, task: Task, devices: Sequence[Sequence[Example]], seed: int = 0
) -> list[Outcome]:
    """Devices train with the real code, each from the adapter on offer."""
    begun, found = unfolded(start) if Part.R in task.shared else start, []
    for number, examples in enumerate(devices):
        order = np.random.default_rng([seed, number])
        trained = trainer.train(start, examples, task, epochs=task.epochs, rng=order)
        found.append(Outcome(begun, trained, len(examples), Score(0, 0, 0.0)))
    return found


def contributions(
    trainer: ClassifierTrainer, task: Task, devices: Sequence[Outcome], seed: int, settings: FederationSettings
) -> tuple[SessionSpec, list[Ring]]:
    """What devices send before it is masked: clipped, rotated, rounded and, with privacy, with their noise."""
    layout = shared_layout(trainer.layout, task)
    spec, sent = settings.session_spec(len(devices), trainer.layout, "b" * 64, settings.rounds, task), []
    for number, outcome in enumerate(devices):
        rounding = np.random.default_rng([seed, number, 1])
        if spec.privacy is None:
            sent.append(contribution(outcome, layout, spec, ADAPTER, rounding))
        else:
            key = np.random.default_rng([seed, number, 2]).bytes(32)
            sent.append(noisy_vector(update_of(outcome, layout), spec, ADAPTER, rounding, key))
    return spec, sent


def seen(
    trainer: ClassifierTrainer,
    task: Task,
    devices: Sequence[Outcome],
    seed: int = 0,
    settings: FederationSettings = EXACT,
) -> Seen:
    """What a round shows of the sum of ``contributions``."""
    layout, count = shared_layout(trainer.layout, task), len(devices)
    spec, sent = contributions(trainer, task, devices, seed, settings)
    total = sent[0].copy()
    for vector in sent[1:]:
        total += vector
    sums = spec.vector.decode(total, count)
    mean = (weighted_mean if spec.privacy is None else noisy_mean)(spec, task, layout, sums, count, ADAPTER)
    delta = rotation.rotate_back(sums["delta"], rotation.seed(ADAPTER))
    return Seen(layout, delta, mean.astype(np.float64))


@dataclass(frozen=True, slots=True)
class Trap:
    """A crafted adapter, and where an embedding must be to move it."""

    adapter: Tensors
    direction: Vector
    threshold: float

    def holds(self, trainer: ClassifierTrainer, texts: Sequence[str]) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = trainer.embed(texts, self.adapter) @ self.direction > self.threshold
        return found


def trap(
    trainer: ClassifierTrainer, start: Tensors, public: Sequence[str], one_in: float, largest: float = LARGEST
) -> Trap:
    """Give an adapter the head of a trap.

    Args:
        trainer: Of the base.
        start: The adapter; what it has besides the head stays.
        public: Texts like those of the devices.
        one_in: So many of them are let through, one.
        largest: Number in the head.
    """
    embedded = trainer.embed(public, start).astype(np.float64)
    direction = np.linalg.svd(embedded - embedded.mean(0), full_matrices=False)[2][0]
    threshold = float(np.quantile(embedded @ direction, 1 - 1 / one_in))
    scale = largest / max(float(np.abs(direction).max()), abs(threshold))
    weight, bias = np.zeros((LABELS, direction.size), np.float32), np.full(LABELS, -largest, np.float32)
    weight[TRAPPING], bias[TRAPPING], bias[0] = scale * direction, -scale * threshold, 0.0
    return Trap(start | {WEIGHT: weight, BIAS: bias}, direction, threshold)


def seeded(trainer: ClassifierTrainer) -> Tensors:
    """The adapter on day one, as a vendor's: it changes nothing; its head is zero."""
    layout = {spec.name: spec.shape for spec in trainer.layout.tensors}
    return classifier.seeded(
        trainer.engine.model, np.zeros(layout[WEIGHT], np.float32), torch.Generator().manual_seed(0)
    )


def with_random_b(start: Tensors) -> Tensors:
    """The same function with A = 0 and B at random: then A's gradient is not zero."""
    rng = np.random.default_rng(3)
    zeros = {name: np.zeros_like(value) for name, value in start.items() if ".lora_A." in name}
    drawn = {name: rng.standard_normal(start[name].shape, np.float32) for name in start if ".lora_B." in name}
    return start | zeros | drawn


def directions(update: Tensors) -> tuple[Vector, Vector]:
    """Sizes and directions of the rows of A's update in the first layer, the greatest first.

    A row of A's gradient is a combination of the layer's inputs, each of which follows from a word and its place
    alone. An input that no text has is not in the span of fewer rows than dimensions (Petrov et al. 2024, "DAGER").
    """
    rows = np.concatenate([value for name, value in update.items() if "layer.0." in name and ".lora_A." in name])
    _, sizes, found = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
    return sizes, found


def words_by_place(
    trainer: ClassifierTrainer, update: Tensors, least: float = 1e-3, longest: int = 10
) -> list[list[str]]:
    """The words of the texts that moved A in the first layer, at each of the places; none if too many texts did.

    A direction counts if its size is above ``least`` of the greatest.
    """
    sizes, found = directions(update)
    rank = int((sizes > least * sizes[0]).sum())
    if rank == len(sizes):
        return [[] for _ in range(longest)]
    outside = 1 - ((inputs(trainer, longest) @ found[:rank].T) ** 2).sum(2)
    read = [[trainer.tokenizer.id_to_token(int(t)) for t in np.flatnonzero(at < 1e-3)] for at in outside.T]
    return [[word for word in words if not word.startswith("[")] for words in read]


def likeliest_text(trainer: ClassifierTrainer, update: Tensors, longest: int = 10) -> list[str]:
    """The words of the one text that moved A most in the first layer, as far as others did little.

    Of each number of directions, the nearest word at each of as many places; the number for which they are nearest.
    """
    (_, found), known, read = directions(update), inputs(trainer, longest), dict[float, list[str]]()
    for count in range(4, longest):
        outside = 1 - ((known[:, :count] @ found[:count].T) ** 2).sum(2)
        words = [trainer.tokenizer.id_to_token(int(token)) for token in outside.argmin(0)]
        read[float(outside.min(0).max())] = words[1:-1]
    return read[min(read)]


def inputs(trainer: ClassifierTrainer, longest: int) -> Vector:
    """The first layer's input for each token at each place, of length 1; shape ``(tokens, longest, hidden)``."""
    embeddings = trainer.engine.model.get_base_model().encoder.embeddings
    ids = torch.arange(trainer.tokenizer.get_vocab_size()).unsqueeze(1).expand(-1, longest)
    with torch.inference_mode():
        found: Vector = embeddings(input_ids=ids).numpy().astype(np.float64)
    return found / np.linalg.norm(found, axis=2, keepdims=True)
