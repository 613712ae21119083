"""A release of a channel: the bundle that devices on the channel shall have, as a list of its files.

It is the file ``CHANNEL/release.json`` among the targets of a repository of The Update Framework (TUF), whose metadata
sign its digest. The files of the bundle are the other targets of the channel, ``CHANNEL/base/…`` and
``CHANNEL/adapters/…``. During a rollout in stages (``edgeadapt.formats.rollout``), the previous release is there too:
its list is ``CHANNEL/previous-release.json``, and files that the newest does not have are under
``CHANNEL/previous-base/…`` and ``CHANNEL/previous-adapters/…``. ``edgeadapt.releases`` makes releases,
``client.updates`` installs them.
"""

import re
from dataclasses import asdict, dataclass
from typing import Annotated, Self

from pydantic import Field, ValidationError

from aggregation.errors import ConfigError, TrustError
from edgeadapt.formats import jsontext
from edgeadapt.formats.manifest import Count, Sha256

RELEASE = "release.json"
MAX_RELEASE = 2**20  # bytes
METADATA, TARGETS = "metadata", "targets"  # folders of what is published
CANARY, STABLE = "canary", "stable"  # the channels of a new repository
_CHANNEL = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_RESERVED = frozenset({"root", "targets", "snapshot", "timestamp"})  # roles of TUF itself
# Files of a bundle: two levels, no hidden file, nothing that leads out of the folder.
_PATH = r"^(base|adapters)/[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$"


def check_channel(name: str) -> str:
    """Check that a channel can have the name, up to 32 lower-case letters, digits and hyphens. Raises ConfigError."""
    if not _CHANNEL.fullmatch(name) or name in _RESERVED:
        raise ConfigError(
            f"{name[:40]!r} is not the name of a channel: use up to 32 lower-case letters, digits and hyphens, and not "
            f"{', '.join(sorted(_RESERVED))}",
            about="channel",
        )
    return name


def target(channel: str, name: str) -> str:
    """Return the path of a file of a channel's bundle, or of its release, among the targets."""
    return f"{channel}/{name}"


def previous(name: str) -> str:
    """Return the name of a file of the previous release, among those of the newest."""
    return f"previous-{name}"


@dataclass(frozen=True, slots=True)
class Release(jsontext.Exact):
    """Says what the bundle of a channel is."""

    number: Count  # of the channel, from 1
    made: Annotated[str, Field(max_length=40)]  # when, ISO 8601
    files: Annotated[dict[Annotated[str, Field(pattern=_PATH)], Sha256], Field(min_length=1, max_length=1000)]
    adapters: Annotated[dict[Annotated[str, Field(max_length=64)], Count], Field(max_length=100)]  # name → version

    def encode(self) -> bytes:
        return jsontext.encode(asdict(self))

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Read what ``encode`` wrote. Raises TrustError for the rest, or a name that a bundle's file cannot have."""
        try:
            jsontext.decode(raw)  # refuses what the next line would read in one of several ways
            return jsontext.decode_as(cls, raw)
        except (ValueError, ValidationError) as error:
            reason = "the release is damaged, or of a newer version: update edgeadapt"
            raise TrustError(reason, about=RELEASE) from error
