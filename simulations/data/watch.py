"""Exercises that ten people did with a smart watch (Burns et al. 2018, "Shoulder physiotherapy exercise recognition"),
as the package ``seglearn`` ships them: for each person, arm and exercise a recording of six axes at 50 Hz. They are a
pickle, which its own loader reads if the digest is known. The first windows of a recording are for training, the last
ones for tests, and no two overlap."""

from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np

from aggregation.errors import ConfigError, DataError
from edgeadapt.bases.sounds import LOUDEST, signal
from edgeadapt.formats.storage import file_sha256

PACKAGE, FILE = "seglearn", "seglearn/data/watch_dataset.npy"
SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
RATE, LENGTH = 50, 200  # samples of a window: 4 seconds, one or two repetitions
# What 16 bits hold of acceleration and rotation; the package states no units, and g and radians a second fit.
RANGE = np.array([8.0] * 3 + [35.0] * 3)
TRAIN, VALIDATION = 2, 1  # windows of a recording; all others are tests


def rows() -> Iterator[dict[str, str]]:
    """Yield the windows, for ``data.function``. Raises ConfigError: no package is installed; DataError: another is."""
    try:
        file = Path(str(distribution(PACKAGE).locate_file(FILE)))
    except PackageNotFoundError:
        raise ConfigError(f"a package is missing: pip install {PACKAGE}", about="data.function") from None
    if file_sha256(file) != SHA256:
        raise DataError(f"{file} is not the known one: install seglearn 1.2.5", about="data.function")
    return windows(import_module("seglearn.datasets").load_watch())


def windows(data: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the rows of recordings, as ``load_watch`` returns them."""
    for moved, label, person in zip(data["X"], data["y"], data["subject"], strict=True):
        whole = np.rint(np.clip(moved / RANGE, -1, 1) * LOUDEST).astype(np.int64)
        for number, begin in enumerate(range(0, len(whole) - LENGTH + 1, LENGTH)):
            split = "train" if number < TRAIN else "validation" if number < TRAIN + VALIDATION else "test"
            text = signal(whole[begin : begin + LENGTH], RATE)
            name = data["y_labels"][label].lower()
            yield {"client": f"wearer-{person:02}", "text": text, "label": name, "split": split}
