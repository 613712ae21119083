"""A language model is trained without torch to the adapter that torch makes of the same batches."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, TrustError
from aggregation.pki.identity import IdentityKey
from client.training import graphengine, torchengine
from client.training.control import TrainingControl
from client.training.examples import Example, Score
from client.training.trainer import LanguageTrainer
from edgeadapt.bases.base import Base
from edgeadapt.formats.bundle import TRAINING, Bundle, VerifiedBase
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.peftconfig import Method, PeftConfig
from edgeadapt.methods.parts import PARTS
from edgeadapt.rounds.task import Task
from export.bundle.write import write_bundle
from export.causal import export_causal
from export.onnx.exported import ExportedBase, Profile
from export.onnx.targets import SlotKind, Slots
from tests.support import refused
from tests.support.training import dequantized

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = PeftConfig.lora(4, 8, ("q_proj", "v_proj"))
TASK = Task(LORA, (), 1, 3, 0.02, 0.01, 0.0, PARTS, PARTS)
EXAMPLES = (
    *(Example(text) for text in ("abab abab abab", "ba ba ba", "abba", "aabb aabb")),
    Example("yes", prompt="is it on?"),
    Example("no, never", prompt="a"),
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def exported(lm_base: Base) -> ExportedBase:
    kinds = frozenset({SlotKind.LOW_RANK, SlotKind.SCALE, SlotKind.OFFSET, SlotKind.BOTTLENECK})
    slots = Slots(("q_proj", "v_proj", "o_proj"), kinds)  # as test_dora.py has them
    return export_causal(lm_base, slots, Profile.NATIVE_INT8, training=True)


@pytest.fixture(scope="module")
def key() -> IdentityKey:
    return IdentityKey.generate(SystemEntropy())


@pytest.fixture(scope="module")
def opened(exported: ExportedBase, key: IdentityKey, tmp_path_factory: pytest.TempPathFactory) -> VerifiedBase:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    write_bundle(folder, exported, [], key=key)
    return Bundle(folder, (key.public,)).base()


@pytest.fixture(scope="module")
def ours(opened: VerifiedBase) -> LanguageTrainer:
    return graphengine.language(opened, LORA)


@pytest.fixture(scope="module")
def rounded(lm_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The weights that the device runs."""
    return dequantized(lm_base, Profile.NATIVE_INT8, tmp_path_factory.mktemp("rounded") / "base", "text-generation")


@pytest.fixture(scope="module")
def theirs(rounded: Base) -> LanguageTrainer:
    return torchengine.language(rounded, LORA)


@pytest.fixture(scope="module")
def start(ours: LanguageTrainer) -> Tensors:
    drawn = rng(5)
    return {s.name: (0.2 * drawn.standard_normal(s.shape)).astype(np.float32) for s in ours.layout.tensors}


def distance(left: Tensors, right: Tensors) -> float:
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


def one_epoch(opened: VerifiedBase, base: Base, config: PeftConfig) -> tuple[Tensors, Tensors]:
    """An adapter drawn at random becomes the same in the training graph and in torch: both results."""
    both, drawn = (graphengine.language(opened, config), torchengine.language(base, config)), rng(5)
    assert both[0].layout == both[1].layout
    start = {
        spec.name: (("magnitude" in spec.name) + 0.2 * drawn.standard_normal(spec.shape)).astype(np.float32)
        for spec in both[0].layout.tensors
    }
    task = replace(TASK, peft_config=config)
    found, expected = (t.train(start, EXAMPLES, task, epochs=1, rng=rng(1)) for t in both)
    moved = distance(expected, start)
    assert moved > 0.003
    assert distance(found, expected) < 0.002 * moved
    return found, expected


@pytest.fixture(scope="module")
def with_virtual_tokens(llama: Base, key: IdentityKey, tmp_path_factory: pytest.TempPathFactory) -> VerifiedBase:
    kinds = frozenset({SlotKind.LOW_RANK, SlotKind.PROMPT, SlotKind.PREFIX})
    exported = export_causal(llama, Slots(("q_proj",), kinds), Profile.FP32, training=True)
    folder = tmp_path_factory.mktemp("virtual") / "bundle"
    write_bundle(folder, exported, [], key=key)
    return Bundle(folder, (key.public,)).base()


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
def test_an_epoch_of_virtual_tokens_makes_those_that_torch_makes(
    with_virtual_tokens: VerifiedBase, llama: Base, method: Method
) -> None:
    config = PeftConfig(method, 0, 0, (), num_virtual_tokens=3)
    found, expected = one_epoch(with_virtual_tokens, llama, config)
    ours, theirs = graphengine.language(with_virtual_tokens, config), torchengine.language(llama, config)
    assert ours.score(expected, EXAMPLES).loss == pytest.approx(theirs.score(expected, EXAMPLES).loss, rel=1e-4)
    assert distance(ours.engine.tensors_of(ours.engine.inputs_of(found)), found) < 1e-6


def test_an_epoch_of_lora_is_the_same_with_slots_for_virtual_tokens(
    with_virtual_tokens: VerifiedBase, llama: Base
) -> None:
    one_epoch(with_virtual_tokens, llama, PeftConfig.lora(4, 8, ("q_proj",)))


def test_virtual_tokens_without_a_slot_or_without_room_for_a_text_are_refused(
    opened: VerifiedBase, with_virtual_tokens: VerifiedBase
) -> None:
    config = PeftConfig("PREFIX_TUNING", 0, 0, (), num_virtual_tokens=3)
    with refused(ConfigError, "--slots", value="prefix_key_values"):
        graphengine.language(opened, config)
    with refused(ConfigError, "num_virtual_tokens", value=600):
        graphengine.language(with_virtual_tokens, replace(config, num_virtual_tokens=600))


@pytest.mark.parametrize(
    "config",
    [
        LORA,
        replace(LORA, use_dora=True),
        *(PeftConfig(method, 3, 5, LORA.target_modules) for method in ("ADALORA", "LOHA")),
        PeftConfig("VERA", 24, 0, LORA.target_modules),
        PeftConfig("BOTTLENECK", 3, 0, ("o_proj",)),
    ],
    ids=["LoRA", "DoRA", "AdaLoRA", "LoHa", "VeRA", "bottleneck"],
)
def test_an_epoch_makes_the_adapter_that_torch_makes(opened: VerifiedBase, rounded: Base, config: PeftConfig) -> None:
    found, _ = one_epoch(opened, rounded, config)
    engine = graphengine.language(opened, config).engine
    if config.peft_type == "LORA":
        assert distance(engine.tensors_of(engine.inputs_of(found)), found) < 1e-6


def test_virtual_tokens_of_another_number_are_refused(with_virtual_tokens: VerifiedBase) -> None:
    config = PeftConfig("PROMPT_TUNING", 0, 0, (), num_virtual_tokens=3)
    trainer = graphengine.language(with_virtual_tokens, config)
    inputs = trainer.engine.inputs_of({s.name: np.zeros(s.shape, np.float32) for s in trainer.layout.tensors})
    with refused(DataError, "prompt_embeddings"):
        trainer.engine.tensors_of(inputs | {"prompt_embeddings": inputs["prompt_embeddings"][:2]})


def test_scores_are_torchs(ours: LanguageTrainer, theirs: LanguageTrainer, start: Tensors) -> None:
    for examples in (EXAMPLES, EXAMPLES[4:]):
        found, expected = ours.score(start, examples), theirs.score(start, examples)
        assert found.count == expected.count
        assert found.correct == pytest.approx(expected.correct, abs=1e-6)
        assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert ours.score(start, ()) == Score(0, 0, 0.0)


def test_an_answer_is_learned_when_its_least_likely_token_is_likely(
    ours: LanguageTrainer, theirs: LanguageTrainer, start: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs.score(start, EXAMPLES)  # torch's model then has the adapter
    model, least = theirs.engine.model, list[float]()
    with torch.inference_mode():
        for text in theirs.encode(EXAMPLES):
            probabilities = model(input_ids=torch.from_numpy(text.ids)[None]).logits[0].softmax(1).numpy()
            least.append(float(probabilities[text.positions, text.targets].min()))
    for factor, learned in ((0.999, True), (1.001, False)):
        monkeypatch.setattr("client.training.trainer.LIKELY", factor * min(least))
        assert ours.has_learned(start, EXAMPLES) is learned


def test_a_batch_in_parts_makes_the_same_adapter(ours: LanguageTrainer, start: Tensors) -> None:
    whole = ours.train(start, EXAMPLES, TASK, epochs=1, rng=rng(1))
    parts = ours.train(start, EXAMPLES, TASK, epochs=1, rng=rng(1), control=TrainingControl(tokens=16))
    assert 0 < distance(parts, whole) < 1e-5


# Bad input.


def test_a_training_graph_that_changed_after_it_was_verified_is_refused(
    exported: ExportedBase, key: IdentityKey, tmp_path: Path
) -> None:
    write_bundle(tmp_path / "bundle", exported, [], key=key)
    base = Bundle(tmp_path / "bundle", (key.public,)).base()
    with (base.folder / TRAINING).open("ab") as file:
        file.write(b"\0")
    with refused(TrustError, TRAINING):
        graphengine.language(base, LORA)
