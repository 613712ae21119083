"""Rollbacks that are signed before they are needed, so that a machine without the keys for it can publish one.

::

    DIR/prepared/CHANNEL.json   the channel's next metadata, signed by its key: the previous release, once more
    DIR/prepared/CHANNEL/       the files that are new: the release's list, and its adapters' manifests, signed again

They are not served. The channel's key signs the condition on which they may be published (``RollbackCondition``), too:
``publish`` refuses, and an audit finds, what does not meet it. Every change of the channel takes their version, and
signs them again under the next one; but a new key of the channel never signs what the previous one had signed."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Targets

from aggregation.errors import ConfigError, DataError, TrustError
from edgeadapt.formats import jsontext, storage
from edgeadapt.formats.manifest import Count, Sha256
from edgeadapt.formats.release import MAX_ADAPTERS, MAX_RELEASE, RELEASE, Release, target
from edgeadapt.releases.drift import JudgedDrift
from edgeadapt.releases.metadata import MAX_METADATA, ROLLBACK, TOP, RoleMetadata, TargetFiles
from edgeadapt.releases.verdict import JudgedEvaluation

PREPARED = "prepared"  # folder


@dataclass(frozen=True, slots=True)
class RollbackCondition(jsontext.Exact):
    """States on what a prepared rollback may be published: an evaluation found the newest release worse, or, if
    ``began`` is set, answers got worse with it. ``adapters``: name → ``AdapterManifest.content`` in the two releases,
    newest first."""

    release: Count  # number of the release that it takes back
    again: Count  # number of the one that it publishes again
    margin: Annotated[float, Field(ge=0, le=1)]  # how far an accuracy may be below that of the previous release
    adapters: Annotated[
        dict[Annotated[str, Field(max_length=64)], tuple[Sha256, Sha256]], Field(max_length=MAX_ADAPTERS)
    ]
    began: Count | None = None  # day since 1970 on which it was released; None: a drift takes nothing back

    @classmethod
    def of(cls, signed: Targets) -> Self | None:
        """Read that of a channel's metadata; None if they were not prepared. Raises TrustError if it is damaged."""
        text = signed.unrecognized_fields.get(ROLLBACK)
        if text is None:
            return None
        try:
            jsontext.decode(text.encode())
            return jsontext.decode_as(cls, text.encode())
        except (ValueError, AttributeError, ValidationError) as error:
            raise TrustError("the condition of a prepared rollback is damaged", about=ROLLBACK) from error

    def put(self, signed: Targets) -> None:
        """Name it in a channel's metadata: as text, since TUF's canonical JSON has no fractions."""
        signed.unrecognized_fields[ROLLBACK] = jsontext.encode(asdict(self)).decode()

    def require(self, evaluation: JudgedEvaluation | JudgedDrift | None) -> None:
        """Check that an evaluation or a drift meets it. Raises DataError if its figures do not give its verdict. Raises
        TrustError: there is none, it compared other releases or with another margin or is not of days before and after
        the release, or it did not find the newest release worse."""
        what = f"the rollback of release {self.release}"
        if isinstance(evaluation, JudgedDrift):
            evaluation.require()
            until, since = evaluation.before.days[1], evaluation.after.days[0]
            if self.began is None or not until <= self.began < since or not evaluation.worse:
                reason = f"{what} was not prepared for this drift, or it shows nothing worse since the release"
                raise TrustError(reason, about="drift")
            return
        if evaluation is None:
            raise TrustError(f"{what} was prepared for a verdict, and has none", about="evaluation")
        evaluation.require()
        if self.adapters.get(evaluation.adapter) != (evaluation.newest, evaluation.previous):
            raise TrustError(f"{what} has an evaluation of other releases", about="evaluation")
        if evaluation.verdict.margin != self.margin:
            reason = f"{what} has an evaluation with margin {evaluation.verdict.margin:g}"
            raise TrustError(f"{reason}, and {self.margin:g} is signed", about="evaluation")
        if not evaluation.worse:
            raise TrustError(f"{what} has an evaluation that did not find it worse", about="evaluation")


@dataclass(frozen=True, slots=True)
class PreparedRollback:
    metadata: Metadata[Targets]
    condition: RollbackCondition
    release: Release
    files: Mapping[str, bytes]  # name → content, of those that are new


@dataclass(frozen=True, slots=True)
class PreparedRollbacks:
    """Keeps those of a repository, one for each channel that rolls a release out. Methods raise ConfigError if the
    channel's key is missing, and OSError if files cannot be written."""

    metadata: RoleMetadata
    served: TargetFiles

    @property
    def targets(self) -> TargetFiles:
        return TargetFiles(self.metadata.folder / PREPARED, MAX_RELEASE)

    def path(self, channel: str) -> Path:
        return self.metadata.folder / PREPARED / f"{channel}.json"

    def write(self, channel: str, signed: Targets) -> None:
        self.targets.folder.mkdir(mode=storage.PRIVATE_FOLDER, exist_ok=True)
        storage.replace(self.path(channel), self.metadata.prepare(channel, signed).to_bytes())

    def discard(self, channel: str) -> bool:
        existed = self.path(channel).exists()
        self.path(channel).unlink(missing_ok=True)
        shutil.rmtree(self.targets.folder / channel, ignore_errors=True)
        return existed

    def read(self, channel: str) -> tuple[Metadata[Targets], RollbackCondition] | None:
        """Read the metadata and their condition; None if no rollback is prepared. Raises TrustError if they are
        damaged, of another channel, or not signed by the channel's key."""
        path = self.path(channel)
        remedy = "delete it, and prepare the rollback again with 'edgeadapt release rollout … --key'"
        try:
            raw = storage.read(path, MAX_METADATA)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}", about=PREPARED) from error
        except DataError as error:
            raise TrustError(f"{error}; {remedy}", about=PREPARED) from error
        try:
            metadata: Metadata[Targets] = Metadata.from_bytes(raw)
            if not isinstance(metadata.signed, Targets):
                raise TrustError(f"{path} is of another role: {remedy}", about=PREPARED)
            self.metadata.load(Targets, TOP).verify_delegate(channel, metadata.signed_bytes, metadata.signatures)
        except (OSError, DataError, RepositoryError, ValueError, TypeError, KeyError) as error:
            reason = f"{path} is damaged, or not signed by the key of channel {channel}: {remedy}"
            raise TrustError(reason, about=PREPARED) from error
        condition = RollbackCondition.of(metadata.signed)
        if condition is None or any(not name.startswith(target(channel, "")) for name in metadata.signed.targets):
            raise TrustError(f"{path} is not a prepared rollback of channel {channel}: {remedy}", about=PREPARED)
        return metadata, condition

    def sign_again(
        self, channel: str, prepared: tuple[Metadata[Targets], RollbackCondition] | None, current: Release | None
    ) -> None:
        """Sign what ``read`` returned as the next metadata of a channel that has changed, if its release has not."""
        if prepared is not None and current is not None and prepared[1].release == current.number:
            self.write(channel, prepared[0].signed)
        else:
            self.discard(channel)

    def state(self, channel: str, current: Release) -> tuple[RollbackCondition | None, str]:
        """Return the condition of a rollback that can be published now; or None, and the reason."""
        try:
            return self.accept(channel, current).condition, ""
        except (ConfigError, DataError, TrustError, OSError) as error:
            return None, str(error)

    def accept(self, channel: str, current: Release) -> PreparedRollback:
        """Verify the prepared rollback of a channel with the release ``current``. Raises as ``read``, and ConfigError
        if none is prepared or it is out of date."""
        remedy = "prepare it with 'edgeadapt release rollout … --key'"
        read = self.read(channel)
        if read is None:
            raise ConfigError(f"no rollback of channel {channel} is prepared: {remedy}", about=PREPARED)
        metadata, condition = read
        signed, version = metadata.signed, self.metadata.version(channel)
        if signed.version != version + 1 or condition.release != current.number:
            what = f"it is version {signed.version} of channel {channel}, which has {version}"
            reason = f"the prepared rollback was used already or is out of date ({what}): {remedy}"
            raise ConfigError(reason, about=f"{PREPARED}.version")
        if signed.is_expired(self.metadata.now):
            reason = f"the prepared rollback of channel {channel} expired on {signed.expires:%Y-%m-%d}: {remedy}"
            raise ConfigError(reason, about=f"{PREPARED}.expired")
        new = {}
        try:
            for path, listed in signed.targets.items():
                name, digest = path.removeprefix(target(channel, "")), listed.hashes["sha256"]
                kept = self.targets.path(channel, name, digest)
                if kept.is_file() or not self.served.path(channel, name, digest).is_file():
                    new[name] = storage.read(kept, MAX_RELEASE)
                    listed.verify_length_and_hashes(new[name])
            release = Release.decode(new[RELEASE])
        except (OSError, RepositoryError, DataError, TrustError, KeyError) as error:
            reason = f"a file of the prepared rollback of channel {channel} is missing or altered ({error}): {remedy}"
            raise TrustError(reason, about=PREPARED) from error
        return PreparedRollback(metadata, condition, release, new)
