"""Files as texts: a data URI of a small file, whose tokens are its pixels or samples.

So everything that holds, counts, seals or sends a text does it with a picture or a sound. A base of such files has a
``tokenizer.json`` that states what its model sees (``MediaReader``); ``readers.open_reader`` opens it or any other.

Training may also use variants of a file, such as a sound with noise: its text with ``#`` and a number. They are made of
whole numbers, by bits of the murmur hash: the page makes the same ones.
"""

import base64
import binascii
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from aggregation.errors import ConfigError, DataError

MAX_MEDIUM = 2**18  # characters of such a text
MAX_SOURCE = 2**25  # bytes of a file that becomes one
MAX_VARIANTS = 16  # of a file
MARK, VARIANTS = "#", [str(number) for number in range(1, MAX_VARIANTS + 1)]
FEWEST = 768  # numbers that take about the memory of one token of a text


@dataclass(frozen=True, slots=True)
class Numbers:
    """The numbers of a file, as an encoding of the tokenizers library has tokens."""

    ids: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MediaReader(ABC):
    """Reads files of a kind as a ``Tokenizer`` reads texts: all have ``size`` tokens. Its fields are whole numbers,
    which tokenizer.json states."""

    kind: ClassVar[str]  # of tokenizer.json
    noun: ClassVar[str]
    begin: ClassVar[str]  # of the data URI, up to its subtype
    files: ClassVar[str]  # that become one
    example: ClassVar[str]  # name of a file

    @staticmethod
    @abstractmethod
    def of_file(content: bytes) -> str:
        """Make a text of the content of a file. Raises DataError: it is too large, damaged, or of no kind in ``files``;
        ConfigError: a library is not installed."""

    @abstractmethod
    def decode(self, content: bytes) -> NDArray[np.int64]:
        """Return the tokens of what a text holds. Raises as ``of_file``."""

    @abstractmethod
    def varied(self, tokens: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        """Return other tokens that mean the same, as ``seed`` draws them."""

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError: the fields are out of range."""

    @property
    @abstractmethod
    def size(self) -> int: ...

    @abstractmethod
    def drawn(self) -> NDArray[np.int64]:
        """Draw the tokens of noise, the same each time."""

    @classmethod
    def of(cls, model: dict[str, Any]) -> Self:
        """Read what tokenizer.json states. Raises ConfigError: it is not sound."""
        try:
            reader = cls(**{name: value for name, value in model.items() if name != "type"})
            if not all(type(value) is int for value in asdict(reader).values()):
                raise ValueError
            reader.check()
        except (TypeError, ValueError):
            reason = f"tokenizer.json states no size of {cls.noun}s: copy the base again"
            raise ConfigError(reason, about="tokenizer.json") from None
        return reader

    @property
    def stated(self) -> dict[str, Any]:
        return {"type": self.kind, **asdict(self)}

    @property
    def cost(self) -> int:
        return max(1, self.size // FEWEST)

    @property
    def truncation(self) -> dict[str, int]:
        return {"max_length": self.size}

    def to_str(self, *, pretty: bool = True) -> str:
        whole = {"model": self.stated, "truncation": self.truncation}
        return json.dumps(whole, indent=1 if pretty else None) + "\n"

    def encode(self, text: str) -> Numbers:
        """Decode a text, or a variant of one. Raises DataError: it is of another kind, above ``MAX_MEDIUM`` characters,
        or damaged; ConfigError as ``of_file``."""
        text, mark, number = text.partition(MARK)
        if not text.startswith(self.begin):
            raise DataError(f"this base reads {self.noun}s: give {self.files}", about=self.noun)
        if len(text) > MAX_MEDIUM:
            reason = f"the {self.noun} has {len(text)} characters, above the limit of {MAX_MEDIUM}: reduce it"
            raise DataError(reason, about=self.noun)
        try:
            content = base64.b64decode(text.partition(";base64,")[2], validate=True)
        except (binascii.Error, ValueError):
            raise DataError(f"the {self.noun} is not in base64", about=self.noun) from None
        tokens = self.decode(content)
        if not mark:
            return Numbers(tokens)
        if number not in VARIANTS:
            raise DataError(f"a {self.noun} has no such variant", about=self.noun)
        return Numbers(self.varied(tokens, int(tokens.sum()) + int(number) * 0x9E3779B1))

    def encode_batch(self, texts: Sequence[str]) -> list[Numbers]:
        return [self.encode(text) for text in texts]

    def enable_truncation(self, max_length: int) -> None:  # noqa: B027
        """Change nothing, as the other two do: all files have one size."""

    def no_truncation(self) -> None:  # noqa: B027
        pass

    def no_padding(self) -> None:  # noqa: B027
        pass


def is_medium(text: str) -> bool:
    """Whether a text is a file."""
    return text.startswith(("data:image/", "data:audio/"))


def variants(text: str, count: int) -> list[str]:
    """Return the first variants of a file, at most ``MAX_VARIANTS``; a text has none."""
    return [text + MARK + number for number in VARIANTS[:count]] if is_medium(text) else []


def drawn_bits(seed: int, places: Any) -> NDArray[np.int64]:
    """Draw 32 bits for each place, which are whole numbers below 2^32."""
    bits = (np.asarray(places, np.uint32) * np.uint32(0xC2B2AE3D)) ^ np.uint32(seed % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return (bits ^ (bits >> np.uint32(16))).astype(np.int64)


def as_text(begin: str, subtype: str, content: bytes) -> str:
    return f"{begin}{subtype};base64,{base64.b64encode(content).decode()}"


def library(module: str, noun: str) -> Any:
    """Import what an extra installs. Raises ConfigError: it is not installed."""
    try:
        return import_module(module)
    except (ImportError, OSError) as error:  # OSError: soundfile finds no libsndfile
        reason = f"{noun}s need a library that is not installed: pip install 'edgeadapt[{noun}s]'"
        raise ConfigError(reason, about=module.partition(".")[0]) from error
