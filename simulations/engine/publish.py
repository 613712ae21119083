"""The export after the last round: base and global adapter, their parity with torch, and a bundle for every device.

The coordinator's bundle holds the base and the global adapter; its public key is in the same folder. A device's bundle
holds the same base with the global adapter and the device's own private adapter. The device signs its private adapter
itself and never sends it to the coordinator.
"""

from dataclasses import dataclass
from pathlib import Path

from adapters import classifier, files
from adapters.base import Base
from adapters.layout import Tensors
from adapters.storage import PUBLIC, replace
from aggregation.pki.identity import IdentityKey
from client.node import statedir as device_files
from client.training.trainer import load_trainer
from coordinator import statedir as coordinator_files
from export.bundle import adapter
from export.bundle.write import AdapterSource, add_adapter, copy_bundle, write_bundle
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from export.parity import compare
from export.parity.compare import Limits, OnnxRunner, Parity, limits_of
from simulations.data.population import Population
from simulations.engine import provision
from simulations.scenario import Scenario

BUNDLE = "bundle"
GLOBAL = "global"
PERSONAL = "personal"


@dataclass(frozen=True, slots=True)
class ExportOutcome:
    """The first client's bundle, and how the exported pair of base and global adapter answers."""

    bundle: Path
    parity: Parity
    accuracy: float  # share of the test phrases of all clients that the exported pair answers right


def publish(out: Path, scenario: Scenario, population: Population, base: Base) -> ExportOutcome:
    """Export, check parity, and write the bundles.

    Raises:
        ParityError: The answers of the exported pair differ too much from those of torch; no bundle was written.
    """
    registry = provision.registry(out)
    version = registry.latest() or registry.version(0)
    tensors = registry.tensors(version.manifest.version)
    model = load_trainer(base, len(population.labels), provision.lora(scenario)).model
    exported = export_classifier(model, base, Profile(scenario.export.profile))
    runner = OnnxRunner.open(exported.files, exported.manifest)
    classifier.load(model, tensors)
    tests = [example for client in population.clients for example in client.test]
    inputs, texts = _on_device(tensors, exported), [example.text for example in tests]
    found = compare.compare(model, runner, inputs, texts)
    compare.gate(found, _limits(scenario))
    right = runner.probabilities(texts, inputs).argmax(axis=1) == [example.label for example in tests]
    key = IdentityKey.from_pem((out / provision.COORDINATOR / coordinator_files.KEY).read_bytes())
    manifest = version.manifest
    source = AdapterSource(
        GLOBAL, tensors, population.labels, manifest.version, manifest.sha256, peft_config=manifest.peft_config
    )
    write_bundle(out / BUNDLE, exported, [source], key=key)
    replace(out / device_files.TRUST, key.public.to_pem(), PUBLIC)
    for client in population.clients:
        _write_device_bundle(out, client.name, exported, source)
    return ExportOutcome(provision.device_folder(out, population.clients[0].name) / BUNDLE, found, float(right.mean()))


def _limits(scenario: Scenario) -> Limits:
    """The scenario's own limit, or those of its profile."""
    minimum = scenario.export.minimum_agreement
    return limits_of(scenario.export.profile, "text-classification") if minimum == "profile" else Limits(minimum)


def _on_device(tensors: Tensors, exported: ExportedBase) -> Tensors:
    """The adapter as a device reads it back from its int8 file."""
    return adapter.decode(adapter.encode(tensors, exported.adapter_inputs), "int8")


def _write_device_bundle(out: Path, client: str, exported: ExportedBase, common: AdapterSource) -> None:
    """Copy the coordinator's bundle into a device's state directory, and add the device's own adapter to it."""
    folder = provision.device_folder(out, client)
    copy_bundle(out / BUNDLE, folder / BUNDLE)
    blob = (folder / device_files.PERSONAL).read_bytes()
    identity = IdentityKey.from_pem((folder / device_files.IDENTITY).read_bytes())
    private = AdapterSource(
        PERSONAL,
        files.decode(blob),
        common.labels,
        common.version,
        files.sha256(blob),
        common.sha256,
        common.peft_config,
    )
    add_adapter(folder / BUNDLE, exported.adapter_inputs, private, key=identity)
