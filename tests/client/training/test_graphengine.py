"""The trainer without torch makes the adapters that torch makes of the same batches, and needs nothing of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError
from aggregation.pki.identity import IdentityKey
from client.training import graphengine, torchengine
from client.training.control import TrainingControl
from client.training.denormals import flushes, without_denormals
from client.training.engine import classifier_trainer
from client.training.examples import Example
from client.training.trainer import ClassifierTrainer, parts
from edgeadapt.bases.base import Base
from edgeadapt.formats.bundle import TRAINING, Bundle, VerifiedBase
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.parts import PARTS, Part, part_of
from edgeadapt.methods.peft.lowrank import FACTORS
from edgeadapt.rounds.task import Task
from export.bundle.write import write_bundle
from export.onnx.classifier import export_classifier
from export.onnx.exported import Profile
from export.onnx.slotted import with_mean_head, with_own_head
from export.onnx.targets import SlotKind, Slots
from tests.support import refused
from tests.support.models import with_biases
from tests.support.training import dequantized

LABELS = ("Light", "Music", "Timer")
LORA = PeftConfig.lora(2, 4)
TASK = Task(LORA, LABELS, 1, 4, 0.01, 0.01, 0.0, PARTS, PARTS)
PHRASES = (
    ("turn on the light", 0),
    ("kitchen light off", 0),
    ("switch the lamp on please and make it bright", 0),
    ("play music", 1),
    ("stop the music", 1),
    ("play a song in the kitchen", 1),
    ("set a timer", 2),
    ("wake me in ten minutes", 2),
    ("start the timer", 2),
)
EXAMPLES = [Example(text, label) for text, label in PHRASES]
TEXTS = [text for text, _ in PHRASES]
Open = Callable[[Profile], VerifiedBase]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def bundled(folder: Path, exported: Any) -> VerifiedBase:
    """The base of a bundle, verified."""
    key = IdentityKey.generate(SystemEntropy())
    write_bundle(folder, exported, [], key=key)
    return Bundle(folder, (key.public,)).base()


@pytest.fixture(scope="module")
def opened(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Open:
    model = with_mean_head(tiny_base, ["query", "key", "value"])  # more slots than the adapters have
    folder = tmp_path_factory.mktemp("bundles")
    made = {
        profile: bundled(folder / profile.value, export_classifier(model, tiny_base, profile, training=True))
        for profile in (Profile.FP32, Profile.NATIVE_INT8)
    }
    return made.__getitem__


@pytest.fixture(scope="module")
def ours(opened: Open) -> ClassifierTrainer:
    return graphengine.classifier(opened(Profile.FP32), 3, LORA)


@pytest.fixture(scope="module")
def theirs(tiny_base: Base) -> ClassifierTrainer:
    return torchengine.classifier(tiny_base, 3, LORA)


@pytest.fixture(scope="module")
def start(ours: ClassifierTrainer) -> Tensors:
    drawn = rng(5)
    return {s.name: (0.2 * drawn.standard_normal(s.shape)).astype(np.float32) for s in ours.layout.tensors}


def distance(left: Tensors, right: Tensors) -> float:
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


# Of the same batches, the same adapters.


@pytest.mark.parametrize("trained", [PARTS, (Part.B, Part.HEAD), (Part.R, Part.HEAD)], ids=["all", "B", "Fed-SB"])
def test_an_epoch_makes_the_adapter_that_torch_makes(
    ours: ClassifierTrainer, theirs: ClassifierTrainer, start: Tensors, trained: tuple[Part, ...]
) -> None:
    task = replace(TASK, trained=trained)
    found, expected = (t.train(start, EXAMPLES, task, epochs=1, rng=rng(1)) for t in (ours, theirs))
    moved = distance({name: expected[name] for name in start}, start) if Part.R not in task.trained else 0.01
    assert distance(found, expected) < 0.002 * moved
    assert moved > 0.003


@pytest.fixture(scope="module")
def biased(make_base: Callable[..., Base], tmp_path_factory: pytest.TempPathFactory) -> Base:
    return with_biases(make_base(tmp_path_factory.mktemp("base")), tmp_path_factory.mktemp("biased"))


@pytest.fixture(scope="module")
def vectors(biased: Base, tmp_path_factory: pytest.TempPathFactory) -> VerifiedBase:
    """A base with slots of every kind that a classifier can train."""
    kinds = frozenset(SlotKind) - {SlotKind.BIASES, SlotKind.PROMPT, SlotKind.PREFIX}
    slotted = with_mean_head(biased, Slots(("query", "key", "intermediate.dense"), kinds))
    made = export_classifier(slotted, biased, Profile.FP32, training=True)
    return bundled(tmp_path_factory.mktemp("vectors") / "bundle", made)


@pytest.mark.parametrize(
    "config",
    [
        replace(LORA, target_modules=("query", "key")),
        replace(LORA, target_modules=("query", "key"), use_rslora=True),
        replace(LORA, target_modules=("query", "key"), use_dora=True),
        PeftConfig("IA3", 0, 0, ("key", "intermediate.dense"), feedforward_modules=("intermediate.dense",)),
        PeftConfig("BEFT", 0, 0, ("query", "intermediate.dense")),  # key's offset changes no softmax
        PeftConfig("LN_TUNING", 0, 0, ("LayerNorm",)),
        PeftConfig("ADALORA", 3, 5, ("query", "intermediate.dense")),
        PeftConfig("LOHA", 3, 5, ("query", "intermediate.dense")),
        PeftConfig("VERA", 24, 0, ("query", "intermediate.dense")),
        PeftConfig("BOTTLENECK", 3, 0, ("query", "intermediate.dense")),
        PeftConfig("BOTTLENECK_RELU", 3, 0, ("query", "intermediate.dense")),
        PeftConfig("BOTTLENECK_GELU", 3, 0, ("query", "intermediate.dense")),
    ],
    ids=lambda config: config.peft_type + "-s" * config.use_rslora + "-m" * config.use_dora,
)
def test_each_method_makes_the_adapter_that_torch_makes(
    vectors: VerifiedBase, biased: Base, config: PeftConfig
) -> None:
    ours, theirs, task = (
        graphengine.classifier(vectors, 3, config),
        torchengine.classifier(biased, 3, config),
        replace(TASK, peft_config=config),
    )
    assert ours.layout == theirs.layout
    drawn = rng(5)
    neutral = 1.0 if config.peft_type in ("IA3", "LN_TUNING") or config.use_dora else 0.0
    start = {
        s.name: (neutral * (part_of(s.name) is Part.VECTORS) + 0.2 * drawn.standard_normal(s.shape)).astype(np.float32)
        for s in ours.layout.tensors
    }
    np.testing.assert_allclose(ours.logits(start, TEXTS), theirs.logits(start, TEXTS), atol=1e-5)
    found, expected = (t.train(start, EXAMPLES, task, epochs=1, rng=rng(1)) for t in (ours, theirs))
    moved = {name: float(np.abs(expected[name] - start[name]).max()) for name in start}
    assert min(moved[name] for name in moved if part_of(name) is not Part.FROZEN) > 0.003
    assert distance(found, expected) < 0.002 * max(moved.values())
    if config.peft_type not in FACTORS:  # which are LoRA in a bundle, and stay so
        assert distance(ours.engine.tensors_of(ours.engine.inputs_of(found)), found) < 1e-6


@pytest.fixture(scope="module")
def top(biased: Base, tmp_path_factory: pytest.TempPathFactory) -> VerifiedBase:
    """A base with slots in the last of its two layers."""
    kinds = frozenset({SlotKind.LOW_RANK, SlotKind.SCALE, SlotKind.OFFSET})
    slotted = with_mean_head(biased, Slots(("query", "intermediate.dense"), kinds, first=-1))
    made = export_classifier(slotted, biased, Profile.FP32, training=True)
    return bundled(tmp_path_factory.mktemp("top") / "bundle", made)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_with_slots_in_the_last_layer_it_makes_the_adapter_that_torch_makes(
    top: VerifiedBase, biased: Base, dora: bool
) -> None:
    config = PeftConfig("LORA", 2, 4, ("query", "intermediate.dense"), use_dora=dora, layers_to_transform=(1,))
    ours, theirs = (opens(base, 3, config) for opens, base in ((graphengine.classifier, top), (in_torch, biased)))
    assert ours.layout == theirs.layout
    drawn, task = rng(5), replace(TASK, peft_config=config)
    start = {
        s.name: (float(part_of(s.name) is Part.VECTORS) + 0.2 * drawn.standard_normal(s.shape)).astype(np.float32)
        for s in ours.layout.tensors
    }
    found, expected = (t.train(start, EXAMPLES, task, epochs=2, rng=rng(1)) for t in (ours, theirs))
    assert distance(found, expected) < 0.002 * distance(expected, start)
    assert distance(ours.train(start, EXAMPLES, task, epochs=2, rng=rng(1)), found) == 0  # from states that are kept
    with refused(ConfigError, "--layers", value=0):
        graphengine.classifier(top, 3, replace(config, layers_to_transform=(0, 1)))


def in_torch(base: Base, labels: int, config: PeftConfig) -> ClassifierTrainer:
    """Torch on the same base, which computes states in float32 from the tokens."""
    trainer = torchengine.classifier(base, labels, config)
    trainer.engine._frozen = None
    return trainer


def test_on_a_quantized_base_it_trains_on_the_weights_that_the_device_runs(
    opened: Open, tiny_base: Base, start: Tensors, theirs: ClassifierTrainer, tmp_path: Path
) -> None:
    ours = graphengine.classifier(opened(Profile.NATIVE_INT8), 3, LORA)
    rounded = torchengine.classifier(dequantized(tiny_base, Profile.NATIVE_INT8, tmp_path / "rounded"), 3, LORA)
    found = ours.train(start, EXAMPLES, TASK, epochs=1, rng=rng(1))
    assert distance(found, rounded.train(start, EXAMPLES, TASK, epochs=1, rng=rng(1))) < 2e-5
    assert distance(found, theirs.train(start, EXAMPLES, TASK, epochs=1, rng=rng(1))) > 1e-4


def test_scores_logits_and_embeddings_are_torchs(
    ours: ClassifierTrainer, theirs: ClassifierTrainer, start: Tensors
) -> None:
    many = TEXTS * 5  # more than a run
    np.testing.assert_allclose(ours.logits(start, many), theirs.logits(start, many), atol=1e-5)
    np.testing.assert_allclose(ours.embed(many, start), theirs.embed(many, start), atol=1e-5)
    np.testing.assert_allclose(ours.embed(many), theirs.embed(many), atol=1e-5)
    assert np.abs(ours.embed(many) - ours.embed(many, start)).max() > 1e-3
    assert ours.embed(()).shape == (0, 32)
    found, expected = ours.score(start, EXAMPLES), theirs.score(start, EXAMPLES)
    assert (found.correct, found.count) == (expected.correct, expected.count)
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)


def test_the_loss_of_weighted_examples_is_their_weighted_cross_entropy(ours: ClassifierTrainer, start: Tensors) -> None:
    shares = [0.5, 0.25, 0.0, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0]
    losses = [ours.score(start, [example]).loss for example in EXAMPLES]
    loss, gradients = ours.engine.gradients(start, ours.weighted(EXAMPLES, shares))
    assert loss == pytest.approx(sum(share * one for share, one in zip(shares, losses, strict=True)), rel=1e-4)
    counted = [0, 1, 3]
    fewer = ours.weighted([EXAMPLES[i] for i in counted], [shares[i] for i in counted])
    assert distance(gradients, ours.engine.gradients(start, fewer)[1]) < 1e-5
    assert distance(gradients, ours.engine.gradients(start, ours.weighted(EXAMPLES, shares[::-1]))[1]) > 1e-3


def test_an_adapter_is_the_same_by_graph_input_and_under_pefts_names(ours: ClassifierTrainer, start: Tensors) -> None:
    inputs = ours.engine.inputs_of(start)
    assert distance(ours.engine.tensors_of(inputs), start) < 1e-6
    extra = next(name for name in sorted(inputs) if not inputs[name].size)
    with refused(DataError, extra):
        ours.engine.tensors_of(inputs | {extra: np.ones((*inputs[extra].shape[:1], 2), np.float32)})


def test_equal_arguments_give_equal_adapters_whatever_was_trained_before(
    ours: ClassifierTrainer, start: Tensors
) -> None:
    first = ours.train(start, EXAMPLES, TASK, epochs=2, rng=rng(1))
    ours.train(first, EXAMPLES[:3], TASK, epochs=1, rng=rng(9))
    assert distance(ours.train(start, EXAMPLES, TASK, epochs=2, rng=rng(1)), first) == 0


def test_a_batch_that_is_run_in_parts_to_save_memory_makes_the_same_adapter(
    ours: ClassifierTrainer, theirs: ClassifierTrainer, start: Tensors
) -> None:
    task = replace(TASK, batch_size=9)
    whole = ours.train(start, EXAMPLES, task, epochs=1, rng=rng(1))
    assert list(parts([5, 5, 5, 5, 20, 3], 13)) == [[0, 1], [2, 3], [4], [5]]
    for trainer in (ours, theirs):
        found = trainer.train(start, EXAMPLES, task, epochs=1, rng=rng(1), control=TrainingControl(tokens=13))
        assert distance(found, whole) < 1e-5


def test_the_step_is_called_before_each_batch_and_can_end_the_training(ours: ClassifierTrainer, start: Tensors) -> None:
    calls: list[int] = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours.train(start, EXAMPLES, TASK, epochs=9, rng=rng(), control=TrainingControl(step=stop))
    assert len(calls) == 2


# Bad input.


def test_a_long_text_is_truncated(ours: ClassifierTrainer, start: Tensors) -> None:
    long = " ".join(["light"] * 300)
    assert ours.logits(start, [long, "light"]).shape == (2, 3)


def test_biases_that_need_torch_are_refused(opened: Open) -> None:
    with refused(ConfigError, "task.peft_config"):
        graphengine.classifier(opened(Profile.FP32), 3, replace(LORA, bias="all"))


def test_a_base_without_the_slots_of_a_method_is_refused_by_the_first_that_lacks(opened: Open) -> None:
    for config in (PeftConfig("PROMPT_TUNING", 0, 0, (), num_virtual_tokens=2), replace(LORA, use_dora=True)):
        with refused(ConfigError, "--slots"):
            graphengine.classifier(opened(Profile.FP32), 3, config)


@pytest.mark.parametrize(
    "config",
    [
        PeftConfig.lora(2, 4, ("query", "output.dense")),
        PeftConfig.lora(2, 4, ("nothing",)),
        replace(PeftConfig.lora(2, 4, ("nothing",)), use_dora=True),
        *(PeftConfig(method, 2, 4 * (method != "VERA"), ("nothing",)) for method in ("ADALORA", "LOHA", "VERA")),
        PeftConfig("VERA", 2, 0, ("query", "output.dense")),
        PeftConfig("IA3", 0, 0, ("key", "nothing")),
        PeftConfig("IA3", 0, 0, ("key", "nothing"), feedforward_modules=("nothing",)),
        PeftConfig("BEFT", 0, 0, ("query", "nothing")),
        PeftConfig("LN_TUNING", 0, 0, ("LayerNorm", "nothing")),
    ],
    ids=lambda config: f"{config.peft_type} {' '.join(config.target_modules)}",
)
def test_a_target_that_fills_no_slot_is_refused(vectors: VerifiedBase, config: PeftConfig) -> None:
    with refused(ConfigError, "--slots", value=config.target_modules[-1]):
        graphengine.classifier(vectors, 3, config)


def test_weights_without_a_norm_are_refused(vectors: VerifiedBase, biased: Base) -> None:
    """An update that takes an output's weights away leaves no direction."""
    config = replace(LORA, target_modules=("query",), use_dora=True)
    ours = graphengine.classifier(vectors, 3, config)
    start = {s.name: np.full(s.shape, np.nan if "lora_A" in s.name else 1.0, np.float32) for s in ours.layout.tensors}
    with refused(DataError, "encoder.encoder.layer.0.attention.self.query"):
        ours.train(start, EXAMPLES, replace(TASK, peft_config=config), epochs=1, rng=rng())


def test_a_bundle_without_a_training_graph_is_refused(opened: Open) -> None:
    base = opened(Profile.FP32)
    files = {name: digest for name, digest in base.manifest.files.items() if name != TRAINING}
    with refused(ConfigError, TRAINING):
        graphengine.classifier(replace(base, manifest=replace(base.manifest, files=files)), 3, LORA)


def test_a_base_with_its_own_head_is_trained_and_has_no_embeddings_and_no_federation(
    tiny_base: Base, tmp_path: Path
) -> None:
    made = export_classifier(with_own_head(tiny_base, ["query", "value"]), tiny_base, Profile.FP32, training=True)
    base = bundled(tmp_path / "b", made)
    ours = graphengine.classifier(base, 3, LORA)
    start = {spec.name: np.full(spec.shape, 0.01, np.float32) for spec in ours.layout.tensors}
    batches = ours.weighted(EXAMPLES, [1 / len(EXAMPLES)] * len(EXAMPLES))
    first, gradients = ours.engine.gradients(start, batches)
    step = {name: value - np.float32(0.1) * gradients[name] for name, value in start.items()}
    assert ours.engine.gradients(step, batches)[0] < first
    odd = next(name for name in sorted(made.manifest.slots) if not name.startswith(("encoder.", "classifier.")))
    with refused(ConfigError, odd):
        ours.embed(["a"])
    with refused(ConfigError, odd):
        classifier_trainer(base, 3, LORA)


# Denormal numbers.


def test_denormal_numbers_are_flushed_within_the_block_alone() -> None:
    assert not flushes()
    with without_denormals():
        assert flushes()
    assert not flushes()


def test_training_and_scoring_flush_denormal_numbers(
    ours: ClassifierTrainer, start: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    graph, answering = ours.engine.graph, ours.engine.answering
    run, logits = graph.gradients, answering.mixed
    monkeypatch.setattr(graph, "gradients", lambda *a: (seen.append(flushes()), run(*a))[1])
    monkeypatch.setattr(answering, "mixed", lambda *a: (seen.append(flushes()), logits(*a))[1])
    ours.train(start, EXAMPLES, TASK, epochs=1, rng=rng())
    ours.score(start, EXAMPLES)
    assert len(seen) > 2
    assert all(seen)


def test_the_trainer_of_a_bundle_stays_loaded(opened: Open) -> None:
    base = opened(Profile.FP32)
    one = classifier_trainer(base, 3, LORA)
    assert one is classifier_trainer(replace(base, files=dict(base.files)), 3, LORA)
    assert one is not classifier_trainer(base, 4, LORA)
