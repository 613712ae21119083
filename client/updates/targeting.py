"""What decides on the device whether it gets the newest release of a rollout.

::

    updates/targeting.json     the targeting key, a random number that the device makes once, and its language

The key is an input of the decision and nothing else, and it never leaves the device. The rule comes from the signed
repository (``adapters.rollout``). Who serves the files sees which of them a device fetches, as for every release.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import ConfigDict, Field, ValidationError

from adapters import jsontext, storage
from adapters.rollout import Language, Rollout, check_language
from aggregation.entropy import Entropy
from aggregation.errors import DataError

TARGETING = "targeting.json"
MAX_TARGETING = 2**10  # bytes
KEY = 16  # bytes


@dataclass(frozen=True, slots=True)
class Targeting:
    """What rollouts go by. ``key``: hex."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    key: Annotated[str, Field(pattern=f"^[0-9a-f]{{{2 * KEY}}}$")]
    language: Language | None = None

    @classmethod
    def read(cls, folder: Path, entropy: Entropy) -> Self:
        """That of the device with this folder ``updates``; it is made if it has none.

        Raises:
            DataError: It is damaged.
            OSError: It cannot be written.
        """
        path = folder / TARGETING
        if not path.exists():
            made = cls(entropy.bytes(KEY).hex())
            made.write(folder)
            return made
        try:
            raw = storage.read(path, MAX_TARGETING)
            jsontext.decode(raw)
            return jsontext.decode_as(cls, raw)
        except (DataError, ValueError, ValidationError) as error:
            reason = f"{path} is damaged: delete it, and the device takes part in rollouts under a new number"
            raise DataError(reason, about=path.name) from error

    def with_language(self, language: str) -> Self:
        """The same with another language. Raises ConfigError if that has no such code."""
        return replace(self, language=check_language(language))

    def write(self, folder: Path) -> None:
        """Store it. Raises OSError."""
        storage.replace(folder / TARGETING, jsontext.encode(asdict(self)))

    def release(self, rollout: Rollout) -> int:
        """Number of the release that this device gets."""
        return rollout.release_for(self.key, self.language)
