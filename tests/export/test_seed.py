"""The first adapter: a PEFT folder whose classifier answers by the nearest phrases."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel

from aggregation.errors import ConfigError, DataError
from edgeadapt.bases.pretrained import load
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.phrases import read_phrases
from edgeadapt.methods import classifier
from edgeadapt.methods.classifier import PhraseClassifier
from edgeadapt.methods.peft.folder import LABELS, read_peft
from export.seed import write_seed
from tests.support import refused

PHRASES = [
    ("Light", "turn on the light"),
    ("Music", "play music"),
    ("Light", "switch the lamp on"),
    ("Timer", "set a timer"),
]


@pytest.fixture
def seed(tiny_base: Any, tmp_path: Path) -> Path:
    assert write_seed(tiny_base, PHRASES, PeftConfig.lora(2, 4), 7, tmp_path / "seed") == ("Light", "Music", "Timer")
    return tmp_path / "seed"


def test_the_folder_holds_configuration_tensors_and_labels(seed: Path) -> None:
    assert sorted(path.name for path in seed.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "labels.txt",
    ]
    assert (seed / LABELS).read_text() == "Light\nMusic\nTimer\n"
    found = read_peft(seed)
    assert found.peft_config == PeftConfig.lora(2, 4)
    updates = [value for name, value in found.tensors.items() if ".lora_B." in name]
    assert updates
    assert not any(value.any() for value in updates)


def test_plain_peft_opens_the_folder_and_answers_by_the_nearest_phrases(seed: Path, tiny_base: Any) -> None:
    from transformers import AutoModel

    encoder = load(tiny_base, AutoModel)
    model = PeftModel.from_pretrained(PhraseClassifier(encoder, 3), str(seed)).eval()
    tokens = classifier.tokenizer(tiny_base, model)
    texts = [phrase for _, phrase in PHRASES]
    weight = read_peft(seed).tensors["base_model.model.classifier.weight"]
    logits = classifier.embed(model, tokens, texts) @ weight.T
    assert logits.argmax(1).tolist() == [0, 1, 0, 2]
    assert np.allclose(np.linalg.norm(weight, axis=1), classifier.HEAD_SCALE, rtol=1e-5)


def test_equal_seeds_give_equal_tensors(tiny_base: Any, tmp_path: Path) -> None:
    for number, name in ((7, "a"), (7, "b"), (8, "c")):
        write_seed(tiny_base, PHRASES, PeftConfig.lora(2, 4), number, tmp_path / name)
    one, same, other = (read_peft(tmp_path / name).sha256 for name in "abc")
    assert one == same != other


def test_a_folder_that_holds_something_is_left_alone(seed: Path, tiny_base: Any) -> None:
    before = {path.name: path.read_bytes() for path in seed.iterdir()}
    with refused(ConfigError, "seed"):
        write_seed(tiny_base, PHRASES, PeftConfig.lora(2, 4), 8, seed)
    assert {path.name: path.read_bytes() for path in seed.iterdir()} == before


def test_a_seed_that_cannot_be_made_leaves_nothing(tiny_base: Any, tmp_path: Path) -> None:
    for phrases, lora in ((PHRASES[:1], PeftConfig.lora(2, 4)), (PHRASES, PeftConfig.lora(2, 4, ("nothing",)))):
        with pytest.raises(ConfigError):
            write_seed(tiny_base, phrases, lora, 7, tmp_path / "seed")
    assert list(tmp_path.iterdir()) == []


def test_phrases_are_read_as_pairs(tmp_path: Path) -> None:
    path = tmp_path / "phrases.tsv"
    path.write_text("Light\tturn on the light\n\n Music \t play music \nLight\ta\tb\n")
    assert read_phrases(path) == [("Light", "turn on the light"), ("Music", "play music"), ("Light", "a\tb")]


@pytest.mark.parametrize("line", ["no tab", "\tno label", "no phrase\t"])
def test_a_line_without_a_pair_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "phrases.tsv"
    path.write_text(f"Light\tlights on\n{line}\n")
    with refused(DataError, "phrases.tsv", value=2):
        read_phrases(path)
