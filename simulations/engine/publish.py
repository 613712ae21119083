"""The export after the last round: base and global adapter, their parity with torch, and a bundle for every device.

The coordinator's bundle holds the base and the global adapter; its public key is in the same folder. A device's bundle
holds the same base with the global adapter and the device's own private adapter. The device signs its private adapter
itself and never sends it to the coordinator.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters import classifier, files, storage
from adapters.base import Base
from adapters.calibration import Labels, confidences, expected_calibration_error, fit
from adapters.layout import Floats, Tensors
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
from export.parity.temperature import FEWEST
from simulations.data.households import plain_phrases
from simulations.data.population import Client, LabelledText, Population
from simulations.engine import provision
from simulations.report.result import Reliability
from simulations.scenario import Scenario

BUNDLE = "bundle"
GLOBAL = "global"
PERSONAL = "personal"
NINETY = (0.85, 0.95)  # what a device calls 90 %


@dataclass(frozen=True, slots=True)
class PlainAnswers:
    """How many of its language's plain phrases a client's own adapter answers right, as exported."""

    right: int
    count: int


@dataclass(frozen=True, slots=True)
class ExportOutcome:
    """The first client's bundle, and how the exported pair of base and global adapter answers."""

    bundle: Path
    parity: Parity  # on the test phrases of all clients
    reliability: dict[str, Reliability]  # of the global and the personal adapters, on the test phrases of all clients
    plain: dict[str, PlainAnswers]  # by client; without those of a language that has no plain phrases


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
    runner = OnnxRunner.open(exported.folder, exported.manifest)
    classifier.load(model, tensors)
    tests = [example for client in population.clients for example in client.test]
    inputs, texts, labels = _on_device(tensors, exported), _texts(tests), _labels(tests)
    found = compare.compare(model, runner, inputs, texts, labels=labels.tolist())
    compare.gate(found, _limits(scenario))
    logits = runner.classify(texts, inputs)
    key = IdentityKey.from_pem((out / provision.COORDINATOR / coordinator_files.KEY).read_bytes())
    manifest = version.manifest
    source = AdapterSource(
        GLOBAL, tensors, population.labels, manifest.version, manifest.sha256, peft_config=manifest.peft_config
    )
    write_bundle(out / BUNDLE, exported, [source], key=key)
    storage.replace(out / device_files.TRUST, key.public.to_pem(), storage.PUBLIC)
    personal = [_write_device_bundle(out, client, exported, source, runner) for client in population.clients]
    return ExportOutcome(
        provision.device_folder(out, population.clients[0].name) / BUNDLE,
        found,
        {
            GLOBAL: reliability(logits, labels, np.full(len(labels), source.temperature)),
            PERSONAL: reliability(
                np.concatenate([answers for answers, _ in personal if len(answers)]),
                labels,
                np.concatenate([np.full(len(answers), temperature) for answers, temperature in personal]),
            ),
        },
        {
            client.name: answers
            for client in population.clients
            if (answers := _plain_answers(out, client, population.labels, exported, runner))
        },
    )


def reliability(logits: Floats, labels: Labels, temperatures: Floats) -> Reliability:
    """Whether stated probabilities are the share of right answers.

    Args:
        logits: Shape ``(answers, labels)``; at least one answer.
        labels: The right ones, shape ``(answers,)``.
        temperatures: Of each answer's adapter, shape ``(answers,)``.
    """
    calibrated = logits / temperatures.astype(logits.dtype)[:, None]
    stated, right = confidences(calibrated), calibrated.argmax(axis=1) == labels
    near = (stated >= NINETY[0]) & (stated < NINETY[1])
    return Reliability(
        before=expected_calibration_error(logits, labels),
        after=expected_calibration_error(calibrated, labels),
        near_ninety=int(near.sum()),
        right_near_ninety=float(right[near].mean()) if near.any() else float("nan"),
    )


def personal_temperature(logits: Floats, labels: Labels, shared: float) -> float:
    """A personal adapter's temperature, from the answers to its client's validation phrases.

    Args:
        logits: Shape ``(answers, labels)``.
        labels: The right ones, shape ``(answers,)``.
        shared: The global adapter's temperature, which holds where there are fewer than ``FEWEST`` phrases: fitted to
            a dozen, a temperature does more harm than good (docs/decisions/0027-calibrated-probabilities.md).
    """
    return fit(logits, labels, shared) if len(labels) >= FEWEST else shared


def _texts(examples: Sequence[LabelledText]) -> list[str]:
    return [example.text for example in examples]


def _labels(examples: Sequence[LabelledText]) -> Labels:
    return np.array([example.label for example in examples], np.int64)


def _limits(scenario: Scenario) -> Limits:
    """The scenario's own limit, or those of its profile."""
    minimum = scenario.export.minimum_agreement
    return limits_of(scenario.export.profile, "text-classification") if minimum == "profile" else Limits(minimum)


def _on_device(tensors: Tensors, exported: ExportedBase) -> Tensors:
    """The adapter as a device reads it back from its int8 file."""
    return adapter.decode(adapter.encode(tensors, exported.adapter_inputs), "int8")


def _plain_answers(
    out: Path, client: Client, labels: Sequence[str], exported: ExportedBase, runner: OnnxRunner
) -> PlainAnswers | None:
    phrases = {intent: text for intent, text in plain_phrases().get(client.language, {}).items() if intent in labels}
    if not phrases:
        return None
    own = files.decode((provision.device_folder(out, client.name) / device_files.PERSONAL).read_bytes())
    best = runner.classify([*phrases.values()], _on_device(own, exported)).argmax(axis=1)
    right = sum(labels[answer] == intent for answer, intent in zip(best, phrases, strict=True))
    return PlainAnswers(right, len(phrases))


def _write_device_bundle(
    out: Path, client: Client, exported: ExportedBase, common: AdapterSource, runner: OnnxRunner
) -> tuple[Floats, float]:
    """Copy the coordinator's bundle into a device's state directory, and add the device's own adapter to it.

    Returns:
        The logits of the device's own adapter for its test phrases, and the adapter's temperature.
    """
    folder = provision.device_folder(out, client.name)
    copy_bundle(out / BUNDLE, folder / BUNDLE)
    blob = (folder / device_files.PERSONAL).read_bytes()
    identity = IdentityKey.from_pem((folder / device_files.IDENTITY).read_bytes())
    tensors = files.decode(blob)
    inputs = _on_device(tensors, exported)
    held_out = runner.classify(_texts(client.validation), inputs)
    temperature = personal_temperature(held_out, _labels(client.validation), common.temperature)
    private = AdapterSource(
        PERSONAL,
        tensors,
        common.labels,
        common.version,
        files.sha256(blob),
        common.sha256,
        common.peft_config,
        temperature,
    )
    add_adapter(folder / BUNDLE, exported.adapter_inputs, private, key=identity)
    return runner.classify(_texts(client.test), inputs), temperature
