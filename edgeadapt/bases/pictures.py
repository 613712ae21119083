"""Pictures as texts: small PNG or JPEG files, whose tokens are their pixels."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from aggregation.errors import ConfigError, DataError
from edgeadapt.bases.media import MAX_SOURCE, MediaReader, as_text, drawn_bits, library

KINDS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 50_000_000  # of a file that becomes a picture
SIDE = 256  # pixels of the longer side of a picture; a larger file is reduced
LOSSLESS = 64 * 64  # pixels up to which it is PNG
QUALITY = 90  # of JPEG
MAX_SEEN = 1024  # pixels of a side that a model sees
PIXEL_MEAN, PIXEL_STD = "pixel_mean", "pixel_std"  # keys of config.json, of pixels from 0 to 255, one for each colour


def picture(content: bytes) -> str:
    """Make a picture of the content of a file: upright, at most ``SIDE`` pixels long, without what else the file says,
    such as the place where it was taken. Raises as ``MediaReader.of_file``."""
    if len(content) > MAX_SOURCE:
        raise DataError(f"the picture has {len(content)} bytes, above the limit of {MAX_SOURCE}", about="picture")
    with _opened(content, MAX_PIXELS) as image:
        image.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded at a fraction of its size
        upright = _pillow("ImageOps").exif_transpose(image)
        small = upright.convert("L" if upright.mode in ("1", "L") else "RGB")
    small.thumbnail((SIDE, SIDE))
    kind = "PNG" if small.width * small.height <= LOSSLESS else "JPEG"
    file = io.BytesIO()
    small.save(file, kind, **({"optimize": True} if kind == "PNG" else {"quality": QUALITY}))
    return as_text(PictureReader.begin, kind.lower(), file.getvalue())


@dataclass(frozen=True, slots=True)
class PictureReader(MediaReader):
    """Reads the middle of pictures. Tokens are from 0 to 255, row by row, the colours of a pixel beside each other."""

    kind: ClassVar[str] = "Pixels"
    noun: ClassVar[str] = "picture"
    begin: ClassVar[str] = "data:image/"
    files: ClassVar[str] = "PNG, JPEG or WebP"
    example: ClassVar[str] = "PICTURE.png"
    of_file = staticmethod(picture)

    height: int
    width: int
    channels: int

    def check(self) -> None:
        if not (1 <= self.height <= MAX_SEEN and 1 <= self.width <= MAX_SEEN and self.channels in (1, 3)):
            raise ValueError

    @property
    def size(self) -> int:
        return self.height * self.width * self.channels

    def drawn(self) -> NDArray[np.int64]:
        return np.random.default_rng(0).integers(0, 256, self.size)

    def decode(self, content: bytes) -> NDArray[np.int64]:
        with _opened(content, MAX_SEEN**2) as image:
            seen = image.convert("L" if self.channels == 1 else "RGB")
        if seen.size != (self.width, self.height):
            seen = self._fitted(seen)
        return np.asarray(seen, np.int64).reshape(-1)

    def varied(self, tokens: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        """Move a picture by up to a tenth of each side, its edge repeated, and make it lighter or darker by up to a
        fifth. Left and right stay, by which letters and shoes differ."""
        down, across, light = drawn_bits(seed, range(3))
        image = tokens.reshape(self.height, self.width, self.channels)
        rows, columns = _moved(self.height, down), _moved(self.width, across)
        seen: NDArray[np.int64] = np.minimum(image[rows][:, columns] * (205 + light % 103) >> 8, 255)
        return seen.reshape(-1)

    def _fitted(self, image: Any) -> Any:
        """Resize the middle of an image in two steps, across and down: the page does the same, to the same numbers."""
        how, (width, height), ratio = _pillow("Image").Resampling.BILINEAR, image.size, self.width / self.height
        across, down = (ratio * height, height) if width / height >= ratio else (width, width / ratio)
        left, top = (width - across) / 2, (height - down) / 2
        narrow = image.resize((self.width, height), how, box=(left, 0, left + across, height))
        return narrow.resize((self.width, self.height), how, box=(0, top, self.width, top + down))


def _moved(size: int, bits: int) -> NDArray[np.int64]:
    far = size // 10
    return np.clip(np.arange(size) + bits % (2 * far + 1) - far, 0, size - 1)


def _pillow(module: str) -> Any:
    return library(f"PIL.{module}", PictureReader.noun)


@contextmanager
def _opened(content: bytes, most: int) -> Iterator[Any]:
    """Open an image of at most ``most`` pixels. Raises DataError, also for what fails while it is decoded within."""
    module = _pillow("Image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with module.open(io.BytesIO(content), formats=KINDS) as image:
                if image.width * image.height > most:
                    raise DataError(
                        f"the picture has {image.width} x {image.height} pixels: reduce it", about="picture"
                    )
                yield image
    except (DataError, ConfigError):
        raise
    except module.DecompressionBombError:
        raise DataError("the picture has too many pixels: reduce it", about="picture") from None
    except Exception:  # of many classes; a message may have bytes of the picture
        raise DataError("the picture is damaged, or neither PNG, JPEG nor WebP", about="picture") from None
