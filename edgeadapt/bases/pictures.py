"""Pictures as texts: a data URI of a small PNG or JPEG file, whose tokens are its pixels.

So everything that holds, counts, seals or sends a text does it with a picture. A base of pictures has a
``tokenizer.json`` of the kind ``Pixels``, which states what its model sees; ``open_reader`` opens it or any other.
"""

import base64
import binascii
import io
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from aggregation.errors import ConfigError, DataError
from edgeadapt.formats.bundle import TOKENIZER
from edgeadapt.formats.storage import read

KINDS = ("PNG", "JPEG", "WEBP")
URI = "data:image/"
MAX_PICTURE = 2**18  # characters of a picture
MAX_SOURCE = 2**25  # bytes of a file that becomes a picture
MAX_PIXELS = 50_000_000  # of it
SIDE = 256  # pixels of the longer side of a picture; a larger file is reduced
LOSSLESS = 64 * 64  # pixels up to which it is PNG
QUALITY = 90  # of JPEG
MAX_SEEN = 1024  # pixels of a side that a model sees
PIXELS = "Pixels"  # kind of tokenizer.json
PIXEL_MEAN, PIXEL_STD = "pixel_mean", "pixel_std"  # keys of config.json, of pixels from 0 to 255, one for each colour
BEGIN = 100  # bytes of tokenizer.json that state its kind
FEWEST = 768  # numbers of a picture that take about the memory of one token of a text


def is_picture(text: str) -> bool:
    return text.startswith(URI)


def picture(content: bytes) -> str:
    """Make a picture of the content of a file: upright, at most ``SIDE`` pixels long, without what else the file says,
    such as the place where it was taken.

    Raises DataError: it is too large, damaged, or neither PNG, JPEG nor WebP; ConfigError as ``_pillow``.
    """
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
    return f"{URI}{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


@dataclass(frozen=True, slots=True)
class Pixels:
    """The pixels of a picture, as an encoding of the tokenizers library has tokens: from 0 to 255, row by row, the
    colours of a pixel beside each other."""

    ids: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PictureReader:
    """Reads pictures as a ``Tokenizer`` reads texts. All have ``height * width * channels`` tokens."""

    height: int
    width: int
    channels: int

    @classmethod
    def of(cls, model: dict[str, Any]) -> Self:
        """Read what tokenizer.json states. Raises ConfigError: it is not sound."""
        sizes = [model.get(name) for name in ("height", "width", "channels")]
        if not all(type(size) is int and 1 <= size <= MAX_SEEN for size in sizes) or sizes[2] not in (1, 3):
            raise ConfigError("tokenizer.json states no size of pictures: copy the base again", about=TOKENIZER)
        return cls(*sizes)  # type: ignore[arg-type]

    @property
    def size(self) -> int:
        return self.height * self.width * self.channels

    @property
    def cost(self) -> int:
        return max(1, self.size // FEWEST)

    @property
    def truncation(self) -> dict[str, int]:
        return {"max_length": self.size}

    def to_str(self, *, pretty: bool = True) -> str:
        stated = {"type": PIXELS, "height": self.height, "width": self.width, "channels": self.channels}
        whole = {"model": stated, "truncation": self.truncation}
        return json.dumps(whole, indent=1 if pretty else None) + "\n"

    def drawn(self) -> NDArray[np.int64]:
        """Draw the tokens of a picture of noise, the same each time."""
        return np.random.default_rng(0).integers(0, 256, self.size)

    def encode(self, text: str) -> Pixels:
        """Decode a picture, and reduce or enlarge its middle to what the model sees.

        Raises DataError: ``text`` is not a picture, is above ``MAX_PICTURE`` characters, or damaged; ConfigError as
        ``_pillow``.
        """
        if not is_picture(text):
            raise DataError("this base reads pictures: give PNG, JPEG or WebP", about="picture")
        if len(text) > MAX_PICTURE:
            reason = f"the picture has {len(text)} characters, above the limit of {MAX_PICTURE}: reduce it"
            raise DataError(reason, about="picture")
        try:
            content = base64.b64decode(text.partition(";base64,")[2], validate=True)
        except (binascii.Error, ValueError):
            raise DataError("the picture is not in base64", about="picture") from None
        with _opened(content, MAX_SEEN**2) as image:
            seen = image.convert("L" if self.channels == 1 else "RGB")
        if seen.size != (self.width, self.height):
            seen = self._fitted(seen)
        return Pixels(np.asarray(seen, np.int64).reshape(-1))

    def _fitted(self, image: Any) -> Any:
        """Resize the middle of an image in two steps, across and down: the page does the same, to the same numbers."""
        how, (width, height), ratio = _pillow("Image").Resampling.BILINEAR, image.size, self.width / self.height
        across, down = (ratio * height, height) if width / height >= ratio else (width, width / ratio)
        left, top = (width - across) / 2, (height - down) / 2
        narrow = image.resize((self.width, height), how, box=(left, 0, left + across, height))
        return narrow.resize((self.width, self.height), how, box=(0, top, self.width, top + down))

    def encode_batch(self, texts: Sequence[str]) -> list[Pixels]:
        return [self.encode(text) for text in texts]

    def enable_truncation(self, max_length: int) -> None:
        """Change nothing, as the other two do: all pictures have one size."""

    def no_truncation(self) -> None: ...

    def no_padding(self) -> None: ...


Reader = Tokenizer | PictureReader


def open_reader(tokenizer: bytes) -> Any:
    """Open a tokenizer.json as a ``Reader``. Raises what ``json`` and the tokenizers library raise, and as
    ``PictureReader.of``."""
    if _states_pixels(tokenizer):
        return PictureReader.of(json.loads(tokenizer)["model"])
    return Tokenizer.from_str(tokenizer.decode())


def reads_pictures(folder: Path) -> bool:
    """Whether the base in ``folder`` reads pictures."""
    with suppress(FileNotFoundError), (folder / TOKENIZER).open("rb") as file:
        return _states_pixels(file.read(BEGIN))
    return False


def pictured(tokenizer: bytes, texts: Sequence[str]) -> list[str]:
    """Return the texts, or the pictures in the files that they name if a base with this tokenizer.json reads pictures.
    Raises DataError: a file is missing, or as ``picture``."""
    if not _states_pixels(tokenizer):
        return [*texts]
    try:
        return [text if is_picture(text) else picture(read(Path(text), MAX_SOURCE)) for text in texts]
    except OSError as error:
        reason = f"cannot read {error.filename or 'a picture'}: {error.strerror}; give the file of a picture"
        raise DataError(reason, about="picture") from None


def _states_pixels(tokenizer: bytes) -> bool:
    return f'"{PIXELS}"'.encode() in tokenizer[:BEGIN]


def _pillow(module: str) -> Any:
    """Import a module of Pillow. Raises ConfigError: it is not installed."""
    try:
        return import_module(f"PIL.{module}")
    except ModuleNotFoundError as error:
        reason = "pictures need Pillow, which is not installed: pip install 'edgeadapt[pictures]'"
        raise ConfigError(reason, about="pillow") from error


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
