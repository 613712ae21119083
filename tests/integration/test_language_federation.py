"""A language model federated through the real apps: rounds lower the loss of every author, and an audit agrees."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aggregation.pki.identity import IdentityKey
from client.inference.generate import Generator, SamplingParams
from client.training.engine import language_trainer
from client.training.examples import Split, in_split, read_examples
from client.training.trainer import LanguageTrainer
from edgeadapt.auditing import AuditInput, AuditOptions, Check, Status
from edgeadapt.formats.bundle import VerifiedBase
from edgeadapt.methods import causal
from export.bundle.write import write_bundle
from export.causal import export_causal
from export.onnx.exported import Profile
from simulations.engine import provision
from tests.conftest import TinyFleet
from tests.support.authors import AUTHORS, fleet_of_authors, train_with_bundle
from tests.support.models import llama, make_lm, vendor

__all__ = ["llama", "make_lm", "vendor"]  # fixtures

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fleet(tmp_path: Path, llama: Any, one_thread: None) -> TinyFleet:
    return fleet_of_authors(tmp_path / "fleet", llama, {"rank": 4})


def test_a_language_model_is_federated_end_to_end(fleet: TinyFleet) -> None:
    records = fleet.federate(fleet.grid())
    assert [record.version for record in records] == [1, 2, 3]
    registry, trainer = (
        fleet.registry(),
        language_trainer(fleet.base, provision.peft_config(fleet.scenario, fleet.base)),
    )
    for name in AUTHORS:
        held_out = in_split(read_examples(fleet.state_dir(name).examples, 0), Split.VALIDATION)
        before, after = (trainer.score(registry.tensors(version), held_out) for version in (0, 3))
        assert after.loss < 0.8 * before.loss, name
    manifest = registry.latest().manifest
    assert manifest.labels == ()
    assert np.isfinite(next(iter(registry.tensors(3).values()))).all()
    reports = AuditInput.open(fleet.out / "coordinator", AuditOptions()).audit(unfinished=False)
    findings = [finding for report in reports.values() for finding in report.findings]
    assert {each.status for each in findings if each.check is not Check.WEAKNESSES} == {Status.PASS}
    assert {each.about for each in findings if each.check is Check.WEAKNESSES} == {"offer.cohort"}


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
    train = LanguageTrainer.train

    def counted(self: LanguageTrainer, *rest: Any, **named: Any) -> Any:
        if isinstance(self.base, VerifiedBase):
            graph.append(self.base.folder)
        return train(self, *rest, **named)

    monkeypatch.setattr(LanguageTrainer, "train", counted)
    fleet.configure({"rounds": 1})
    (record,) = fleet.federate(fleet.grid())
    assert len(record.survivors) == len(AUTHORS)
    assert graph == [bundle / "base"] * len(light)
    trainer = language_trainer(fleet.base, provision.peft_config(fleet.scenario, fleet.base))
    for name in light:
        held_out = in_split(read_examples(fleet.state_dir(name).examples, 0), Split.VALIDATION)
        before, after = (trainer.score(fleet.registry().tensors(version), held_out) for version in (0, 1))
        assert after.loss < before.loss, name


@pytest.mark.slow
def test_its_last_version_is_exported_and_writes_as_its_authors_do(fleet: TinyFleet, tmp_path: Path) -> None:
    """Through the commands: from the registry to a bundle, and from that to an answer."""
    fleet.federate(fleet.grid())
    key, bundle, base = str(tmp_path / "vendor.pem"), str(tmp_path / "bundle"), str(fleet.base.folder)
    command("bundle", "key", key)
    command("bundle", "make", "--base", base, "--profile", "fp32", "--bundle", bundle, "--key", key)
    registry = str(fleet.out / "coordinator")
    command("bundle", "add", "--registry", registry, "--format", "fp32", "--bundle", bundle, "--key", key)
    trainer = language_trainer(fleet.base, provision.peft_config(fleet.scenario, fleet.base))
    causal.load(trainer.engine.model, fleet.registry().tensors(3))
    asked = torch.tensor([trainer.encoder.tokenizer.encode("abab").ids])
    expected = trainer.engine.model.generate(input_ids=asked, max_new_tokens=12, do_sample=False)[0, asked.shape[1] :]
    generator = Generator.open(Path(bundle), tmp_path / "vendor.pub.pem", threads=1)
    found = "".join(generator.complete("abab", SamplingParams(max_tokens=12), "global"))
    assert found == trainer.encoder.tokenizer.decode(expected.tolist(), skip_special_tokens=True)


def command(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgeadapt", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
