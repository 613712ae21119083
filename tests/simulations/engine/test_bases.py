"""The base of a run: pruned, centered, rounded, or in a bundle with a training graph; made once for all devices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from aggregation.errors import ConfigError
from client.node.statedir import DeviceStateDir
from client.training import graphengine, torchengine
from edgeadapt.bases.base import Base
from edgeadapt.formats.bundle import BASE_MANIFEST, LOWER, TRAINING, VerifiedBase
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.storage import CACHE
from edgeadapt.methods import classifier
from simulations.data.population import LabelledText, Population
from simulations.engine import provision
from simulations.engine.provision import (
    CENTERED,
    Enrolment,
    bundle_of,
    device_base,
    peft_config,
    training_base,
)
from simulations.scenario import Scenario
from tests.support import refused
from tests.support.exhaustive import few
from tests.support.tokenizers import unigram


def with_engine(scenario: Scenario, engine: str = "onnx", **export: Any) -> Scenario:
    base = scenario.base.model_copy(update={"engine": engine})
    return scenario.model_copy(update={"base": base, "export": scenario.export.model_copy(update=export)})


def test_torch_trains_on_the_base_itself(fleet_of: Any, tmp_path: Path) -> None:
    fleet = fleet_of(3)
    assert device_base(tmp_path, fleet.scenario, fleet.base, fleet.population) is fleet.base


@pytest.mark.usefixtures("one_thread")
def test_a_bundle_is_made_once_and_named_to_the_devices(fleet_of: Any) -> None:
    fleet = fleet_of(4)
    scenario = with_engine(fleet.scenario)
    base = device_base(fleet.out, scenario, fleet.base, fleet.population)
    assert isinstance(base, VerifiedBase)
    assert base.digest == fleet.base.digest
    assert TRAINING in base.manifest.files
    written = (bundle_of(fleet.out) / BASE_MANIFEST).stat().st_mtime_ns
    device_base(fleet.out, scenario, fleet.base, fleet.population)
    assert (bundle_of(fleet.out) / BASE_MANIFEST).stat().st_mtime_ns == written
    assert Enrolment.of(fleet.out, scenario, fleet.population, fleet.base).settings.base == str(bundle_of(fleet.out))


def test_a_method_that_needs_torch_is_refused_before_the_rounds(fleet_of: Any, tmp_path: Path, tiny_base: Base) -> None:
    fleet = fleet_of(3, adapter={"bias": "lora_only"})
    with refused(ConfigError, "task.peft_config"):
        device_base(tmp_path, with_engine(fleet.scenario), fleet.base, fleet.population)


@pytest.mark.parametrize("method", few(["dora", "beft", "ia3", "ln_tuning", "loha", "bottleneck"], "beft"))
def test_a_bundle_has_the_slots_of_the_method(fleet_of: Any, tmp_path: Path, method: str) -> None:
    layers = 0 if method in ("ia3", "ln_tuning") else 1
    fleet = fleet_of(3, adapter={"method": method, "rank": 4, "layers": layers})
    base = device_base(tmp_path, with_engine(fleet.scenario), fleet.base, fleet.population)
    config, labels = peft_config(fleet.scenario, fleet.base), len(fleet.population.labels)
    ours, theirs = graphengine.classifier(base, labels, config), torchengine.classifier(fleet.base, labels, config)
    assert ours.layout == theirs.layout
    assert (LOWER in base.manifest.files) == bool(layers)


Given = Callable[..., Scenario]
WORDS = ["turn", "no", "toon", "run", "nut"]  # of letters that ``unigram`` knows


@pytest.fixture
def population(fleet_of: Any) -> Population:
    found: Population = fleet_of(4).population
    return found


@pytest.fixture
def given(tmp_path: Path, make_base: Callable[..., Base], monkeypatch: pytest.MonkeyPatch) -> Given:
    """A scenario on a tiny base with a Unigram vocabulary, whose pruned copies are in a cache of the test's own."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr("simulations.engine.provision.frequent_words", lambda languages, _: [*languages, *WORDS])
    tokenizer = unigram()
    tokenizer.add_special_tokens(
        ["<mask>"]
    )  # as many tokens as hidden units would hide which tensor has a row for each
    base = make_base(tmp_path / "tiny", tokenizer=tokenizer)

    def scenario(*, export: dict[str, Any] | None = None, **settings: Any) -> Scenario:
        return Scenario.parse(
            {"base": {"model": str(base.folder), **settings}, "adapter": {"rank": 2}, "export": export or {}}, "tiny"
        )

    return scenario


def mean(base: Base, texts: tuple[LabelledText, ...]) -> float:
    """The length of the mean over the texts of each one's mean over its tokens, which is what centering removes."""
    model = classifier.build(base, 2, PeftConfig.lora(2, 4, ("query", "value")))
    ids = [torch.tensor(e.ids) for e in classifier.tokenizer(base, model).encode_batch([text.text for text in texts])]
    tokens, mask = classifier.padded(ids)
    with torch.inference_mode():
        return float(classifier.pooled(model.get_base_model().encoder, tokens, mask).mean(0).norm())


def vocabulary(base: Base) -> set[str]:
    return set(Tokenizer.from_file(str(base.folder / "tokenizer.json")).get_vocab())


def test_a_base_is_centered_on_the_public_phrases_and_in_the_folder_of_the_run(
    given: Given, population: Population, tmp_path: Path
) -> None:
    plain = training_base(tmp_path / "plain", given(), population)
    base = training_base(tmp_path / "run", given(center=True), population)
    assert base.folder == tmp_path / "run" / CENTERED
    assert mean(plain, population.public) > 0.1
    assert mean(base, population.public) < 1e-3 * mean(plain, population.public)
    said = population.clients[0].test
    assert mean(base, said) > 0.01  # not the texts of the devices


def test_a_pruned_base_is_kept_for_the_next_run_with_its_languages(
    given: Given, population: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = training_base(tmp_path / "whole", given(), population)
    base = training_base(tmp_path / "run", given(languages=["no"]), population)
    assert base.folder.is_relative_to(tmp_path / "cache")
    assert vocabulary(base) < vocabulary(whole)
    assert "▁turn" in vocabulary(base)
    other = training_base(tmp_path / "run", given(languages=["no", "run"]), population)
    assert other.folder != base.folder
    monkeypatch.setattr("simulations.engine.provision.prune", None)  # a second pruning would fail
    assert training_base(tmp_path / "again", given(languages=["no"]), population) == base


def test_a_base_is_pruned_then_centered_and_made_once(
    given: Given, population: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, chosen = tmp_path / "run", given(languages=["no"], center=True)
    base = training_base(run, chosen, population)
    assert base.folder == run / CENTERED
    pruned = training_base(tmp_path / "pruned", given(languages=["no"]), population)
    assert vocabulary(base) == vocabulary(pruned)
    assert mean(base, population.public) < 0.2 * mean(pruned, population.public)
    for name in ("prune", "centered"):
        monkeypatch.setattr(f"simulations.engine.provision.{name}", None)
    assert training_base(run, chosen, population) == base


def test_devices_find_the_base_that_the_run_has_made(given: Given, population: Population, tmp_path: Path) -> None:
    chosen = given(center=True)
    base = training_base(tmp_path / "run", chosen, population)
    provision.provision(tmp_path / "fleet", chosen, population, base)
    provision.Enrolment.of(tmp_path / "fleet", chosen, population, base).enrol(
        client.name for client in population.clients
    )
    folders = (provision.device_folder(tmp_path / "fleet", client.name) for client in population.clients)
    assert {DeviceStateDir.open(folder).settings.base for folder in folders} == {str(base.folder)}
    registry = provision.registry(tmp_path / "fleet")
    assert registry.version(0).manifest.base_digest == base.digest
    head = next(value for name, value in registry.tensors(0).items() if name.endswith("classifier.weight"))
    assert np.linalg.norm(head.mean(0)) < np.linalg.norm(head, axis=1).mean()  # prototypes in all directions


@pytest.mark.parametrize(
    ("settings", "about"), [({"languages": ["en"]}, "tokenizer.json"), ({"model": "nowhere"}, "base")]
)
def test_a_base_that_cannot_be_made_is_refused(
    given: Given, population: Population, tiny_base: Base, tmp_path: Path, settings: dict[str, Any], about: str
) -> None:
    with refused(ConfigError, about):  # the tiny base's vocabulary is no Unigram's
        training_base(tmp_path / "run", given(**({"model": str(tiny_base.folder)} | settings)), population)
    assert not (tmp_path / "run").exists()
    assert not any((tmp_path / "cache").glob("pruned-*"))
