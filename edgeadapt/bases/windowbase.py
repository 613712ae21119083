"""Random convolutions as a base folder: draws their weights. ``windowencoder.py`` says what they compute."""

from pathlib import Path

import numpy as np

from aggregation.errors import ConfigError
from edgeadapt.bases.ggufbase import write_base
from edgeadapt.bases.sounds import MAX_CHANNELS, MAX_LENGTH, MAX_RATE, SoundReader
from edgeadapt.formats.layout import Tensors

KIND = "random_convolutions"
KERNELS, TAPS = 80, 9
HIGH = 3  # taps of each channel that have the weight 2: the others have -1, so that all add up to 0
DILATIONS = (1, 3, 9)


def width(channels: int) -> int:
    return 2 * (len(DILATIONS) * KERNELS + channels)


def draw(channels: int, seed: int) -> Tensors:
    """Draw the weights of kernels of length 1, and offsets between -1 and 1. Guarantee: they depend on the arguments
    alone, on every machine, as no sum is rounded."""
    rng = np.random.default_rng(seed)
    high = rng.random((KERNELS, TAPS, channels)).argsort(1) < HIGH
    length = np.sqrt(channels * (4 * HIGH + TAPS - HIGH))
    return {
        "layer.1.dense.weight": (np.where(high, 2.0, -1.0) / length).reshape(KERNELS, -1).astype(np.float32),
        "layer.1.dense.bias": (2 * rng.random(KERNELS) - 1).astype(np.float32),
        "layer.1.shift.bias": np.zeros(width(channels), np.float32),
    }


def write(folder: Path, rate: int, length: int, channels: int, seed: int = 0) -> None:
    """Write the base of such windows into the empty ``folder``. Raises ConfigError: a size is out of range."""
    reader = SoundReader(rate, length, channels)
    try:
        reader.check()
    except ValueError:
        reason = f"windows have 1 to {MAX_LENGTH} samples of 1 to {MAX_CHANNELS} channels at 1 to {MAX_RATE} Hz"
        raise ConfigError(f"{reason}: name such a base", about="base") from None
    stated = {"architectures": ["RandomConvolutions"], "model_type": KIND, "channels": channels, "seed": seed}
    write_base(folder, draw(channels, seed), reader, config=stated | {"dtype": "float32"})
