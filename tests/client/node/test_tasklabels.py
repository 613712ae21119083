"""The labels of a task are those of the device's bundle, or of the tasks before: the coordinator chooses neither."""

from dataclasses import replace
from pathlib import Path

import pytest
from peft import PeftModel

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, ProtocolError, TrustError
from aggregation.pki.identity import IdentityKey
from client.inference.trust import Trust
from client.node import tasklabels
from client.node.statedir import LABELS as FILE
from client.node.statedir import DeviceSettings, DeviceStateDir
from client.node.tasklabels import TaskLabels, on_plan, signed_labels
from edgeadapt.bases.base import Base
from edgeadapt.formats.peftconfig import PeftConfig
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from tests.support import models, refused
from tests.support.bundles import resign
from tests.support.models import LABELS, draw, slotted_of

globals().update(models.FIXTURES)
CONFIG = PeftConfig.lora(rank=4, alpha=8)
OTHER = ("Lights on", "x1", "x2", "x3")


class Folder:
    """A base in a plain folder."""

    digest = "a" * 64


@pytest.fixture(scope="module")
def exported(model: PeftModel, tiny_base: Base) -> ExportedBase:
    return export_classifier(slotted_of(model), tiny_base, Profile.FP32, training=True)


@pytest.fixture
def bundle(tmp_path: Path, exported: ExportedBase, model: PeftModel, vendor: IdentityKey) -> Path:
    """One with a global and a private adapter."""
    source = AdapterSource("global", draw(model, 0), LABELS, 1, "c" * 64, None, CONFIG)
    private = replace(source, name="mine", parent="d" * 64, labels=tuple(reversed(LABELS)))
    write_bundle(tmp_path / "bundle", exported, [source, private], key=vendor, form="fp32")
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    return tmp_path / "bundle"


def test_labels_are_those_of_the_signed_bundle_in_their_order(bundle: Path, vendor: IdentityKey) -> None:
    base = Trust.open(bundle).bundle.base()
    assert signed_labels(base) == (LABELS,)  # not those of the private adapter
    made = on_plan(None, base, LABELS)
    assert made == TaskLabels.of(base.digest, LABELS)
    for labels, number in (
        (OTHER, 0),
        ((LABELS[0], *OTHER[1:]), 1),
        ((LABELS[0],), 1),
        ((*LABELS, "more"), len(LABELS)),
        (tuple(reversed(LABELS)), 0),
        ((), 0),
    ):
        with refused(ProtocolError, "task.labels", value=number) as caught:
            on_plan(made, base, labels)
        assert (labels[number] if number < len(labels) else "missing") in str(caught.value)
        assert (LABELS[number] if number < len(LABELS) else "missing") in str(caught.value)
    resign(bundle, vendor, labels=OTHER)  # a release with other labels
    assert on_plan(made, base, OTHER).labels == OTHER


def test_a_bundle_that_nobody_signed_gives_no_labels(bundle: Path) -> None:
    base = Trust.open(bundle).bundle.base()
    resign(bundle, IdentityKey.generate(SystemEntropy()), labels=OTHER)
    with refused(TrustError, "keyid"):
        on_plan(None, base, OTHER)


def test_in_a_plain_folder_labels_are_those_of_the_first_task() -> None:
    known = on_plan(None, Folder(), LABELS)  # type: ignore[arg-type]
    assert on_plan(known, Folder(), LABELS) == known  # type: ignore[arg-type]
    for labels in (LABELS[:2], (*LABELS, "more"), OTHER):
        with refused(ProtocolError, "task.labels"):
            on_plan(known, Folder(), labels)  # type: ignore[arg-type]
    another = replace(known, base="b" * 64)  # a coordinator that migrates cannot choose them either
    with refused(ProtocolError, "task.labels"):
        on_plan(another, Folder(), OTHER)  # type: ignore[arg-type]
    assert on_plan(another, Folder(), LABELS) == known  # type: ignore[arg-type]


def test_labels_outlast_a_restart_until_the_device_forgets(tmp_path: Path) -> None:
    entropy = SystemEntropy()
    made = DeviceStateDir.create(tmp_path, DeviceSettings(base="x"), IdentityKey.generate(entropy), {}, entropy)
    assert made.load(TaskLabels) is None
    known = TaskLabels.of("a" * 64, (*LABELS, "Überschrift"))
    made.save(known)
    assert DeviceStateDir.open(tmp_path).load(TaskLabels) == known
    assert known.labels == (*LABELS, "Überschrift")
    (tmp_path / FILE).write_bytes(b"\x00")
    with refused(TrustError, FILE):
        made.load(TaskLabels)
    made.forget()
    assert made.load(TaskLabels) is None
    assert tasklabels.TASK_LABELS.decode(tasklabels.TASK_LABELS.encode(known)) == known


def test_a_bundle_whose_base_reads_no_single_words_is_not_for_that_task(bundle: Path) -> None:
    assert DeviceStateDir(bundle.parent, DeviceSettings(base=str(bundle))).base().digest
    with refused(ConfigError, "task", "--mark"):
        DeviceStateDir(bundle.parent, DeviceSettings(base=str(bundle), task="words")).base()
