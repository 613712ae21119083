"""The frozen base: found on disk and identified by digest. Nothing here ever trains or writes it."""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from aggregation.errors import ConfigError

IDENTITY_FILES = ("config.json", "model.safetensors", "tokenizer.json")
CHUNK = 2**20  # bytes


@dataclass(frozen=True, slots=True)
class Base:
    """A base model in a folder. ``digest`` names its weights, configuration and tokenizer (SHA-256, hex)."""

    folder: Path
    digest: str

    @property
    def weight_bytes(self) -> int:
        """Size of the full model's weights, in bytes: what federated fine-tuning of everything would send."""
        return (self.folder / "model.safetensors").stat().st_size


def find_base(where: str) -> Base:
    """The base in the folder ``where``, or in the ``model`` folder of the installed Python package ``where``.

    Raises:
        ConfigError: There is no such folder or package, or it lacks one of ``IDENTITY_FILES``.
    """
    folder = Path(where)
    if not folder.is_dir():
        folder = _package_folder(where)
    for name in IDENTITY_FILES:
        if not (folder / name).is_file():
            raise ConfigError(f"base model folder {folder} has no {name}")
    return Base(folder, _digest(folder.resolve()))


def _package_folder(package: str) -> Path:
    # find_spec alone: importing the package would pull in its whole framework.
    try:
        spec = find_spec(package) if package.isidentifier() else None
    except ValueError:  # a module that was not imported from anywhere, such as __main__
        spec = None
    if spec is None or spec.origin is None:
        raise ConfigError(f"base model {package!r} is neither a folder nor an installed package")
    return Path(spec.origin).parent / "model"


@lru_cache(maxsize=8)
def _digest(folder: Path) -> str:
    rows = [[name, _file_digest(folder / name)] for name in IDENTITY_FILES]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            state.update(chunk)
    return state.hexdigest()
