"""Follow a channel of releases: TUF decides what to fetch, TUF and the pinned keys of bundles what to trust.

::

    trust.pem               pinned keys of bundles
    updates/source.json     where the repository is, and the channel
    updates/root.json       the pinned root of the repository
    updates/targeting.json  what staged rollouts go by (``Targeting``)
    updates/metadata/       what TUF has accepted so far: from here on nothing older is accepted
    updates/files/          downloads that are not in use yet, by digest
    updates/private/BASE/   private adapters for a base that was replaced
    bundle/                 replaced whole, or not at all
    bundle/release.json     the whole release, on a device that keeps a part of it (``ChannelSource.keep``)

The client of The Update Framework (TUF) refuses metadata of unknown signers, older than the last, expired, or from
different states of the repository (Samuel et al. 2010, "Survivable Key Compromise in Software Update Systems"). A
release that it accepts is then held to the rules of every bundle (``client.inference.trust``). Whatever fails, the
bundle in use stays."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, ValidationError
from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
)
from tuf.api.metadata import Metadata, Root, TargetFile
from tuf.ngclient import FetcherInterface, Updater

from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, DataError, TrustError
from client.inference.library import GLOBAL
from client.inference.session import ROUTER
from client.inference.trust import Trust
from edgeadapt.formats import jsontext, storage
from edgeadapt.formats.bundle import BASE_MANIFEST, MAX_BASE_FILE, Bundle, adapter_names, adapter_path, manifest_path
from edgeadapt.formats.release import (
    FLAGS,
    MAX_FLAGS,
    MAX_RELEASE,
    METADATA,
    RELEASE,
    TARGETS,
    Language,
    Release,
    Rollout,
    check_channel,
    check_language,
    previous,
    target,
)

UPDATES, FILES, PRIVATE = "updates", "files", "private"
SOURCE, ROOT, TARGETING = "source.json", "root.json", "targeting.json"
MAX_ROOT = 512_000  # bytes, as TUF's client has it
MAX_FILE = 2**12  # bytes of ``SOURCE`` or ``TARGETING``
KEY = 16  # bytes
CHUNK = 2**16  # bytes
OUTDATED = "the repository has not been renewed in time, or somebody shows an old state of it"
# Errors of TUF → part of the repository, and what is wrong with it; the first that fits.
BROKEN: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str, str], ...] = (
    (ExpiredMetadataError, "expired", OUTDATED),
    (BadVersionNumberError, "version", "the repository is older than it was before"),
    ((LengthOrHashMismatchError, DownloadLengthMismatchError), "file", "a file is not what the repository has signed"),
    (RepositoryError, "signature", "the repository is not signed as its root demands"),
)
T = TypeVar("T")
Note = Callable[[str, int], None]  # the name of a file that is fetched, and its size in bytes


@dataclass(frozen=True, slots=True)
class ChannelSource:
    """A channel: where its repository's public folder is (http, https, or a local folder), and its name. ``keep``:
    bytes of the release's adapters that the device holds, the default one and the router and then those that it used
    last; None: all."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    repository: Annotated[str, Field(min_length=1, max_length=2000)]
    channel: Annotated[str, Field(max_length=32)]
    keep: Annotated[int, Field(ge=1)] | None = None

    def url(self, part: str) -> str:
        return f"{self.repository.rstrip('/')}/{part}/"


@dataclass(frozen=True, slots=True)
class ReleaseOffer:
    release: Release
    rollout: Rollout | None = None  # None if all devices get the newest release
    chosen: bool = True  # whether this device is among those that get the newest

    @property
    def why(self) -> str:
        if self.rollout is None:
            return "for all devices"
        kept = ", but has it already and does not go back" if self.release.number == self.rollout.release else ""
        what = "one of them" if self.chosen else f"not one of them{kept}"
        return f"release {self.rollout.release} is for {self.rollout}, and this is {what}"


@dataclass(frozen=True, slots=True)
class Updated:
    source: ChannelSource
    offer: ReleaseOffer
    changed: bool  # whether it was another release before
    fetched: int = 0  # bytes
    set_aside: tuple[Path, ...] = ()  # private adapters for another base, which the new one cannot use

    @property
    def release(self) -> Release:
        return self.offer.release


@dataclass(frozen=True, slots=True)
class Targeting:
    """What decides on the device whether it gets the newest release of a rollout (``edgeadapt.formats.release``). The
    key is a random number that the device makes once, in hex. It is an input of the decision and nothing else, and
    never leaves the device; the server of the files sees which of them a device fetches, as for every release."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    key: Annotated[str, Field(pattern=f"^[0-9a-f]{{{2 * KEY}}}$")]
    language: Language | None = None

    @classmethod
    def read(cls, folder: Path, entropy: Entropy) -> Self:
        """Read the targeting of the device with this folder ``updates``, or make one. Raises DataError: it is damaged;
        OSError: it cannot be written."""
        path = folder / TARGETING
        if not path.exists():
            new = cls(entropy.bytes(KEY).hex())
            new.write(folder)
            return new
        return _decoded(cls, path, "delete it, and the device takes part in rollouts under a new number")

    def with_language(self, language: str) -> Self:
        """Replace the language. Raises ConfigError if that has no such code."""
        return replace(self, language=check_language(language))

    def write(self, folder: Path) -> None:
        storage.replace(folder / TARGETING, jsontext.encode(asdict(self)))

    def release(self, rollout: Rollout) -> int:
        return rollout.release_for(self.key, self.language)


def follow(bundle: Path, source: ChannelSource, root: Path) -> None:
    """Pin the root of a repository, and note which channel ``bundle`` follows.

    Another channel of the same repository may be noted later, but not another repository: what was accepted from one
    says nothing about another. Raises ConfigError: the place or the channel cannot be one, or another root is pinned
    already; DataError, TrustError: ``root`` is missing or damaged, or is not a root that its own keys have signed."""
    check_channel(source.channel)
    parts = urlsplit(source.repository)
    if parts.scheme not in ("http", "https") and not Path(source.repository).is_dir():
        reason = f"{source.repository[:200]} is neither an address (http, https) nor a folder"
        raise ConfigError(reason, about="repository")
    folder = storage.real(bundle).parent / UPDATES
    raw = _required(root, MAX_ROOT)
    try:
        Metadata[Root].from_bytes(raw).verify_delegate(Root.type, Metadata[Root].from_bytes(raw))
    except (RepositoryError, ValueError, TypeError, KeyError) as error:
        raise TrustError(f"{root} is not a root that its own keys have signed", about=root.name) from error
    folder.mkdir(parents=True, exist_ok=True)
    with storage.locked(folder / ".lock"):
        pinned = folder / ROOT
        if pinned.exists() and storage.read(pinned, MAX_ROOT) != raw:
            reason = f"{pinned} pins another root: delete {folder} if this device shall trust another repository"
            raise ConfigError(reason, about=ROOT)
        if not pinned.exists():
            storage.replace(pinned, raw)
        storage.replace(folder / SOURCE, jsontext.encode(asdict(source)))


def update(
    bundle: Path,
    trust: Path | None = None,
    note: Note = lambda name, size: None,
    *,
    language: str | None = None,
    wanted: str | None = None,
    entropy: Entropy,
) -> Updated:
    """Bring ``bundle``, which may be missing, to the channel's release for this device. Private adapters stay.

    ``language``: of the device, from now on; for rollouts by language. ``wanted``: an adapter of the release that the
    device shall have, instead of those that it used longest ago. ``entropy``: for the targeting key. Raises
    ConfigError: it follows no channel, the repository cannot be reached or has no release of the channel, the disk
    cannot be written, an adapter to keep is too large, or ``wanted`` is for another base; DataError: the bundle or a
    file of the release is damaged; TrustError: the repository or the release breaks a rule. The bundle in use stays."""
    folder = storage.real(bundle).parent / UPDATES
    if not (folder / SOURCE).is_file():
        raise ConfigError(f"{bundle} follows no channel yet: name --repository, --channel and --root once")
    with storage.locked(folder / ".lock"), storage.locked_folder(bundle) as place, _said():
        source = _decoded(ChannelSource, folder / SOURCE, "name --repository and --channel again")
        files = folder / FILES
        files.mkdir(exist_ok=True)
        if language is not None:
            Targeting.read(folder, entropy).with_language(language).write(folder)
        updater = _updater(folder, source)
        updater.refresh()
        offer = _offer(updater, source, folder, place, entropy)
        if source.keep is not None:
            offer = replace(offer, release=_part(updater, source, offer.release, place, wanted))
        release, pinned = offer.release, Trust.open(place, trust)
        if _installed(place, release) and not _withdrawn(pinned.bundle, release):
            return Updated(source, offer, changed=False)
        fetched = _fetch(updater, source, release.files, place, files, note)
        aside = _install(place, release, files, pinned, folder / PRIVATE)
        shutil.rmtree(files, ignore_errors=True)
        return Updated(source, offer, changed=True, fetched=fetched, set_aside=aside)


class _Folder(FetcherInterface):
    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            file = Path(url).open("rb")  # noqa: SIM115  # closed by ``read``
        except FileNotFoundError as error:
            raise DownloadHTTPError(f"there is no file {url}", 404) from error

        def read() -> Iterator[bytes]:
            with file:
                while chunk := file.read(CHUNK):
                    yield chunk

        return read()


@contextmanager
def _said() -> Iterator[None]:
    try:
        yield
    except (RepositoryError, DownloadLengthMismatchError) as error:
        part, what = next(said for kinds, *said in BROKEN if isinstance(error, kinds))
        raise TrustError(f"{what} ({error}): the bundle in use stays", about=f"repository.{part}") from error
    except DownloadError as error:
        raise ConfigError(f"the repository cannot be read ({error}): try again later", about="repository") from error


def _decoded(kind: type[T], path: Path, remedy: str) -> T:
    try:
        raw = storage.read(path, MAX_FILE)
        jsontext.decode(raw)
        return jsontext.decode_as(kind, raw)
    except (DataError, ValueError, ValidationError) as error:
        raise DataError(f"{path} is damaged: {remedy}", about=path.name) from error


def _updater(folder: Path, source: ChannelSource) -> Updater:
    metadata = folder / METADATA
    metadata.mkdir(exist_ok=True)
    local = urlsplit(source.repository).scheme not in ("http", "https")
    return Updater(
        str(metadata),
        source.url(METADATA),
        target_base_url=source.url(TARGETS),
        fetcher=_Folder() if local else None,
        bootstrap=_required(folder / ROOT, MAX_ROOT),
    )


def _required(path: Path, limit: int) -> bytes:
    try:
        return storage.read(path, limit)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", about=path.name) from error


def _described(updater: Updater, source: ChannelSource, name: str, limit: int) -> TargetFile:
    file = updater.get_targetinfo(target(source.channel, name))
    if file is None:
        reason = f"the repository has no {name} of channel {source.channel}"
        raise ConfigError(f"{reason}: nothing was published there", about="channel")
    if file.length > limit:
        raise TrustError(f"{name} of the release has {file.length} bytes, more than {limit}", about=name)
    return file


def _offer(updater: Updater, source: ChannelSource, folder: Path, bundle: Path, entropy: Entropy) -> ReleaseOffer:
    files = folder / FILES
    newest, held = _release(updater, source, files, RELEASE, bundle), Release.held(bundle)
    if updater.get_targetinfo(target(source.channel, FLAGS)) is None:
        return ReleaseOffer(newest)
    file = _described(updater, source, FLAGS, MAX_FLAGS)
    rollout = Rollout.decode(storage.read(Path(updater.download_target(file, str(files / FLAGS))), MAX_FLAGS))
    if rollout.release != newest.number:
        reason = f"the flags are for release {rollout.release}, and the channel has {newest.number}"
        raise TrustError(reason, about=FLAGS)
    chosen = Targeting.read(folder, entropy).release(rollout) == newest.number
    before = _release(updater, source, files, previous(RELEASE), bundle)
    if before.number != rollout.previous:
        reason = f"the flags name the release {rollout.previous} before, and the channel has {before.number} there"
        raise TrustError(reason, about=FLAGS)
    gets = newest if chosen or (_installed(bundle, newest) if held is None else held == newest) else before
    return ReleaseOffer(gets, rollout, chosen)


def _release(updater: Updater, source: ChannelSource, files: Path, name: str, bundle: Path) -> Release:
    file = _described(updater, source, name, MAX_RELEASE)
    place, cached = str(files / file.hashes["sha256"]), updater.find_cached_target(file, str(bundle / RELEASE))
    place = cached or updater.download_target(file, place)
    return Release.decode(storage.read(Path(place), MAX_RELEASE))


def _part(updater: Updater, source: ChannelSource, release: Release, bundle: Path, wanted: str | None) -> Release:
    """Reduce a release to its base and the adapters that this device keeps. Raises as ``update``."""
    base, only = BASE_MANIFEST.as_posix(), len(release.adapters.keys() - {ROUTER}) == 1
    if wanted is not None and storage.file_sha256(bundle / base) != release.files.get(base):
        reason = f"release {release.number} of channel {source.channel} has another base"
        raise ConfigError(f"{reason}: run 'edgeadapt device update' first", about="base")
    fixed = [name for name in release.adapters if only or name in (GLOBAL, ROUTER, wanted)]
    used, left, adapters = _used(bundle), source.keep or 0, dict[str, int]()
    files = {RELEASE: hashlib.sha256(release.encode()).hexdigest()}
    for name in [*fixed, *sorted(used.keys() & release.adapters.keys() - {*fixed}, key=lambda name: -used[name])]:
        paths = [path.as_posix() for path in (manifest_path(name), adapter_path(name))]
        digests = {path: release.files.get(path, "") for path in paths}
        if (size := sum(_file(updater, source, *one).length for one in digests.items())) <= left:
            left, files, adapters = left - size, files | digests, adapters | {name: release.adapters[name]}
        elif name in fixed:
            reason = f"adapter {name!r} has {size} bytes, and of the {source.keep} for adapters {left} are left"
            raise ConfigError(f"{reason}: follow the channel with a larger --keep-adapters", about="--keep-adapters")
    files |= {path: digest for path, digest in release.files.items() if not path.startswith("adapters/")}
    return replace(release, files=files, adapters=adapters)


def _used(bundle: Path) -> dict[str, int]:
    """Read when each adapter was used last, in ns, from the time of its file (``AdapterBank.note``)."""
    files = (bundle / adapter_path(name) for name in adapter_names(bundle))
    return {file.stem: file.stat().st_mtime_ns for file in files if file.is_file()}


def _installed(bundle: Path, release: Release) -> bool:
    return all(
        (bundle / name).is_file() and storage.file_sha256(bundle / name) == digest
        for name, digest in release.files.items()
    )


def _withdrawn(old: Bundle, release: Release) -> bool:
    others = set(adapter_names(old.folder)) - release.adapters.keys()
    return any(old.adapter_manifest(name).parent is None for name in others)


def _fetch(
    updater: Updater, source: ChannelSource, wanted: Mapping[str, str], bundle: Path, files: Path, note: Note
) -> int:
    """Bring files of a release (name → digest) into ``files``, by digest. Returns how many bytes were fetched."""
    fetched = 0
    for name, digest in wanted.items():
        file = _file(updater, source, name, digest)
        place = files / digest
        if place.is_file() and storage.file_sha256(place) == digest:  # from an update that was interrupted
            continue
        if (bundle / name).is_file() and storage.file_sha256(bundle / name) == digest:
            place.unlink(missing_ok=True)
            storage.link_or_copy(bundle / name, place)
            continue
        note(name, file.length)
        updater.download_target(file, str(place))
        fetched += file.length
    return fetched


def _file(updater: Updater, source: ChannelSource, name: str, digest: str) -> TargetFile:
    for place in (name, previous(name)):
        if updater.get_targetinfo(target(source.channel, place)) is not None:
            file = _described(updater, source, place, MAX_BASE_FILE)
            if file.hashes.get("sha256") == digest:
                return file
    raise TrustError(f"the metadata have no {name} with the digest that the release states", about=name)


def _install(bundle: Path, release: Release, files: Path, trust: Trust, aside: Path) -> tuple[Path, ...]:
    """Make a bundle of ``files`` and the private adapters of the old one; verify it; put it into place. Returns the
    manifests of private adapters that went to ``aside``."""
    with storage.staged(bundle, replaces=True) as stage:
        for name, digest in release.files.items():
            (stage / name).parent.mkdir(exist_ok=True)
            storage.link_or_copy(files / digest, stage / name)
        for name, used in _used(bundle).items():
            if name in release.adapters:
                os.utime(stage / adapter_path(name), ns=(used, used))
        staged = Bundle(stage, trust.bundle.trusted)
        base = staged.base()
        for name in adapter_names(stage):
            trust.seen.check(staged.adapter(name, base.manifest).manifest)
        return _keep_private(trust.bundle, base.manifest.base_digest, stage, aside)


def _keep_private(old: Bundle, base_digest: str, stage: Path, aside: Path) -> tuple[Path, ...]:
    """Link the private adapters of the old bundle into ``stage``; those for another base into ``aside``."""
    manifests = []
    for name in adapter_names(old.folder):
        manifest = old.adapter_manifest(name)
        if manifest.parent is None:
            continue
        fits = manifest.base_digest == base_digest
        into = stage if fits else aside / manifest.base_digest
        if fits and (stage / manifest_path(name)).exists():
            reason = f"the release has an adapter {name!r}, which is the name of a private one: rename that"
            raise ConfigError(reason, about="adapter")
        for path in (manifest_path(name), adapter_path(name)):
            (into / path).parent.mkdir(parents=True, exist_ok=True)
            (into / path).unlink(missing_ok=True)
            storage.link_or_copy(old.folder / path, into / path)
        if not fits:
            manifests.append(into / manifest_path(name))
    return tuple(manifests)
