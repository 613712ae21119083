"""The temperature of an adapter, fitted on what devices run: the exported base with the adapter as its file stores it.

Quantization moves probabilities, so a temperature of the model in torch would be that of another classifier.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from aggregation.errors import DataError
from edgeadapt.formats.calibration import Calibration, calibrate
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.phrases import read_phrases
from export.parity.compare import OnnxRunner

FEWEST = 50  # phrases; fewer leave the calibration error itself uncertain


def read_examples(path: Path, labels: Sequence[str]) -> list[tuple[str, int]]:
    """Read the phrases in a file of ``edgeadapt.formats.phrases``, each with the number of its label among ``labels``.

    Raises ConfigError, DataError: as ``read_phrases``; or there are fewer than ``FEWEST`` phrases, or the head has no
    row for a label.
    """
    pairs, numbers = read_phrases(path), {label: number for number, label in enumerate(labels)}
    if unknown := sorted({label for label, _ in pairs} - set(numbers)):
        reason = f"the adapter has no label {unknown[0][:40]!r}, which {path} has; it has: {', '.join(labels)[:120]}"
        raise DataError(reason, about="label", value=unknown)
    if len(pairs) < FEWEST:
        reason = f"{path} has {len(pairs)} phrases, and a temperature needs {FEWEST} that were not trained on; add some"
        raise DataError(reason, about="--calibrate", value=len(pairs))
    return [(phrase, numbers[label]) for label, phrase in pairs]


def measure(
    runner: OnnxRunner,
    inputs: Tensors,
    examples: Sequence[tuple[str, int]],
    step: Callable[[], object] = lambda: None,
) -> Calibration:
    """Fit a temperature, and measure what it does to phrases that it was not fitted on.

    Raises DataError: an answer is not finite, or a label has no row in the head.
    """
    logits = runner.classify([phrase for phrase, _ in examples], inputs, step)
    labels = np.array([label for _, label in examples], np.int64)
    if (rows := logits.shape[1]) <= labels.max():
        reason = f"the adapter's head has {rows} rows, too few for its labels; name each row, in order (--labels)"
        raise DataError(reason, about="labels", value=rows)
    if not np.isfinite(logits).all():
        raise DataError("an answer is NaN or infinite; the adapter or the exported base is broken", about="logits")
    return calibrate(logits, labels)
