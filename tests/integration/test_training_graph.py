"""A federation whose devices train with the graph of a bundle: no torch, and the adapters that torch makes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.entropy import SystemEntropy
from aggregation.errors import EdgeAdaptError
from aggregation.pki.identity import IdentityKey
from client.training.engine import language_trainer
from client.training.examples import Split, in_split, read_examples
from client.training.trainer import LanguageTrainer
from edgeadapt.bases.base import Base
from edgeadapt.formats.bundle import VerifiedBase
from edgeadapt.formats.layout import Tensors
from export.bundle.write import write_bundle
from export.causal import export_causal
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from export.onnx.slotted import with_mean_head
from export.onnx.targets import SlotKind, Slots
from simulations.engine import provision
from tests.support import refused
from tests.support.authors import AUTHORS, fleet_of_authors, train_with_bundle
from tests.support.models import llama, make_lm, vendor

__all__ = ["llama", "make_lm", "vendor"]  # fixtures

SGD = {
    "training__optimizer": "sgd",
    "training__learning_rate": 0.1,
    "training__momentum": 0.9,
    "training__schedule": "linear",
    "training__gradient_norm": 1.0,
}
Exported = Callable[[Profile], ExportedBase]


@pytest.fixture(scope="module")
def exported(tiny_base: Base) -> Exported:
    kinds = frozenset({SlotKind.LOW_RANK, SlotKind.SCALE, SlotKind.OFFSET})
    slotted = with_mean_head(tiny_base, Slots(("query", "value"), kinds))
    made = {p: export_classifier(slotted, tiny_base, p, training=True) for p in (Profile.FP32, Profile.NATIVE_INT8)}
    return made.__getitem__


def give_bundles(fleet: Any, exported: ExportedBase) -> None:
    """Let every device of a fleet train with one bundle instead of the base."""
    key, folder = IdentityKey.generate(SystemEntropy()), fleet.out / "shared"
    write_bundle(folder / "bundle", exported, [], key=key)
    (folder / "trust.pem").write_bytes(key.public.to_pem())
    for state_dir in fleet.nodes.values():
        train_with_bundle(Path(state_dir), folder / "bundle")


def last(fleet: Any) -> Any:
    registry = fleet.registry()
    return registry.tensors(max(record.version for record in fleet.registry().rounds()))


@pytest.mark.parametrize(
    ("changes", "solved"),
    [
        ({}, False),
        ({"adapter": {"method": "dora"}}, False),
        (SGD, False),
        ({"method": "fedsb"}, False),
        ({"rounds": 1, "analytic__rounds": 1}, True),
    ],
    ids=["LoRA", "DoRA", "SGD", "Fed-SB", "analytic head"],
)
def test_devices_without_torch_make_the_versions_that_torch_makes(
    app_fleet_of: Any, exported: Exported, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], solved: bool
) -> None:
    def absent(*_: object, **__: object) -> None:
        raise AssertionError("torch trained")

    found = []
    for with_bundle in (False, True):
        fleet = app_fleet_of(6, seed=3, **{"rounds": 2, "aggregation__ring_bits": 32, **changes})
        if with_bundle:
            give_bundles(fleet, exported(Profile.FP32))
            monkeypatch.setattr("client.training.torchengine.TorchEngine.__init__", absent)
        records = fleet.federate(fleet.grid())
        assert {len(record.survivors) for record in records} == {6}
        found.append((fleet.registry().tensors(0), last(fleet)))
    (start, expected), (_, tensors) = found
    # Rounding coins are drawn anew in each federation, and AdamW makes whole steps of what they do to tiny gradients.
    # The limit is less than how far away no training would be. A head that is solved anew may hardly move, so what
    # coins do to it is compared with its size.
    moved = distance(expected, start)
    assert moved > 1e-3
    size = sum(float(np.linalg.norm(expected[name])) for name in start if name.endswith("classifier.weight"))
    limit = 0.01 * size if solved else 0.8 * moved
    assert distance(expected, tensors) < limit


def distance(one: Tensors, other: Tensors) -> float:
    return float(np.sqrt(sum(float(np.square(one[name] - other[name]).sum()) for name in one)))


def test_devices_with_a_bundle_that_nobody_they_trust_signed_refuse_to_train(
    app_fleet_of: Any, exported: Exported
) -> None:
    fleet = app_fleet_of(6, rounds=1)
    give_bundles(fleet, exported(Profile.NATIVE_INT8))
    other = IdentityKey.generate(SystemEntropy())
    (fleet.out / "shared" / "trust.pem").write_bytes(other.public.to_pem())
    with refused(EdgeAdaptError, "session"):
        fleet.federate(fleet.grid())
    assert not fleet.registry().rounds()


WITHOUT_TORCH = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"accelerate", "gguf", "onnx", "peft", "torch", "transformers"}:
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
import client.node.app
from client.node.statedir import DeviceStateDir
from edgeadapt.formats.peftconfig import PeftConfig
from client.training.engine import classifier_trainer
from pathlib import Path

base = DeviceStateDir.open(Path(sys.argv[1])).base()
print(classifier_trainer(base, 3, PeftConfig.lora(2, 4)).layout.size, base.digest)
"""


def test_a_devices_app_opens_its_bundle_without_torch(app_fleet_of: Any, exported: Exported) -> None:
    fleet = app_fleet_of(2)
    give_bundles(fleet, exported(Profile.NATIVE_INT8))
    command = [sys.executable, "-c", WITHOUT_TORCH, next(iter(fleet.nodes.values()))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == fleet.base.digest


def test_devices_with_a_bundle_train_a_language_model_with_its_training_graph(
    tmp_path: Path, llama: Base, one_thread: None, monkeypatch: pytest.MonkeyPatch, vendor: IdentityKey
) -> None:
    fleet = fleet_of_authors(tmp_path / "fleet", llama, {"rank": 4})
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
