"""Pictures, sounds and sensors through both trainers, a bundle and its session, and as examples of a device."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from aggregation.entropy import SystemEntropy
from aggregation.errors import DataError
from aggregation.pki.identity import IdentityKey
from client.training import graphengine, torchengine
from client.training.examples import Example, Split, parse_examples, read_file
from client.training.hygiene import clean
from client.training.personal import Candidate, Choice, PersonalStep, personalize
from client.training.torchengine import TorchEngine, model_of
from client.training.trainer import ClassifierTrainer
from edgeadapt.bases.base import Base, find_base
from edgeadapt.bases.media import MAX_MEDIUM
from edgeadapt.bases.pictures import picture
from edgeadapt.bases.sounds import SoundReader
from edgeadapt.formats.bundle import LOWER, Bundle, VerifiedBase
from edgeadapt.formats.graphinputs import to_inputs
from edgeadapt.formats.layout import Tensors
from edgeadapt.methods.classifier import seed_adapter
from edgeadapt.methods.parts import PARTS
from edgeadapt.methods.trainable import configuration
from edgeadapt.rounds.task import Task
from export.bundle.write import write_bundle
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from export.onnx.slotted import with_mean_head
from export.onnx.targets import Slots
from export.parity.compare import OnnxRunner, compare
from tests.support import refused, sounds
from tests.support.pictures import LABELS, make_base, stripe_pictures, stripes


@pytest.fixture(scope="module", params=["vit", "mobilenet_v2", "speech", "windows"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    if request.param == "windows":
        return find_base(sounds.WINDOWS)
    folder = tmp_path_factory.mktemp(request.param)
    return sounds.make_base(folder) if request.param == "speech" else make_base(folder, request.param)


def drawn(trainer: ClassifierTrainer, seed: int) -> list[tuple[str, int]]:
    if not isinstance(reader := trainer.tokenizer, SoundReader):
        return stripe_pictures(24, seed)
    return (sounds.tones if reader.channels == 1 else sounds.windows)(24, seed)


def seen(trainer: ClassifierTrainer) -> list[Example]:
    return [Example(text, label) for text, label in drawn(trainer, 1)]


@pytest.fixture(scope="module")
def trainer(base: Base) -> ClassifierTrainer:
    return torchengine.classifier(base, len(LABELS), configuration(base, rank=2, layers=1))


@pytest.fixture(scope="module")
def start(trainer: ClassifierTrainer) -> Tensors:
    model, generator = model_of(trainer), torch.Generator().manual_seed(0)
    return seed_adapter(model, trainer.tokenizer, drawn(trainer, 1)[:4], len(LABELS), generator)


def train(trainer: ClassifierTrainer, start: Tensors, examples: list[Example]) -> Tensors:
    task = Task(trainer.engine.config, LABELS, 1, 8, 0.02, 0.0, 0.0, PARTS, PARTS)
    return trainer.train(start, examples, task, epochs=4, rng=np.random.default_rng(0))


def exported(trainer: ClassifierTrainer, profile: Profile, *, training: bool) -> ExportedBase:
    config = trainer.engine.config
    slots = Slots(config.target_modules, first=min(config.layers_to_transform))
    base = cast(Base, trainer.base)
    return export_classifier(with_mean_head(base, slots), base, profile, training=training)


def verified(folder: Path, made: ExportedBase) -> VerifiedBase:
    key = IdentityKey.generate(SystemEntropy())
    write_bundle(folder, made, [], key=key)
    return Bundle(folder, (key.public,)).base()


def test_an_adapter_of_the_last_layer_learns_files(trainer: ClassifierTrainer, start: Tensors) -> None:
    examples = seen(trainer)
    assert trainer.score(train(trainer, start, examples), examples).loss < 0.97 * trainer.score(start, examples).loss


def test_the_layers_below_run_once_for_a_file(trainer: ClassifierTrainer, start: Tensors) -> None:
    assert trainer.engine.states is not None
    frozen = cast(TorchEngine, trainer.engine)._frozen
    assert frozen is not None
    asked, states = list[int](), frozen.states
    frozen.states = lambda tokens, **how: asked.append(len(tokens)) or states(tokens, **how)  # type: ignore
    try:
        trainer.engine.states.begin({})
        first, again = (trainer.logits(start, [seen(trainer)[0].text]) for _ in range(2))
    finally:
        frozen.states = states  # type: ignore[method-assign]
    assert (asked, first.tolist()) == ([1], again.tolist())


@pytest.mark.parametrize("method", ["fine-tune", "ridge", "logistic", "ensemble"])
def test_variants_of_the_training_examples_are_learned_as_examples_are(
    trainer: ClassifierTrainer, start: Tensors, method: str
) -> None:
    """Not those of held-out examples, which choose."""
    own, held = seen(trainer)[:6], [replace(one, split=Split.VALIDATION) for one in seen(trainer)[6:10]]
    task = Task(trainer.engine.config, LABELS, 1, 64, 0.02, 0.0, 0.0, PARTS, PARTS)
    how = PersonalStep(1, 16.0, method, choice=Choice.NEVER)

    def made(examples: list[Example], task: Task) -> Tensors:
        rng, shared = np.random.default_rng(0), {Candidate.GLOBAL: start}
        return personalize(trainer, shared, examples, task, how, rng=rng).judged

    written = [replace(one, text=f"{one.text}#{number}") for one in own for number in (1, 2)]
    found, expected, plain = (
        made([*own, *held], replace(task, variants=2)),
        made([*own, *written, *held], task),
        made([*own, *held], task),
    )

    def apart(one: Tensors) -> float:
        return max(float(np.abs(found[name] - one[name]).max()) for name in found)

    assert apart(expected) < 2e-4
    assert apart(plain) > 1e-3


@pytest.mark.parametrize("profile", [Profile.FP32, Profile.NATIVE_INT8, Profile.WEB_INT8])
def test_the_exported_graph_answers_as_torch(trainer: ClassifierTrainer, start: Tensors, profile: Profile) -> None:
    made, model = exported(trainer, profile, training=False), model_of(trainer)
    trained = train(trainer, start, seen(trainer))
    trainer.logits(trained, [seen(trainer)[0].text])  # sets the model's adapter
    config = trainer.engine.config
    inputs = to_inputs(trained, {path: config.scaling_of(path) for path in _layers(trained)})
    found = compare(model, OnnxRunner.open(made.folder, made.manifest), inputs, [text for text, _ in drawn(trainer, 2)])
    assert made.manifest.independent_rows
    assert found.agreement == 1
    assert max(found.max_abs_diff, found.mixed_diff) < (1e-4 if profile is Profile.FP32 else 0.1)


def _layers(tensors: Tensors) -> set[str]:
    return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors if ".lora_" in name}


def test_the_training_graph_makes_the_adapter_that_torch_makes(
    trainer: ClassifierTrainer, start: Tensors, tmp_path: Path
) -> None:
    base = verified(tmp_path / "bundle", exported(trainer, Profile.FP32, training=True))
    assert LOWER in base.manifest.files
    graph = graphengine.classifier(base, len(LABELS), trainer.engine.config)
    examples = seen(trainer)
    ours, theirs = train(graph, start, examples), train(trainer, start, examples)
    assert ours.keys() == theirs.keys()
    # Torch keeps the states of frozen layers in float16, and AdamW takes as large a step for a small gradient.
    off, way = (
        sum(float(((one[n] - other[n]) ** 2).sum()) for n in start) for one, other in ((ours, theirs), (theirs, start))
    )
    assert off < 0.05**2 * way
    assert np.abs(graph.embed([examples[0].text]) - trainer.embed([examples[0].text])).max() < 1e-4


def examples_file(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "examples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lines_name_pictures_and_sounds_by_their_path_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.wav").write_bytes(sounds.tone(1, 5))
    (tmp_path / "own" / "a.png").write_bytes(stripes(1, 5))
    row = {"image": "own/a.png", "label": 1}
    path = examples_file(
        tmp_path,
        {"text": "a text stays", "label": 0},
        row,
        row | {"split": "validation"},
        {"audio": "own/a.wav", "label": 1},
    )
    texts, *pictures, heard = parse_examples(read_file(path), path, 2)
    assert texts.text == "a text stays"
    assert {one.text for one in pictures} == {picture(stripes(1, 5))}
    assert heard.text == sounds.sound(sounds.tone(1, 5))
    assert "base64" not in repr([*pictures, heard])


@pytest.mark.parametrize(
    ("content", "why"), [(None, "No such file"), (b"", "damaged"), (b"\x89PNG\r\n\x1a\n", "damaged")]
)
def test_a_picture_that_cannot_be_read_is_named_by_its_line(tmp_path: Path, content: bytes | None, why: str) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    path = examples_file(tmp_path, {"text": "t", "label": 0}, {"image": "a.png", "label": 0})
    with refused(DataError, "example.image", why) as caught:
        read_file(path)
    assert "line 2" in str(caught.value)


@pytest.mark.parametrize("image", [5, None, ["a.png"], {"bytes": "x"}])
def test_a_line_whose_image_is_no_path_is_no_example(tmp_path: Path, image: object) -> None:
    path = examples_file(tmp_path, {"image": image, "label": 0})
    with refused(DataError, "example"):
        parse_examples(read_file(path), path, 2)


def test_pictures_count_towards_the_size_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(stripes(1, 5))
    path = examples_file(tmp_path, *[{"image": "a.png", "label": 0}] * 30)
    monkeypatch.setattr("client.training.examples.MAX_FILE", path.stat().st_size + 2000)
    with refused(DataError, "examples", "with its files"):
        read_file(path)


def test_a_text_that_poses_as_a_picture_has_a_limit(tmp_path: Path) -> None:
    path = examples_file(tmp_path, {"text": "data:image/png;base64," + "A" * MAX_MEDIUM, "label": 0})
    with refused(DataError, "example.text", f"longer than {MAX_MEDIUM}"):
        parse_examples(read_file(path), path, 2)


def test_hygiene_leaves_files_and_sets_aside_equal_ones() -> None:
    (one, _), (other, _) = stripe_pictures(2, 1), sounds.tones(2, 1)
    rows = [{"text": text, "label": label} for text, label in (one, other, one)]
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    assert clean(raw, None, 0).aside == {3: "duplicate"}
