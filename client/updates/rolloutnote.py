"""What a device notes of its channel's rollout at each update, and checks before it counts right answers."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import ConfigDict, Field, ValidationError

from adapters import jsontext, storage
from adapters.manifest import Sha256
from adapters.rollout import Rollout
from aggregation.errors import DataError, TrustError

ROLLOUT = "rollout.json"
MAX_NOTE = 2**16  # bytes


@dataclass(frozen=True, slots=True)
class RolloutNote:
    """A rollout, and what its two releases are.

    Args:
        rollout: Its flags.
        adapters: Name → ``AdapterManifest.content`` in the two releases, newest first.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    rollout: Rollout
    adapters: Annotated[dict[Annotated[str, Field(max_length=64)], tuple[Sha256, Sha256]], Field(max_length=100)]

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """That of the folder ``updates``; None if nothing was rolled out.

        Raises:
            TrustError: It is damaged.
        """
        path = folder / ROLLOUT
        if not path.is_file():
            return None
        try:
            raw = storage.read(path, MAX_NOTE)
            jsontext.decode(raw)
            return jsontext.decode_as(cls, raw)
        except (DataError, ValueError, ValidationError) as error:
            raise TrustError(f"{path} is damaged: update the bundle", about=ROLLOUT) from error

    @staticmethod
    def write(folder: Path, note: "RolloutNote | None") -> None:
        """Keep it in the folder ``updates``, in place of the one before. Raises OSError."""
        if note is None:
            (folder / ROLLOUT).unlink(missing_ok=True)
        else:
            storage.replace(folder / ROLLOUT, jsontext.encode(asdict(note)))
