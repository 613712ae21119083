"""Version 0: what devices can train is published, anything else is refused before it is signed."""

from typing import Any

import numpy as np
import pytest

from aggregation.errors import ConfigError, DataError
from coordinator.seed import seed_version
from edgeadapt.formats import files
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from tests.support import refused

LABELS = ("on", "off", "dim")
CONFIG = PeftConfig("LORA", 2, 4, ("query",))
PATH = "base_model.model.encoder.layer.0.query"


def tensors(rows: int = 3, head: str = "classifier", path: str = PATH) -> Tensors:
    rng = np.random.default_rng(0)
    shapes = {
        f"{path}.lora_A.weight": (2, 5),
        f"{path}.lora_B.weight": (5, 2),
        f"base_model.model.{head}.weight": (rows, 5),
        f"base_model.model.{head}.bias": (rows,),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_the_manifest_describes_the_file_and_the_base() -> None:
    manifest, blob = seed_version(tensors(), CONFIG, LABELS, "b" * 64)
    assert (manifest.version, manifest.round, manifest.parent, manifest.survivors) == (0, 0, None, ())
    assert (manifest.sha256, manifest.size) == (files.sha256(blob), len(blob))
    assert (manifest.base_digest, manifest.labels, manifest.peft_config) == ("b" * 64, LABELS, CONFIG)
    assert manifest.layout_digest == Layout.of(files.decode(blob)).digest
    assert all(np.array_equal(files.decode(blob)[name], value) for name, value in tensors().items())


@pytest.mark.parametrize(
    "labels",
    [("on", "off"), ("on", "off", "dim", "blink"), ("on", "off", "on"), ()],
    ids=["few", "many", "twice", "none"],
)
def test_labels_that_are_not_the_heads_are_refused(labels: tuple[str, ...]) -> None:
    with refused(ConfigError, "labels"):
        seed_version(tensors(), CONFIG, labels, "b" * 64)


def test_an_adapter_that_devices_cannot_train_is_refused() -> None:
    headless = {name: value for name, value in tensors().items() if "classifier" not in name}
    unbiased = {name: value for name, value in tensors().items() if not name.endswith("bias")}
    for found in (tensors(head="score"), headless, unbiased, tensors(path="base_model.model.layer.0.query")):
        with refused(ConfigError, "classifier"):
            seed_version(found, CONFIG, LABELS, "b" * 64)


def test_the_version_of_another_method_has_the_names_of_peft() -> None:
    layer = PATH.replace("query", "output.dense")
    found = {name: value for name, value in tensors().items() if "lora" not in name}
    found |= {f"{PATH}.ia3_l": np.ones((5, 1), np.float32), f"{layer}.ia3_l": np.ones((1, 5), np.float32)}
    config = PeftConfig("IA3", 0, 0, ("query", "output.dense"), feedforward_modules=("output.dense",))
    manifest, blob = seed_version(found, config, LABELS, "b" * 64)
    assert files.decode(blob).keys() == found.keys()
    assert manifest.peft_config == config
    elsewhere = {name.replace(".encoder.", "."): value for name, value in found.items()}
    with refused(ConfigError, "classifier"):
        seed_version(elsewhere, config, LABELS, "b" * 64)


def adalora(*ranks: int) -> Tensors:
    """An adapter of AdaLoRA whose layers have these ranks."""
    found = {name: value for name, value in tensors().items() if "lora" not in name}
    for layer, rank in enumerate(ranks):
        path = PATH.replace("layer.0", f"layer.{layer}")
        shapes = {"A": (rank, 5), "B": (5, rank), "E": (rank, 1)}
        found |= {f"{path}.lora_{part}": np.ones(shape, np.float32) for part, shape in shapes.items()}
    return found


def test_adalora_is_published_with_its_first_rank_in_each_layer() -> None:
    config = PeftConfig("ADALORA", 3, 4, ("query",))
    manifest, blob = seed_version(adalora(3, 3), config, LABELS, "b" * 64)
    assert manifest.peft_config == config
    assert files.decode(blob).keys() == adalora(3, 3).keys()
    with refused(DataError, "encoder.layer.1.query", value=2):
        seed_version(adalora(3, 2), config, LABELS, "b" * 64)


def test_virtual_tokens_are_for_a_language_model() -> None:
    config = PeftConfig("PROMPT_TUNING", 0, 0, (), num_virtual_tokens=2)
    found = {"prompt_embeddings": np.ones((2, 5), np.float32)}
    assert seed_version(found, config, (), "b" * 64)[0].labels == ()
    with refused(ConfigError, "classifier"):
        seed_version(found, config, LABELS, "b" * 64)


@pytest.mark.parametrize("changes", [{"rank_pattern": (("query", 3),)}, {"lora_alpha": 0.5}], ids=str)
def test_an_adapter_that_devices_could_build_in_several_ways_is_refused(changes: dict[str, Any]) -> None:
    plain: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ("query",)}
    with pytest.raises(ConfigError):
        seed_version(tensors(), PeftConfig(**{**plain, **changes}), LABELS, "b" * 64)
