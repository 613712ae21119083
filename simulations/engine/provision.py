"""Make the fleets of a run: its groups of clients, their base, an authority, a coordinator and devices.

The steps are those of a fleet in the field, in one process: each device creates its key, the authority certifies it,
and the device pins the authority and the coordinator. The apps get nothing but the state directories. A simulated
device orders its examples by the scenario's seed, so that a run can be repeated (``devices.SeededEntropy``).

A group has its own coordinator, registry and log. A device pins the key of its group's coordinator, so it takes part in
no other group, and its policy refuses a cohort that is too small. No device is in two groups: the sum over all devices
less the sums of the large groups would be the sum of a small one (docs/decisions/0043-cohorts-by-language.md)."""

import dataclasses
import hashlib
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from aggregation import graph
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError
from aggregation.pki import Authority, new_serial
from aggregation.pki.identity import IdentityKey
from client.inference.trust import Trust
from client.node.policy import SAFE, PolicySettings, TrainingLimits
from client.node.statedir import DeviceSettings, DeviceStateDir, TrustAnchors, enrol, install_certificate
from client.training.engine import classifier_trainer, language_trainer, open_trainer, trainer_of
from client.training.examples import Example, Split, write_examples
from client.training.logistic import cross_entropy, logistic_head, with_constant
from client.training.personal import HEADS
from client.training.torchengine import TorchEngine, model_of
from client.training.trainer import ClassifierTrainer, FrozenBase
from coordinator.registry import Registry
from coordinator.seed import seed_version
from coordinator.statedir import KEY, CoordinatorStateDir, open_registry
from edgeadapt.bases.base import Base, OwnModel, find_base, with_task
from edgeadapt.bases.markedwords import MARKED
from edgeadapt.bases.pictures import PictureReader
from edgeadapt.bases.sounds import SoundReader, samples_of
from edgeadapt.bases.tasks import OwnTask
from edgeadapt.formats.bundle import TRUST
from edgeadapt.formats.graphinputs import ENDINGS
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.manifest import VersionManifest
from edgeadapt.formats.peftconfig import OWN, PeftConfig, require_gradients
from edgeadapt.formats.registryfiles import RegistrySettings
from edgeadapt.formats.storage import PRIVATE_FOLDER, PUBLIC, cached, replace, staged
from edgeadapt.methods.classifier import seed_adapter
from edgeadapt.methods.parts import HEAD
from edgeadapt.methods.trainable import configuration, initial
from edgeadapt.rounds.ridge import unit_rows
from export.bundle.write import write_bundle
from export.causal import export_causal
from export.features import centered, with_lexical_features, with_marked_words, with_pixels
from export.onnx.classifier import export_classifier
from export.onnx.exported import Profile
from export.onnx.slotted import with_mean_head
from export.onnx.targets import SlotKind, Slots
from export.prune import WORDS, frequent_words, prune
from simulations.data.households import released_phrases
from simulations.data.population import Client, LabelledText, Population
from simulations.engine.devices import SEED
from simulations.scenario import Scenario

Matrix = NDArray[np.float64]
KINDS = {  # method → what its adapters bring
    "IA3": frozenset({SlotKind.SCALE, SlotKind.INPUT_SCALE}),
    "BEFT": frozenset({SlotKind.OFFSET}),
    "LN_TUNING": frozenset({SlotKind.NORMS}),
    "PROMPT_TUNING": frozenset({SlotKind.PROMPT}),
    "PREFIX_TUNING": frozenset({SlotKind.PREFIX}),
    **{method.upper(): frozenset({SlotKind(method.replace("_", "-"))}) for method in ENDINGS},
}
DORA = frozenset({SlotKind.LOW_RANK, SlotKind.SCALE, SlotKind.OFFSET})
CENTERED = "centered"  # folders in that of the run
LEXICAL, PIXELS = "lexical", "pixels"
BUCKETS, LENGTHS = 1024, (2, 3)  # of hashed n-grams; characters
SMALL, SPECTRA = PictureReader(32, 32, 1), 32
STATES = "states"  # as long as a run or suite is not finished
AUTHORITY = "authority"
AUTHORITY_KEY = "authority.pem"
COORDINATOR = "coordinator"
DEVICES = "devices"
LIFETIME = timedelta(days=365)
PENALTY = 0.1  # of the vendor's logistic head, on half the sum of its squared weights


def hashed_ngrams(texts: Sequence[str]) -> Matrix:
    """Return what a text classifier without a model reads, shape ``(texts, BUCKETS)``, rows of unit length.

    Runs of two and three characters, in lower case, are counted in hashed buckets, with a hashed sign (Weinberger et
    al. 2009, "Feature hashing for large scale multitask learning"). Of a picture these are ``BUCKETS`` grey pixels, of
    a sound its spectrum in ``SPECTRA`` parts of its time.
    """
    rows = np.zeros((len(texts), BUCKETS))
    for row, text in zip(rows, texts, strict=True):
        if text.startswith(PictureReader.begin):
            row[:] = SMALL.encode(text).ids / 255
            continue
        if text.startswith(SoundReader.begin):
            row[:] = _spectra(text)
            continue
        padded = f" {' '.join(text.lower().split())} "
        for length in LENGTHS:
            for at in range(len(padded) - length + 1):
                hashed = zlib.crc32(padded[at : at + length].encode())
                row[hashed % BUCKETS] += 1 if hashed >> 31 else -1
    return unit_rows(rows)


def _spectra(text: str) -> Matrix:
    parts = np.array_split(samples_of(text), SPECTRA)
    size = 2 * BUCKETS // SPECTRA
    spectra = [np.abs(np.fft.rfft(np.resize(part.mean(1), max(size, len(part))))) for part in parts]
    means = [[each.mean() for each in np.array_split(one[1:], BUCKETS // SPECTRA)] for one in spectra]
    return np.log1p(np.array(means)).reshape(-1)


def ridge_head(
    x: Matrix, labels: NDArray[np.int64], weights: Matrix, count: int, penalty: float, prior: Matrix | None = None
) -> Matrix:
    """Return the head that least squares gives: argmin of Σ wᵢ ‖xᵢ W - yᵢ‖² + penalty ‖W - prior‖², with one-hot y. It
    needs Σ w x xᵀ and Σ w x yᵀ only, which add up over clients (Hoerl and Kennard 1970, "Ridge Regression"). ``x``:
    shape ``(texts, features)``. The head has the shape ``(features, count)``."""
    weighted = x * weights[:, None]
    targets = np.eye(count)[labels]
    right = targets if prior is None else targets - x @ prior
    if len(x) < x.shape[1]:  # the same, by the smaller matrix
        roots = np.sqrt(weights)[:, None]
        products = (roots * x) @ (roots * x).T + penalty * np.eye(len(x))
        head = (roots * x).T @ np.linalg.solve(products, roots * right)
    else:
        head = np.linalg.solve(weighted.T @ x + penalty * np.eye(x.shape[1]), weighted.T @ right)
    fitted: Matrix = head if prior is None else prior + head
    return fitted


def training_base(out: Path, scenario: Scenario, population: Population) -> Base:
    """Return the base of the run in ``out``; what has to be made is made once. Raises ConfigError if it cannot be."""
    base = uncentered_base(scenario)
    if scenario.data.by_word:
        copy = out / MARKED
        base = find_base(str(copy)) if copy.exists() else with_marked_words(base, copy)
    if scenario.base.center:
        copy = out / CENTERED
        base = find_base(str(copy)) if copy.exists() else centered(base, [u.text for u in population.public], copy)
    if size := scenario.base.lexical:
        copy = out / LEXICAL
        base = find_base(str(copy)) if copy.exists() else with_lexical_features(base, size, copy)
    if side := scenario.base.pixels:
        copy = out / PIXELS
        base = find_base(str(copy)) if copy.exists() else with_pixels(base, side, copy)
    return with_task(base, scenario.data.task)


def with_shared_states(out: Path, scenario: Scenario, population: Population, base: Base) -> Base:
    """Return the base with the states of its frozen layers for the texts of a population, in a folder in ``out``. They
    are computed once, for all arms and processes; so an adapter does not depend on which process met a text first.
    The base itself, if no layers are frozen or another engine trains."""
    config = peft_config(scenario, base)
    if not config.layers_to_transform or scenario.base.engine != "torch" or not population.labels:
        return base
    named = f"{population.digest}/{base.digest}/{min(config.layers_to_transform)}"
    place = out / STATES / hashlib.sha256(named.encode()).hexdigest()[:16]
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.exists():
            mine = cast(ClassifierTrainer, open_trainer(base, len(population.labels), config))
            asked = population.sampled(scenario.evaluation.clients, scenario.seed).clients
            seen = [client for client in population.clients if not client.unseen]
            parts = [part for client in seen for part in (client.train, client.validation)]
            parts += [part for client in asked for part in (client.train, client.validation, client.test)]
            texts = {text.text: None for part in [released_texts(population), *parts] for text in part}
            cast(TorchEngine, mine.engine).share_states(mine.tokens([*texts]), place)
    return dataclasses.replace(base, states=place) if place.exists() else base


def forget_states(out: Path) -> None:
    """Delete the states in ``out``, which tell what the texts are about, when all processes have ended."""
    shutil.rmtree(out / STATES, ignore_errors=True)


def uncentered_base(scenario: Scenario) -> Base:
    """Return the base before it is centered, which changes no size, and has a task. Raises as ``training_base``."""
    base = find_base(scenario.base.model)
    _require_possible(scenario, isinstance(base, OwnModel))
    return _pruned(base, scenario.kept_languages) if scenario.kept_languages else base


def _require_possible(scenario: Scenario, own_model: bool) -> None:
    """Check that a scenario asks a model with its own training loop, and a task of others, for nothing that they do not
    have. Raises ConfigError."""
    own_task = scenario.data.own_task
    odd = {
        "base.languages=[]": own_model and bool(scenario.kept_languages),
        "base.center=false": own_model and scenario.base.center,
        "base.lexical=0": own_model and scenario.base.lexical > 0,
        "base.engine=torch": (own_model or own_task) and scenario.base.engine != "torch",
        "federation.analytic.rounds=0": (own_model or own_task) and scenario.federation.analytic.rounds > 0,
        "personal.method=fine-tune": (own_model or own_task) and scenario.personal.method in (*HEADS, "ensemble"),
        "groups.by=none": own_model and scenario.groups.by == "discovered",
        "attack.kind=none": own_task and scenario.attack.kind in ("label-flip", "boost"),
    }
    if keys := [key for key, is_odd in odd.items() if is_odd]:
        model = f"model {scenario.base.model} has its own training loop, no embeddings and no file"
        task = f"the task {scenario.data.task!r} has no classes and no training graph"
        reason = f"{model if own_model else task}: set {', '.join(keys)}"
        raise ConfigError(reason, about=keys[0].partition("=")[0])


def device_base(out: Path, scenario: Scenario, base: Base, population: Population) -> FrozenBase:
    """Return what the devices of the run in ``out`` train on: the base itself, or that of a bundle that is made once.
    Raises ConfigError if the base has no training graph, or the engine trains no such adapter."""
    if scenario.base.engine == "torch":
        return base
    config, bundle, labels = peft_config(scenario, base), bundle_of(out), len(population.labels)
    require_gradients(config)
    if not bundle.exists():
        _write(bundle, base, config, Profile(scenario.export.profile), language=not labels)
    verified = Trust.open(bundle).bundle.base()
    trainer_of(verified, labels, config)  # refuses what the devices would
    return verified


def _write(bundle: Path, base: Base, config: PeftConfig, profile: Profile, *, language: bool) -> None:
    """Write a bundle of the base with slots for such adapters and a training graph, and the key that signs it."""
    kinds = DORA if config.use_dora else KINDS.get(config.peft_type, frozenset({SlotKind.LOW_RANK}))
    slots = Slots(config.target_modules, kinds, first=min(config.layers_to_transform, default=0))
    if language:
        exported = export_causal(base, slots, profile, training=True)
    else:
        exported = export_classifier(with_mean_head(base, slots), base, profile, training=True)
    key = IdentityKey.generate(SystemEntropy())
    bundle.parent.mkdir(exist_ok=True)
    replace(bundle.with_name(TRUST), key.public.to_pem(), PUBLIC)
    write_bundle(bundle, exported, [], key=key, once=True)


def _pruned(base: Base, languages: tuple[str, ...]) -> Base:
    """Return the base with the tokens of these languages. It depends on no run, so the cache keeps it."""
    source = "\n".join((base.digest, *languages, str(WORDS), version("wordfreq")))

    def make(folder: Path) -> None:
        prune(base, frequent_words(languages, WORDS), [], folder / "base")

    return find_base(str(cached(f"pruned-{hashlib.sha256(source.encode()).hexdigest()[:16]}", make) / "base"))


def peft_config(scenario: Scenario, base: Base) -> PeftConfig:
    """Configure the scenario's adapter on its base. Raises ConfigError as ``trainable.configuration``."""
    if isinstance(base, OwnModel):
        return PeftConfig(OWN, 0, 0, ())
    return configuration(base, **scenario.adapter.model_dump(exclude={"head"}))


def device_folder(out: Path, client: str) -> Path:
    return out / DEVICES / client


def bundle_of(out: Path) -> Path:
    """Locate the bundle with which the devices of a run train, if their engine is ``onnx``."""
    return out / "training" / "bundle"


def provision(
    out: Path, scenario: Scenario, population: Population, base: Base, stores: RegistrySettings | None = None
) -> None:
    """Create authority and coordinator of the fleet under ``out``; ``Enrolment`` creates the devices. ``stores`` says
    where the registry is kept; None: in the coordinator's state directory."""
    entropy, now = SystemEntropy(), datetime.now(UTC)
    authority = Authority.create("edgeadapt simulation", entropy, now - timedelta(hours=1), now + LIFETIME)
    (out / AUTHORITY).mkdir(parents=True)
    replace(out / AUTHORITY / AUTHORITY_KEY, authority.to_pem())
    federation = scenario.federation
    if federation.cohort.seed == "random":
        cohort = federation.cohort.model_copy(update={"seed": scenario.seed})
        federation = federation.model_copy(update={"cohort": cohort})
    root = authority.root.to_pem()
    coordinator = CoordinatorStateDir.create(out / COORDINATOR, root, federation, entropy, stores=stores)
    coordinator.registry.publish(*first_adapter(scenario, population, base), coordinator.key)
    coordinator.registry.close()


@dataclass(frozen=True, slots=True)
class Enrolment:
    """Enrols the devices of a fleet, each when it is needed first."""

    out: Path
    authority: Authority  # certifies the devices
    anchors: TrustAnchors  # what they pin
    settings: DeviceSettings
    clients: Mapping[str, Client]  # name → the client whose device it is
    seed: int

    @classmethod
    def of(cls, out: Path, scenario: Scenario, population: Population, base: Base) -> Self:
        authority = Authority.from_pem((out / AUTHORITY / AUTHORITY_KEY).read_bytes())
        coordinator = IdentityKey.from_pem((out / COORDINATOR / KEY).read_bytes()).public
        # The base is named as in the scenario; one that the run has made is in a folder.
        name = str(base.folder) if scenario.base_is_made else scenario.base.model
        name = str(bundle_of(out)) if scenario.base.engine == "onnx" else name
        return cls(
            out,
            authority,
            TrustAnchors(authority.root.to_pem(), coordinator.to_pem()),
            DeviceSettings(base=name, task=scenario.data.task, policy=_policy(scenario, population)),
            {client.name: client for client in population.clients},
            scenario.seed,
        )

    def state_dir(self, name: str) -> DeviceStateDir:
        """Open the state directory of a client's device, created if missing: completely, or not at all."""
        folder = device_folder(self.out, name)
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            with staged(folder, mode=PRIVATE_FOLDER) as stage:
                self._enrol(stage, self.clients[name])
        return DeviceStateDir(folder, self.settings)

    def enrol(self, names: Iterable[str]) -> None:
        for name in names:
            self.state_dir(name)

    def _enrol(self, folder: Path, client: Client) -> None:
        now = datetime.now(UTC)
        key = enrol(folder, client.name, self.settings, self.anchors, SystemEntropy())
        begin, end, serial = now - timedelta(hours=1), self.authority.root.not_after, new_serial(SystemEntropy())
        certificate = self.authority.issue(client.name, key, not_before=begin, not_after=end, serial=serial)
        state_dir = DeviceStateDir(folder, self.settings)
        install_certificate(state_dir, certificate, now)
        write_examples(state_dir.examples, examples_of(client))
        replace(folder / SEED, hashlib.sha256(f"{self.seed}/{client.name}".encode()).digest())


def _policy(scenario: Scenario, population: Population) -> PolicySettings:
    fleet = sum(not client.unseen for client in population.clients)
    fleet = min(fleet, scenario.federation.cohort.size or fleet)
    smallest = max(3, min(SAFE.minimum_cohort, fleet - 2))  # the default unless the fleet is smaller
    honest = graph.quorum(smallest, SAFE.corrupt_fraction) - graph.count_of(smallest, SAFE.corrupt_fraction)
    return PolicySettings(
        minimum_cohort=smallest,
        minimum_survivors=min(SAFE.minimum_survivors, honest),
        adversaries=sorted({"active", scenario.federation.aggregation.adversary}),
        observations=scenario.federation.discovery.rounds > 0,
        **_training_limits(scenario, len(population.labels)),
    )


def first_adapter(scenario: Scenario, population: Population, base: Base) -> tuple[VersionManifest, bytes]:
    """Return version 0 of a run: its manifest and its file. The head comes from the public texts. Raises ConfigError as
    ``peft_config``, or if the federation's method trains no such adapter."""
    config, generator = peft_config(scenario, base), torch.Generator().manual_seed(scenario.seed)
    if isinstance(base, OwnModel):
        tensors = base.first(len(population.labels))
    elif population.labels:
        mine = classifier_trainer(base, len(population.labels), config)
        public = [(phrase.text, phrase.label) for phrase in population.public]
        tensors = seed_adapter(model_of(mine), mine.tokenizer, public, len(population.labels), generator)
        if scenario.adapter.head == "logistic" or scenario.data.own_task:  # without classes, without prototypes
            tensors |= _fitted_head(mine, public_examples(population.public), tensors)
    else:
        tensors = initial(model_of(language_trainer(base, config)), generator)
    manifest, blob = seed_version(tensors, config, population.labels, base.digest)
    scenario.federation.task(manifest)
    return manifest, blob


def _fitted_head(mine: ClassifierTrainer, public: Sequence[Example], tensors: Tensors) -> Tensors:
    """Fit a head to public examples by the loss of the base's task, under the names of its tensors in ``tensors``. It
    shows a task that fails before the first round, whose devices would contribute nothing."""
    weight, bias = (next(name for name in tensors if name.endswith(f"{HEAD}.{part}")) for part in ("weight", "bias"))
    x, weights, own = with_constant(mine.embed([one.text for one in public])), np.ones(len(public)), mine.objective
    numbers = np.array([one.target or one.label for one in public], np.float64 if public[0].target else np.int64)
    loss = partial(_loss_of, own) if isinstance(own, OwnTask) else cross_entropy
    fitted = logistic_head(x, numbers, weights, len(tensors[bias]), PENALTY, loss_of=loss)
    mine.rated((x @ fitted).astype(np.float32), public)
    return {weight: fitted[:-1].T.astype(np.float32), bias: fitted[-1].astype(np.float32)}


def _loss_of(task: OwnTask, outputs: Matrix, targets: NDArray[Any]) -> tuple[Matrix, Matrix]:
    """Compute the loss of each row, and its gradient, as ``logistic_head`` needs them."""
    given = torch.from_numpy(outputs).requires_grad_()
    losses = task.loss(given, torch.from_numpy(targets))
    (gradient,) = torch.autograd.grad(losses.sum(), given)
    return losses.detach().numpy(), gradient.numpy()


def examples_of(client: Client) -> list[Example]:
    parts = {Split.TRAIN: client.train, Split.VALIDATION: client.validation, Split.TEST: client.test}
    return [
        Example(phrase.text, phrase.label, part, phrase.prompt, phrase.target)
        for part, phrases in parts.items()
        for phrase in phrases
    ]


def public_examples(public: Sequence[LabelledText]) -> list[Example]:
    return [Example(text.text, text.label, Split.TRAIN, target=text.target) for text in public]


def released_texts(population: Population) -> list[LabelledText]:
    """Return the public texts that a release carries, with plain phrases in the languages of the clients."""
    if any(text.target for text in population.public):  # outputs of a task, which may have the name of an intent
        return [*population.public]
    numbers = {label: i for i, label in enumerate(population.labels)}
    languages = {client.language for client in population.clients}
    return [*population.public] + [
        LabelledText(text, numbers[intent], f"{code}/plain")
        for code in sorted(languages & released_phrases().keys())
        for intent, texts in released_phrases()[code].items()
        for text in texts
        if intent in numbers
    ]


def registry(out: Path) -> Registry:
    folder = out / COORDINATOR
    return open_registry(folder, IdentityKey.from_pem((folder / KEY).read_bytes()))


def _training_limits(scenario: Scenario, labels: int) -> dict[str, Any]:
    """Return the default limits, except where the scenario itself needs more, and without a delay of answers. The
    in-process grid has a clock of its own, in which training takes no time, and nobody measures the answers."""
    training, adapter, default = scenario.federation.training, scenario.adapter, TrainingLimits()
    needed = {
        "maximum_scaling": adapter.alpha / (1 if adapter.method == "rslora" else adapter.rank),
        "maximum_virtual_tokens": adapter.virtual_tokens,
        "maximum_labels": labels,
        "maximum_learning_rate": training.learning_rate,
        "maximum_epochs": training.epochs * (1 + training.variants),
        "maximum_batch_size": training.batch_size,
        "maximum_weight_decay": training.weight_decay,
        "maximum_momentum": training.momentum,
        "maximum_proximal": training.proximal,
    }
    limits = {name: max(value, getattr(default, name)) for name, value in needed.items()}
    limits["minimum_labels"] = min(labels or 2, default.minimum_labels)
    fewest = min(training.batch_size, default.minimum_batch_size)
    return limits | {"minimum_batch_size": fewest, "answer_quantum_seconds": 0}
