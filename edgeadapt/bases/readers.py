"""What reads the texts of a base: a tokenizer, or what reads pictures or sounds."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from aggregation.errors import DataError
from edgeadapt.bases.media import MAX_SOURCE, MediaReader, is_medium
from edgeadapt.bases.pictures import PictureReader
from edgeadapt.bases.sounds import SoundReader
from edgeadapt.formats.bundle import TOKENIZER
from edgeadapt.formats.storage import read

Reader = Tokenizer | MediaReader
COLUMNS: dict[str, type[MediaReader]] = {"image": PictureReader, "audio": SoundReader}  # in place of a text
SUFFIXES = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp"), "image"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".mp3"), "audio"),
}
_BEGIN = 100  # bytes of tokenizer.json that state its kind


def open_reader(tokenizer: bytes) -> Any:
    """Open a tokenizer.json as a ``Reader``. Raises what ``json`` and the tokenizers library raise, and as
    ``MediaReader.of``."""
    if kind := _kind(tokenizer):
        return kind.of(json.loads(tokenizer)["model"])
    return Tokenizer.from_str(tokenizer.decode())


def normalized(tokenizer: Tokenizer, text: str) -> str:
    """Return a text as the tokenizer of a base has it before it looks for tokens: some drop accents and control
    characters. The mark of a space that some write is a space."""
    return text if tokenizer.normalizer is None else str(tokenizer.normalizer.normalize_str(text)).replace("▁", " ")


def media_of(folder: Path) -> type[MediaReader] | None:
    """Which files the base in ``folder`` reads; None: texts."""
    with suppress(FileNotFoundError), (folder / TOKENIZER).open("rb") as file:
        return _kind(file.read(_BEGIN))
    return None


def as_texts(tokenizer: bytes, texts: Sequence[str]) -> list[str]:
    """Return the texts, or what is in the files that they name if the base with this tokenizer.json reads files. Raises
    DataError: a file is missing, or as ``MediaReader.of_file``."""
    if not (kind := _kind(tokenizer)):
        return [*texts]
    try:
        return [text if is_medium(text) else kind.of_file(read(Path(text), MAX_SOURCE)) for text in texts]
    except OSError as error:
        reason = f"cannot read {error.filename or f'a {kind.noun}'}: {error.strerror}; give the file of a {kind.noun}"
        raise DataError(reason, about=kind.noun) from None


def _kind(tokenizer: bytes) -> type[MediaReader] | None:
    begin = tokenizer[:_BEGIN]
    return next((kind for kind in COLUMNS.values() if f'"{kind.kind}"'.encode() in begin), None)
