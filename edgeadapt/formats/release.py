"""A release of a channel: the bundle that devices on the channel shall have; and which of them get it in stages.

A release is the file ``CHANNEL/release.json`` among the targets of a repository of The Update Framework (TUF), whose
metadata sign its digest: a list of the bundle's files, the other targets of the channel, ``CHANNEL/base/…`` and
``CHANNEL/adapters/…``. During a rollout in stages, the previous release is there too: its list is
``CHANNEL/previous-release.json``, and files that the newest does not have are under ``CHANNEL/previous-base/…`` and
``CHANNEL/previous-adapters/…``.

A rollout is the file ``CHANNEL/flags.json``, a flag definition of flagd, so that any flagd evaluates it and comes to
the same release (its operator ``fractional``). The flag ``release-N`` has two variants, the numbers of the newest
release and of the previous one. A device is in one of 100 parts by a hash of the flag's name and its targeting key, and
the parts of the newest release come first: a device that is in at 10 % is in at 50 %, and another release begins with
other devices.

``edgeadapt.releases`` makes both, ``client.updates`` installs releases."""

import re
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, TypeAdapter, ValidationError

from aggregation.errors import ConfigError, DataError, TrustError
from edgeadapt.formats import jsontext, storage
from edgeadapt.formats.manifest import Count, Sha256

FLAGS = "flags.json"
MAX_FLAGS = 2**14  # bytes
ALL = 100  # percent
NEWEST, PREVIOUS = "newest", "previous"  # variants
LANGUAGE = "language"  # attribute of the evaluation context
_LANGUAGE = r"^[a-z]{2,3}$"
Language = Annotated[str, Field(pattern=_LANGUAGE)]  # ISO 639
RELEASE = "release.json"
MAX_RELEASE = 2**21  # bytes
MAX_ADAPTERS, MAX_FILES = 5000, 11000  # of a release
METADATA, TARGETS = "metadata", "targets"  # folders of what is published
CANARY, STABLE = "canary", "stable"  # the channels of a new repository
_CHANNEL = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_RESERVED = frozenset({"root", "targets", "snapshot", "timestamp"})  # roles of TUF itself
# Files of a bundle: two levels, no hidden file, nothing that leads out of the folder.
_PATH = r"^(base|adapters)/[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$"


def check_language(name: str) -> str:
    """Check that ``name`` is a language's code, and return it. Raises ConfigError."""
    try:
        return TypeAdapter(Language).validate_python(name)
    except ValidationError:
        reason = f"{name[:40]!r} is not the code of a language: use two or three lower-case letters, such as de"
        raise ConfigError(reason, about=LANGUAGE) from None


@dataclass(frozen=True, slots=True)
class Rollout(jsontext.Exact):
    """Says who gets the newest release. ``languages``: only devices with one of these, of which ``share`` is then a
    part; empty: all devices."""

    release: Count
    previous: Count  # number of the release that the others get
    share: Annotated[int, Field(ge=0, le=ALL)]  # percent of devices
    languages: Annotated[tuple[Language, ...], Field(max_length=100)] = ()

    @classmethod
    def of(cls, release: int, previous: int, share: int, languages: Sequence[str]) -> Self | None:
        """Say who gets ``release``; None if all devices do. Raises ConfigError for a bad share or language."""
        if not 0 <= share <= ALL:
            raise ConfigError(f"a share is 0 to {ALL} percent, not {share}", about="share")
        rollout = cls(release, previous, share, tuple(sorted({check_language(each) for each in languages})))
        return None if rollout.is_complete else rollout

    @property
    def flag(self) -> str:
        return f"release-{self.release}"

    @property
    def is_complete(self) -> bool:
        return self.share == ALL and not self.languages

    def release_for(self, key: str, language: str | None) -> int:
        """Return the number of the release that a device gets, by its targeting key and its language's code."""
        if self.languages and language not in self.languages:
            return self.previous
        part = murmur3(b"\x82" + _cbor(self.flag) + _cbor(key)) * ALL >> 32
        return self.release if part < self.share else self.previous

    def __str__(self) -> str:
        return f"{self.share} % of devices" + (f" with language {', '.join(self.languages)}" if self.languages else "")

    def encode(self) -> bytes:
        """Encode as flagd's flag definition. Equal rollouts give equal bytes."""
        targeting: dict[str, Any] = {"fractional": [[NEWEST, self.share], [PREVIOUS, ALL - self.share]]}
        if self.languages:
            targeting = {"if": [{"in": [{"var": LANGUAGE}, list(self.languages)]}, targeting, PREVIOUS]}
        flag = {
            "state": "ENABLED",
            "variants": {NEWEST: self.release, PREVIOUS: self.previous},
            "defaultVariant": PREVIOUS,
            "targeting": targeting,
        }
        return jsontext.encode({"$schema": "https://flagd.dev/schema/v0/flags.json", "flags": {self.flag: flag}})

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Read what ``encode`` wrote, or raise TrustError: a rule of flagd can take any time to evaluate."""
        try:
            (flag,) = jsontext.decode(raw)["flags"].values()
            rule, languages = flag["targeting"], []
            if "if" in rule:
                condition, rule, _ = rule["if"]
                languages = condition["in"][1]
            stated = {
                "release": flag["variants"][NEWEST],
                "previous": flag["variants"][PREVIOUS],
                "share": rule["fractional"][0][1],
                "languages": languages,
            }
            rollout = jsontext.decode_as(cls, jsontext.encode(stated))
            if rollout.encode() != raw:
                raise ValueError
        except (ValueError, ValidationError, LookupError, TypeError, AttributeError) as error:
            reason = "the flags of the rollout are damaged, or of a newer version: update edgeadapt"
            raise TrustError(reason, about=FLAGS) from error
        return rollout


def _cbor(text: str) -> bytes:
    """Encode text of at most 255 bytes in CBOR (RFC 8949, section 3.1)."""
    raw = text.encode()
    return (bytes([0x60 + len(raw)]) if len(raw) < 24 else bytes([0x78, len(raw)])) + raw


def murmur3(data: bytes) -> int:
    """Compute MurmurHash3_x86_32 (Appleby) with the seed 0. Not for secrets.

    >>> hex(murmur3(b"The quick brown fox jumps over the lazy dog"))
    '0x2e4ff723'
    """
    state, mask = 0, 2**32 - 1
    padded = data + bytes(-len(data) % 4)
    for number, (word,) in enumerate(struct.iter_unpack("<I", padded)):
        word = word * 0xCC9E2D51 & mask
        state ^= (word << 15 | word >> 17) * 0x1B873593 & mask
        if 4 * number + 4 <= len(data):  # the rest is not mixed
            state = ((state << 13 | state >> 19) & mask) * 5 + 0xE6546B64 & mask
    state ^= len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = (state ^ state >> shift) * factor & mask
    return state ^ state >> 16


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
    return f"{channel}/{name}"


def previous(name: str) -> str:
    """Return the name of a file of the previous release, among those of the newest."""
    return f"previous-{name}"


@dataclass(frozen=True, slots=True)
class Release(jsontext.Exact):
    number: Count  # of the channel, from 1
    made: Annotated[str, Field(max_length=40)]  # when, ISO 8601
    files: Annotated[dict[Annotated[str, Field(pattern=_PATH)], Sha256], Field(min_length=1, max_length=MAX_FILES)]
    adapters: Annotated[dict[Annotated[str, Field(max_length=64)], Count], Field(max_length=MAX_ADAPTERS)]  # → version

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

    @classmethod
    def held(cls, bundle: Path) -> Self | None:
        """Read the release of which ``bundle`` has only a part. None: it has all of it, follows no channel, or its copy
        of the release is damaged, which an update repairs."""
        with suppress(OSError, DataError, TrustError):
            return cls.decode(storage.read(bundle / RELEASE, MAX_RELEASE))
        return None
