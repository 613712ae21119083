"""The export after the last round: base and global adapter, their parity with torch, and a bundle for every device. The
coordinator's bundle holds the base and the global adapter; its public key is in the same folder. A device's bundle adds
the device's own private adapter, which the device signs itself and never sends to the coordinator."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from aggregation.pki.identity import IdentityKey
from client.node import statedir as device_files
from client.training.engine import classifier_trainer
from client.training.personal import HEADS
from client.training.torchengine import model_of
from coordinator import statedir as coordinator_files
from edgeadapt.bases.base import Base
from edgeadapt.bases.readers import media_of
from edgeadapt.bases.sounds import is_window, samples_of
from edgeadapt.formats import files, storage
from edgeadapt.formats.bundle import PHRASES
from edgeadapt.formats.calibration import Labels, confidences, expected_calibration_error, fit
from edgeadapt.formats.layout import Floats
from edgeadapt.formats.phrases import encode_phrases
from edgeadapt.methods import classifier
from edgeadapt.methods.peft.inputs import AdapterInputs
from edgeadapt.methods.peft.methods import from_peft_tensors
from export.bundle.base import resolved, wanted
from export.bundle.sources import Origin, from_registry
from export.bundle.write import add_adapter, copy_bundle, device_inputs, source_of, write_bundle
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from export.onnx.slotted import with_mean_head
from export.parity import compare
from export.parity.compare import FEWEST, Limits, OnnxRunner, Parity, limits_of
from simulations.data.households import plain_phrases
from simulations.data.population import Client, LabelledText, Population
from simulations.engine import provision
from simulations.report.pages import template
from simulations.result import ExportResult, Lesson, Reliability
from simulations.scenario import Scenario

BUNDLE = "bundle"
GLOBAL = "global"
PERSONAL = "personal"
Answers: TypeAlias = tuple[Floats, Labels, Floats]  # arguments of ``reliability``
MISSED = 1.0  # logits between the answer and the right one, in a phrase to teach
CONFUSED, MOST_PAIRS, MOST_EXAMPLES = "confused.html", 12, 8
NINETY = (0.85, 0.95)  # what a device calls 90 %


@dataclass(frozen=True, slots=True)
class _Exported:
    bundle: Path
    parity: Parity  # on the test phrases of all clients
    labels: tuple[str, ...]
    answers: dict[str, Answers]  # of the global and the personal adapters, to the test phrases of all clients
    plain: dict[str, dict[str, int]]  # client → right and count; without those whose language has no plain phrases
    lesson: Lesson | None
    tests: list[str]  # phrases, in the order of the answers


def export_all(fleets: Sequence[tuple[Path, Population]], scenario: Scenario, base: Base, report: str) -> ExportResult:
    """Export, check parity, and write the bundles of each federation: its folder, and its clients that are evaluated.
    ``report`` is its future place. Raises ParityError: an exported pair answers too differently from torch; no bundle
    of it was written."""
    exported = [_publish(out, scenario, population, base) for out, population in fleets]
    parities, (first, *_) = [each.parity for each in exported], exported
    weights = [parity.count for parity in parities]

    own = kind.example if (kind := media_of(base.folder)) else "a text of your own"

    def mean(name: str) -> float:
        return float(np.average([getattr(parity, name) or 0.0 for parity in parities], weights=weights))

    def reliability_of(arm: str) -> Reliability:
        logits, labels, temperatures = zip(*(each.answers[arm] for each in exported), strict=True)
        return reliability(np.concatenate(logits), np.concatenate(labels), np.concatenate(temperatures))

    return ExportResult(
        bundle=str(first.bundle),
        phrase=own if scenario.data.given else "turn on the kitchen lights",
        report=report,
        lesson=None if scenario.data.given else next(filter(None, (each.lesson for each in exported)), None),
        parity={
            "agreement": mean("agreement"),
            "max_abs_diff": max(parity.max_abs_diff for parity in parities),
            "count": sum(weights),
            "accuracy": mean("accuracy"),
            "torch_accuracy": mean("torch_accuracy"),
        },
        reliability={arm: reliability_of(arm) for arm in first.answers},
        plain={name: answers for each in exported for name, answers in each.plain.items()},
        answered=_answered(exported),
        by_word=scenario.data.by_word,
        confused=_confused(exported, Path(report).with_name(CONFUSED)) if kind else "",
    )


def _publish(out: Path, scenario: Scenario, population: Population, base: Base) -> _Exported:
    source = from_registry(out / provision.COORDINATOR, None, None)
    origin = resolved(source, base)
    model = model_of(classifier_trainer(base, len(population.labels), source.peft_config))
    profile, slots = Profile(scenario.export.profile), wanted(base, origin).slots
    exported = export_classifier(with_mean_head(base, slots), base, profile, training=None)
    # A device rehearses the release's public texts when it learns.
    if pairs := [(population.labels[one.label], one.text) for one in provision.released_texts(population)]:
        exported = exported.with_file(PHRASES, encode_phrases(pairs))
    runner = OnnxRunner.open(exported.folder, exported.manifest)
    classifier.load(model, provision.registry(out).tensors(origin.version))
    tests = [example for client in population.clients for example in client.test]
    inputs, texts, labels = device_inputs(origin, exported.manifest, "int8"), _texts(tests), _labels(tests)
    parity = compare.compare(model, runner, inputs, texts, labels=labels.tolist())
    least = scenario.export.minimum_agreement
    limits = limits_of(scenario.export.profile, "text-classification") if least == "profile" else Limits(least)
    compare.gate(parity, limits, privacy=origin.privacy)
    logits = runner.classify(texts, inputs)
    key = IdentityKey.from_pem((out / provision.COORDINATOR / coordinator_files.KEY).read_bytes())
    write_bundle(out / BUNDLE, exported, [source_of(GLOBAL, origin)], key=key)
    storage.replace(out / device_files.TRUST, key.public.to_pem(), storage.PUBLIC)
    clients = population.clients
    own = {client.name: _personal(out, client, source, base) for client in clients}
    judged = scenario.personal.method not in HEADS
    personal = [_write_device_bundle(out, one, exported, origin, own[one.name], runner, judged) for one in clients]
    lessons = (_lesson(out, one, rows, origin.labels) for one, (rows, _) in zip(clients, personal, strict=True))
    return _Exported(
        provision.device_folder(out, population.clients[0].name) / BUNDLE,
        parity,
        population.labels,
        {
            GLOBAL: (logits, labels, np.ones(len(labels), np.float32)),
            PERSONAL: (
                np.concatenate([answers for answers, _ in personal if len(answers)]),
                labels,
                np.concatenate([np.full(len(answers), temperature) for answers, temperature in personal]),
            ),
        },
        {
            client.name: answers
            for client in population.clients
            if (answers := _plain_answers(client, own[client.name], exported, runner))
        },
        next(filter(None, lessons), None),
        texts,
    )


def _answered(exported: Sequence[_Exported]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for each in exported:
        logits, right, _ = each.answers[PERSONAL]
        for label, answer in zip(right, logits.argmax(1), strict=True):
            counts.setdefault(each.labels[label], Counter())[each.labels[answer]] += 1
    return {label: dict(sorted(of.items())) for label, of in sorted(counts.items())}


def _confused(exported: Sequence[_Exported], path: Path) -> str:
    """Write the pictures or sounds that are most often confused in a private file. Returns its path, if any."""
    missed: dict[tuple[str, str], list[str]] = {}
    for each in exported:
        logits, right, _ = each.answers[PERSONAL]
        for label, answer, text in zip(right, logits.argmax(1), each.tests, strict=True):
            if label != answer:
                missed.setdefault((each.labels[label], each.labels[answer]), []).append(text)
    pairs = sorted(missed.items(), key=lambda one: (-len(one[1]), one[0]))[:MOST_PAIRS]
    shown = [(*pair, len(texts), texts[:MOST_EXAMPLES]) for pair, texts in pairs]
    if not shown:
        return ""
    storage.replace(path, template("confused.html").render(pairs=shown, axes_of=_axes).encode())
    return str(path)


def _axes(text: str) -> list[str]:
    """Return the points of a line for each axis of a window of sensors, 240 wide and 96 high; none for another file."""
    if not is_window(text):
        return []
    samples = samples_of(text)
    places, most = np.linspace(0, 240, len(samples)), max(1, np.abs(samples).max())
    return [
        " ".join(f"{x:.1f},{48 - 46 * y / most:.1f}" for x, y in zip(places, axis, strict=True)) for axis in samples.T
    ]


def reliability(logits: Floats, labels: Labels, temperatures: Floats) -> Reliability:
    """Check whether stated probabilities are the share of right answers. ``logits`` have the shape ``(answers,
    labels)``, with at least one answer; each has a right label and a temperature."""
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
    """Return a personal adapter's temperature, from the answers to its client's validation phrases.

    ``logits`` have the shape ``(answers, labels)``. ``shared``, the global adapter's temperature, holds where there are
    fewer than ``FEWEST`` phrases: fitted to a dozen, a temperature does more harm than good
    (docs/decisions/0027-calibrated-probabilities.md)."""
    return fit(logits, labels, shared) if len(labels) >= FEWEST else shared


def _texts(examples: Sequence[LabelledText]) -> list[str]:
    return [example.text for example in examples]


def _labels(examples: Sequence[LabelledText]) -> Labels:
    return np.array([example.label for example in examples], np.int64)


def _personal(out: Path, client: Client, origin: Origin, base: Base) -> Origin:
    blob = (provision.device_folder(out, client.name) / device_files.PERSONAL).read_bytes()
    tensors = from_peft_tensors(files.decode(blob), origin.peft_config, {})
    return resolved(replace(origin, tensors=tensors, sha256=files.sha256(blob)), base)


def _plain_answers(client: Client, own: Origin, exported: ExportedBase, runner: OnnxRunner) -> dict[str, int]:
    """Count its language's plain phrases that a client's own adapter answers right, as exported; empty without any."""
    plain = plain_phrases().get(client.language, {})
    phrases = {intent: text for intent, text in plain.items() if intent in own.labels}
    if not phrases:
        return {}
    best = runner.classify([*phrases.values()], device_inputs(own, exported.manifest, "int8")).argmax(axis=1)
    right = sum(own.labels[answer] == intent for answer, intent in zip(best, phrases, strict=True))
    return {"right": right, "count": len(phrases)}


def _lesson(out: Path, client: Client, logits: Floats, labels: Sequence[str]) -> Lesson | None:
    """Return a test phrase that the client's bundle gets wrong, neither barely nor hopelessly; None without one."""
    rows = zip(client.test, logits, strict=True)
    missed = [(abs(row.max() - row[one.label] - MISSED), one) for one, row in rows if row.argmax() != one.label]
    if not missed:
        return None
    _, chosen = min(missed, key=lambda pair: pair[0])
    bundle = provision.device_folder(out, client.name) / BUNDLE
    return Lesson(str(bundle), chosen.text, labels[chosen.label])


def _write_device_bundle(
    out: Path, client: Client, exported: ExportedBase, common: Origin, own: Origin, runner: OnnxRunner, judged: bool
) -> tuple[Floats, float]:
    """Copy the coordinator's bundle into a device's state directory, and add the device's own adapter to it. Returns
    the logits of the device's own adapter for its test phrases, and the adapter's temperature: the global one, unless
    the validation phrases are ``judged`` by an adapter that was not fitted to them."""
    folder = provision.device_folder(out, client.name)
    copy_bundle(out / BUNDLE, folder / BUNDLE)
    identity = IdentityKey.from_pem((folder / device_files.IDENTITY).read_bytes())
    inputs = device_inputs(own, exported.manifest, "int8")
    temperature = 1.0
    if judged:
        held_out = runner.classify(_texts(client.validation), inputs)
        temperature = personal_temperature(held_out, _labels(client.validation), temperature)
    private = source_of(PERSONAL, own, parent=common.sha256, temperature=temperature)
    add_adapter(folder / BUNDLE, AdapterInputs.of_tensors(own.peft_config, own.tensors), private, key=identity)
    return runner.classify(_texts(client.test), inputs), temperature
