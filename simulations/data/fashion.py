"""Fashion-MNIST (Xiao et al. 2017), as Debian's package ``dataset-fashion-mnist`` ships it: 70,000 pictures of clothes.

The files are IDX: four bytes that name the type and the dimensions, a big-endian size for each, then the numbers.
"""

import gzip
import io
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aggregation.errors import ConfigError, DataError

FOLDER = Path("/usr/share/datasets/fashion-mnist")
LABELS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def rows() -> Iterator[dict[str, str | bytes]]:
    """Yield the 10,000 pictures of the test files, for ``data.function``. Raises ConfigError: there are none."""
    for pixels, label in zip(*read("t10k"), strict=True):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        yield {"image": file.getvalue(), "label": LABELS[label]}


def read(part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read the pictures, shape ``(count, 28, 28)``, and the number of each one's label, of ``train`` or ``t10k``."""
    return _idx(FOLDER / f"{part}-images-idx3-ubyte.gz", 3), _idx(FOLDER / f"{part}-labels-idx1-ubyte.gz", 1)


def _idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    if not path.is_file():
        reason = f"there is no {path}: install Debian's package dataset-fashion-mnist"
        raise ConfigError(reason, about="data.function")
    raw = gzip.decompress(path.read_bytes())
    begin = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", raw[4:begin].ljust(begin - 4))
    if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) != begin + math.prod(shape):
        raise DataError(f"{path} is damaged: install it again", about="data.function")
    return np.frombuffer(raw, np.uint8, offset=begin).reshape(shape)
