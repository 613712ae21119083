"""The tiny bases and bundles of ``tests.support.models``."""

from pathlib import Path
from typing import Any

import pytest

from edgeadapt.auditing.transcripts import log_name
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from tests.support import models
from tests.support.fleet import entropy
from tests.support.models import slotted_of
from tests.support.sessions import LoggedSession, logged

__all__ = ["entropy", "logged"]

globals().update(models.FIXTURES)


@pytest.fixture(scope="session")
def trainable(model: Any, tiny_base: Any) -> ExportedBase:
    return export_classifier(slotted_of(model), tiny_base, Profile.FP32, training=True)


@pytest.fixture
def audited(tmp_path: Path, logged: LoggedSession) -> Path:
    """The folder of a run whose coordinator kept a log."""
    transcripts = tmp_path / "runs" / "demo" / "coordinator" / "transcript"
    transcripts.mkdir(parents=True)
    (transcripts / log_name(1)).write_bytes(logged.raw)
    (transcripts / "authority.pem").write_bytes(logged.fleet.authority.root.to_pem())
    (transcripts / "coordinator.pem").write_bytes(logged.fleet.key.public.to_pem())
    return tmp_path / "runs" / "demo"
