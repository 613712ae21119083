"""The tiny bases and bundles of ``tests.support.models``."""

from typing import Any

import pytest

from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from tests.support import models

globals().update(models.FIXTURES)


@pytest.fixture(scope="session")
def trainable(model: Any, tiny_base: Any) -> ExportedBase:
    return export_classifier(model, tiny_base, Profile.FP32, training=True)
