"""A language model federated through the real apps: rounds lower the loss of every author, and an audit agrees."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch

from adapters import causal
from aggregation.pki.identity import IdentityKey
from client.inference.generate import Generator, SamplingParams
from client.node.statedir import SETTINGS
from client.training.examples import Split, in_split, read_examples
from client.training.language import load_language_trainer
from client.training.languagegraph import LanguageGraphTrainer
from coordinator.audit import AuditInput, AuditOptions, Status
from export.bundle.write import write_bundle
from export.causal import export_causal
from export.onnx.exported import Profile
from simulations.data.population import Client, LabelledText, Population
from simulations.engine import provision
from simulations.engine.grid import SERVER_NODE
from simulations.scenario import Scenario
from tests.conftest import TinyFleet
from tests.support.models import llama, make_lm, vendor

__all__ = ["llama", "make_lm", "vendor"]  # fixtures

ROOT = Path(__file__).resolve().parents[2]
AUTHORS = {"device-00": "abab ab", "device-01": "aab aab", "device-02": "ab abb", "device-03": "abba ab"}


def texts(words: str, count: int) -> tuple[LabelledText, ...]:
    return tuple(LabelledText(f"{words} " * (2 + number % 3), -1, "g") for number in range(count))


def fleet_of_authors(out: Path, base: Any, adapter: dict[str, Any]) -> TinyFleet:
    """A device for each author, and a coordinator whose first version is of this ``[adapter]``."""
    clients = tuple(Client(name, "", False, texts(said, 6), texts(said, 2), ()) for name, said in AUTHORS.items())
    population = Population((), (), clients)
    settings = {"name": "authors", "base": {"model": str(base.folder)}, "adapter": adapter}
    scenario = Scenario.parse(settings, "test")
    made = TinyFleet(out, scenario, population, base)
    provision.provision(made.out, scenario, population, base)
    provision.Enrolment.of(made.out, scenario, population, base).enrol(client.name for client in population.clients)
    made.configure({"rounds": 3, "training.learning_rate": 0.02, "training.epochs": 4})
    made.configure({"aggregation.keep_masked_inputs": True})
    folders = [str(provision.device_folder(made.out, name)) for name in AUTHORS]
    made.nodes = dict(enumerate(folders, SERVER_NODE + 1))
    return made


def train_with_bundle(folder: Path, bundle: Path) -> None:
    """Let a device train with the training graph of a bundle, in place of its base in torch."""
    settings = folder / SETTINGS
    settings.write_text(tomli_w.dumps(tomllib.loads(settings.read_text()) | {"base": str(bundle)}))


@pytest.fixture
def fleet(tmp_path: Path, llama: Any, one_thread: None) -> TinyFleet:
    return fleet_of_authors(tmp_path / "fleet", llama, {"rank": 4})


def test_a_language_model_is_federated_end_to_end(fleet: TinyFleet) -> None:
    records = fleet.federate(fleet.grid())
    assert [record.version for record in records] == [1, 2, 3]
    registry, trainer = (
        fleet.registry(),
        load_language_trainer(fleet.base, provision.peft_config(fleet.scenario, fleet.base)),
    )
    for name in AUTHORS:
        held_out = in_split(read_examples(fleet.state_dir(name).examples, 0), Split.VALIDATION)
        before, after = (trainer.score(registry.tensors(version), held_out) for version in (0, 3))
        assert after.loss < 0.8 * before.loss, name
    manifest = registry.latest().manifest
    assert manifest.labels == ()
    assert np.isfinite(next(iter(registry.tensors(3).values()))).all()
    reports = AuditInput.open(fleet.out / "coordinator", AuditOptions()).audit(unfinished=False)
    assert {finding.status for report in reports.values() for finding in report.findings} <= {Status.PASS}


def test_devices_with_a_bundle_train_a_language_model_with_its_training_graph(
    fleet: TinyFleet, monkeypatch: pytest.MonkeyPatch, vendor: IdentityKey
) -> None:
    bundle, graph = fleet.out / "shared" / "bundle", list[Path]()
    exported = export_causal(fleet.base, ("q_proj", "v_proj"), Profile.NATIVE_INT8, training=True)
    write_bundle(bundle, exported, [], key=vendor)
    (bundle.parent / "trust.pem").write_bytes(vendor.public.to_pem())
    light = ("device-01", "device-03")
    for name in light:
        train_with_bundle(provision.device_folder(fleet.out, name), bundle)
    train = LanguageGraphTrainer.train

    def counted(self: LanguageGraphTrainer, *rest: Any, **named: Any) -> Any:
        graph.append(self.base.folder)
        return train(self, *rest, **named)

    monkeypatch.setattr(LanguageGraphTrainer, "train", counted)
    fleet.configure({"rounds": 1})
    (record,) = fleet.federate(fleet.grid())
    assert len(record.survivors) == len(AUTHORS)
    assert graph == [bundle / "base"] * len(light)
    trainer = load_language_trainer(fleet.base, provision.peft_config(fleet.scenario, fleet.base))
    for name in light:
        held_out = in_split(read_examples(fleet.state_dir(name).examples, 0), Split.VALIDATION)
        before, after = (trainer.score(fleet.registry().tensors(version), held_out) for version in (0, 1))
        assert after.loss < before.loss, name


@pytest.mark.slow
def test_its_last_version_is_exported_and_writes_as_its_authors_do(fleet: TinyFleet, tmp_path: Path) -> None:
    """Through the commands: from the registry to a bundle, and from that to an answer."""
    fleet.federate(fleet.grid())
    key, bundle, base = str(tmp_path / "vendor.pem"), str(tmp_path / "bundle"), str(fleet.base.folder)
    command("export", "key", key)
    command("export", "base", "--base", base, "--profile", "fp32", "--out", bundle, "--key", key)
    registry = str(fleet.out / "coordinator")
    command("export", "adapter", "--registry", registry, "--format", "fp32", "--bundle", bundle, "--key", key)
    trainer = load_language_trainer(fleet.base, provision.peft_config(fleet.scenario, fleet.base))
    causal.load(trainer.model, fleet.registry().tensors(3))
    asked = torch.tensor([trainer.encoder.tokenizer.encode("abab").ids])
    expected = trainer.model.generate(input_ids=asked, max_new_tokens=12, do_sample=False)[0, asked.shape[1] :]
    generator = Generator.open(Path(bundle), tmp_path / "vendor.pub.pem", threads=1)
    found = "".join(generator.complete("abab", SamplingParams(max_tokens=12), "global"))
    assert found == trainer.encoder.tokenizer.decode(expected.tolist(), skip_special_tokens=True)


def command(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgeadapt", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
