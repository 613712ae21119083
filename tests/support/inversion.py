"""An attacker that knows base, adapter, task and labels, and looks for the pictures behind an update or a sum of them.

It has pictures of the public besides. ``reconstruct`` searches pictures whose gradient has the direction of what it
sees (Geiping et al. 2020, "Inverting Gradients"), in coordinates in which those of the public have the variance 1.
``likelihoods`` compares what it sees with the updates of candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, normalize

from aggregation import ring, rotation
from client.training import torchengine
from client.training.examples import Example
from client.training.torchengine import model_of
from client.training.trainer import ClassifierTrainer
from coordinator.settings import FederationSettings
from edgeadapt.bases.base import Base
from edgeadapt.formats.layout import Tensors
from edgeadapt.methods import classifier, trainable
from edgeadapt.methods.parts import Part
from edgeadapt.methods.trainable import configuration
from edgeadapt.rounds.roundtask import Outcome
from edgeadapt.rounds.sums import clip
from edgeadapt.rounds.task import OptimizerName, Task, shared_layout, update_of
from tests.support.crafted import ADAPTER, EXACT, contributions, outcomes, task_of
from tests.support.fleet import BASE, make_fleet

Vector = NDArray[np.float64]
PRIOR = 1e-6  # of the squared coordinates, in the loss
PARTS = (Part.A, Part.B, Part.HEAD)
CANDIDATES, OTHERS, COMPARED = 100, 100, 300  # pictures; all after the others are public, the first are compared
FLOOR = 1e-3  # noise of a sum that has none, in the size of an update's numbers
MOST = 10  # pictures that are reconstructed at once


class Held(NamedTuple):
    """What a coordinator has after a round, as updates, and the standard deviation of the devices' noise in each."""

    upload: Vector  # of the first device
    total: Vector
    noise: float


def held(
    trainer: ClassifierTrainer, task: Task, devices: Sequence[Outcome], seed: int, settings: FederationSettings = EXACT
) -> Held:
    """Let devices go through all steps of the protocol with these outcomes of training."""
    spec, sent = contributions(trainer, task, devices, seed, settings)
    spec = replace(spec, base_digest=BASE)
    fleet = make_fleet(len(devices), spec=spec, seed=seed)
    fleet.vectors = dict(zip(fleet.devices, sent, strict=True))
    state, plans = fleet.begin(fleet.establish())
    uploads = {name: fleet.contribute(name, plan) for name, plan in sorted(plans.items())}
    for name, body in uploads.items():
        state = fleet.accept(state, "on_masked_input", name, body)
    _, result = fleet.open(*fleet.confirm(*state.close()))
    size, bits = spec.vector.size, spec.vector.ring_bits
    upload = ring.unpack(min(uploads.items())[1][: ring.packed_size(size, bits)], size, bits)
    segment = spec.vector.segment(task.SEGMENT)
    signed = (upload[: segment.size].astype(np.float64) + 2.0 ** (bits - 1)) % 2.0**bits - 2.0 ** (bits - 1)
    updates = signed * spec.vector.step(segment), result.values[segment.name]
    return Held(
        *(rotation.rotate_back(values, rotation.seed(ADAPTER)) for values in updates),
        noise=segment.noise * len(devices) ** 0.5,
    )


def likelihoods(seen: Vector, known: Vector, public: Vector, others: int, noise: float) -> Vector:
    """Return the log-likelihood ratio of each candidate: that its update, a row of ``known``, is in what is seen.

    ``others``: how many updates are in it besides. They are taken as normally distributed, with mean and covariance of
    the rows of ``public``. ``noise``: standard deviation of what else is in each number.
    """
    mean = public.mean(0)
    spread = (public - mean) * np.sqrt(others / len(public))
    rows = np.concatenate([(seen - others * mean)[None], known])
    inner = np.linalg.solve(noise**2 * np.eye(len(spread)) + spread @ spread.T, spread @ rows.T)
    whitened = (rows - inner.T @ spread) / noise**2
    ratios: Vector = known @ whitened[0] - (known * whitened[1:]).sum(1) / 2
    return ratios


@dataclass(frozen=True, slots=True)
class Attacker:
    trainer: ClassifierTrainer
    start: Tensors
    task: Task
    mean: Tensor  # of grey pictures from 0 to 1, shape (pixels,)
    basis: Tensor  # shape (coordinates, pixels)

    @classmethod
    def of(cls, trainer: ClassifierTrainer, start: Tensors, task: Task, public: NDArray[np.floating]) -> Self:
        pictures = torch.from_numpy(public).float()
        mean = pictures.mean(0)
        _, lengths, rows = torch.linalg.svd(pictures - mean, full_matrices=False)
        return cls(trainer, start, task, mean, rows * lengths[:, None] / len(public) ** 0.5)

    def reconstruct(self, update: Vector, labels: Sequence[int], tries: int = 2, steps: int = 400) -> Vector:
        """Return pictures of these labels, shape ``(labels, pixels)``: of some tries those with the least loss."""
        trainable.load(model_of(self.trainer), self.start)
        layout = shared_layout(self.trainer.layout, self.task)
        parts = layout.unflatten(-update.astype(np.float32))
        wanted = [normalize(torch.from_numpy(parts[one.name]).flatten(), dim=0) for one in layout.tensors]
        best, least = np.zeros((len(labels), len(self.mean))), np.inf
        for seed in range(tries):
            drawn = torch.randn(len(labels), len(self.basis), generator=torch.Generator().manual_seed(seed))
            at = (0.3 * drawn).requires_grad_()

            def loss(at: Tensor = at) -> Tensor:
                own = self._gradients(self.mean + at @ self.basis, torch.tensor(labels), list(parts))
                alike = [one @ other for one, other in zip(own, wanted, strict=True)]
                far = 1 - torch.stack(alike).mean() + PRIOR * (at**2).sum() / len(labels)
                (at.grad,) = torch.autograd.grad(far, [at])
                return far.detach()

            search = torch.optim.LBFGS([at], max_iter=steps, history_size=30, line_search_fn="strong_wolfe")
            search.step(loss)
            if (last := float(loss())) < least:
                best, least = (self.mean + at.detach() @ self.basis).clamp(0, 1).numpy().astype(np.float64), last
        return best

    def _gradients(self, pictures: Tensor, labels: Tensor, names: Sequence[str]) -> list[Tensor]:
        """Return the directions of the gradients of tensors, with a graph."""
        model: Any = model_of(self.trainer)
        channels = model.get_base_model().encoder.reader.channels
        colours = (255 * pictures)[..., None].expand(-1, -1, channels).flatten(1)
        with sdpa_kernel(SDPBackend.MATH):  # has second derivatives
            logits = model(input_ids=colours, attention_mask=torch.ones_like(colours))
        parameters = {
            name.replace(".default", "").replace("modules_to_save.", ""): parameter
            for name, parameter in model.named_parameters()
        }
        wanted = [parameters[name] for name in names]
        found = torch.autograd.grad(cross_entropy(logits, labels), wanted, create_graph=True)
        return [normalize(one.flatten(), dim=0) for one in found]


@dataclass(frozen=True, slots=True)
class Sight:
    """What an attacker sees: the update of one device or, of more, the sum of a round."""

    name: str
    devices: int = 1
    pictures: int = 1  # of a device
    optimizer: OptimizerName = OptimizerName.SGD
    settings: FederationSettings = EXACT
    masked: bool = False  # what one of the devices sends

    @property
    def others(self) -> int:
        return 0 if self.masked else self.devices * self.pictures - 1


@dataclass(slots=True)
class Row:
    """What is found: candidates, and of some trials the nearest reconstruction, its PSNR in dB and its correlation."""

    name: str
    trials: int = 0
    found: int = 0
    psnr: list[float] = field(default_factory=list)
    correlation: list[float] = field(default_factory=list)
    pictures: list[Vector] = field(default_factory=list)

    def add(self, reconstructed: Vector, original: Vector) -> None:
        errors = ((reconstructed - original) ** 2).mean(1)
        nearest = reconstructed[errors.argmin()]
        self.psnr.append(-10 * float(np.log10(errors.min())))
        self.correlation.append(float(np.corrcoef(nearest, original)[0, 1]))
        self.pictures.append(nearest)


@dataclass(frozen=True, slots=True)
class Ground:
    """A network, its adapter after some training, and pictures: candidates, those of other devices, and public ones."""

    trainer: ClassifierTrainer
    start: Tensors
    examples: Sequence[Example]
    pixels: Vector  # shape (pictures, pixels), from 0 to 1
    kept: dict[OptimizerName, list[Outcome]] = field(default_factory=dict)  # of training on one picture each

    @classmethod
    def of(cls, base: Base, layers: int, examples: Sequence[Example]) -> Self:
        """Train an adapter of the last ``layers`` of a base, 0: of all, on some of the public pictures."""
        labels, public = 1 + max(one.label for one in examples), examples[CANDIDATES + OTHERS :]
        config = configuration(base, layers=layers)
        trainer = torchengine.classifier(base, labels, config)
        rows, own = trainer.embed([one.text for one in public]), np.array([one.label for one in public])
        prototypes = np.stack([rows[own == label].mean(0) for label in range(labels)])
        start = classifier.seeded(model_of(trainer), prototypes, torch.Generator().manual_seed(0))
        usual = task_of(config, PARTS, labels=names(labels), optimizer=OptimizerName.ADAMW, learning_rate=1e-2)
        start = trainer.train(
            start, public[-100:], replace(usual, batch_size=16), epochs=1, rng=np.random.default_rng(0)
        )
        read = trainer.tokens([one.text for one in examples])
        pixels = np.array(read)[:, :: model_of(trainer).get_base_model().encoder.reader.channels] / 255
        return cls(trainer, start, examples, pixels)

    def attack(self, sight: Sight, trials: int, searches: int = 0, steps: int = 150) -> Row:
        """Look for the pictures of some trials, and reconstruct those of the first ``searches``."""
        rate = 1.0 if sight.optimizer is OptimizerName.SGD else 1e-2
        task = task_of(
            self.trainer.engine.config,
            PARTS,
            labels=names(1 + max(one.label for one in self.examples)),
            optimizer=sight.optimizer,
            learning_rate=rate,
        )
        layout, row = shared_layout(self.trainer.layout, task), Row(sight.name, trials)
        if sight.optimizer not in self.kept:
            each = [[one] for one in self.examples[: CANDIDATES + OTHERS + COMPARED]]
            self.kept[sight.optimizer] = outcomes(self.trainer, self.start, task, each)
        alone, norm = self.kept[sight.optimizer], sight.settings.aggregation.clip_norm
        known = np.stack([clip(update_of(one, layout), norm) for one in alone])
        floor = FLOOR * float(np.sqrt((known**2).mean()))
        attacker = Attacker.of(self.trainer, self.start, task, self.pixels[CANDIDATES + OTHERS :])
        for trial in range(trials):
            drawn = np.random.default_rng(trial).choice(OTHERS, sight.devices * sight.pictures - 1, replace=False)
            inside, devices = [trial, *(CANDIDATES + drawn).tolist()], []
            for at in range(0, len(inside), sight.pictures):
                own = [self.examples[number] for number in inside[at : at + sight.pictures]]
                several = sight.pictures > 1
                devices += outcomes(self.trainer, self.start, task, [own]) if several else [alone[inside[at]]]
            if sight.devices == 1:
                seen, noise = update_of(devices[0], layout) * sight.pictures, floor
            else:
                upload, total, deviation = held(self.trainer, task, devices, trial, sight.settings)
                seen, noise = (upload, float(upload.std())) if sight.masked else (total, deviation or floor)
            ratios = likelihoods(seen, known[:CANDIDATES], known[-COMPARED:], sight.others, noise)
            row.found += int(ratios.argmax()) == trial
            if trial < searches and sight.others < MOST:
                labelled = [self.examples[at].label for at in inside[: sight.others + 1]]
                rebuilt = attacker.reconstruct(seen, labelled, 1 if sight.others else 2, steps)
                row.add(rebuilt, self.pixels[trial])
        return row

    def means(self, searches: int) -> Row:
        """Return the mean picture of each label as the reconstruction: what an attacker has that sees nothing."""
        row, labels = Row("nothing: the mean picture of its label"), np.array([one.label for one in self.examples])
        public = np.arange(len(labels)) >= CANDIDATES + OTHERS
        for trial in range(searches):
            row.add(self.pixels[public & (labels == labels[trial])].mean(0)[None], self.pixels[trial])
        return row


def names(labels: int) -> tuple[str, ...]:
    return tuple(f"label {number}" for number in range(labels))
