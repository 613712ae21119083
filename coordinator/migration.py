"""A migration: a federation goes on from another frozen base, if it answers its devices' examples as well there.

Every step is a round of a kind that there is, or a version that no round makes (``VersionManifest.begins_after``):

1. *before*: a round of training on the old base, whose sum has the accuracy of the version that it begins with;
2. the first version on the new base is published above the old ones;
3. *head*: one sum of second moments under the new base fits its head;
4. *training*: rounds of training, the first of which has the accuracy of that head;
5. *after*: one more, with the accuracy of what they made, which is the version to release;
6. if that is below the one before by more than the margin, the newest old version is published again above the others.

Which steps are done follows from the registry alone, so an interrupted migration goes on with the round that is next.
A device without the new base refuses the offer, and is in none of these sums."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import takewhile
from pathlib import Path

from aggregation.errors import ConfigError, EdgeAdaptError
from coordinator.app import lead
from coordinator.registry import Registry
from coordinator.seed import read_seed, seed_version
from coordinator.settings import SETTINGS, FederationSettings
from coordinator.statedir import HEADER, CoordinatorStateDir
from coordinator.transport import Grid
from edgeadapt.bases.base import LEXICAL, LONGEST, Base, OwnModel, find_base
from edgeadapt.formats import jsontext, storage
from edgeadapt.formats.layout import Layout
from edgeadapt.formats.manifest import RoundRecord, VersionManifest
from edgeadapt.methods.parts import Part
from edgeadapt.rounds import optimizer
from edgeadapt.rounds.analytic import AnalyticTask, ClassifierHead
from edgeadapt.rounds.federatedmethods import METHODS
from edgeadapt.rounds.sums import DECIMALS, MINIMUM_HELD_OUT

ACCURACY = "accuracy"  # metric
SLACK = 1e-9  # of a difference between two rounded accuracies


class WorseBaseError(EdgeAdaptError):
    exit_code = 6


class MigrationStep(StrEnum):
    BEFORE = "before"
    HEAD = "head"
    TRAINING = "training"
    AFTER = "after"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a migration leads. ``settings``: those of the federation on the new base, written once it is accepted."""

    manifest: VersionManifest  # of the first version on the new base, as ``seed_version`` makes it
    blob: bytes
    settings: FederationSettings
    rounds: int  # of training, at least 1
    margin: float  # how far the accuracy after may be below that before


@dataclass(frozen=True, slots=True)
class MigrationRound:
    """Describes a round of a migration. ``devices``: connected when it ended; those without the base are not among its
    survivors."""

    step: MigrationStep
    record: RoundRecord
    devices: int


@dataclass(frozen=True, slots=True)
class MigrationResult:
    """Says what a migration found: accuracies on held-out examples of the devices, as sums have them. ``version``: the
    one that ``after`` is of; ``old``: the newest on the old base. ``between``: of the fitted head."""

    version: int
    old: int
    before: float
    seed: float
    between: float
    after: float
    worse: bool

    def require(self) -> None:
        """Check that the new base is good enough. Raises WorseBaseError."""
        if self.worse:
            text = f"the new base is worse: accuracy {self.after:.2f} after, {self.before:.2f} before; the federation "
            raise WorseBaseError(f"{text}is on the old base again, and nothing was released", about="accuracy")


def read_target(
    state_dir: CoordinatorStateDir, base: str, folder: Path, settings: FederationSettings, rounds: int, margin: float
) -> Target:
    """Read where a migration leads: the first adapter on ``base`` that peft saved in ``folder``. Raises as
    ``seed_version`` and ``check``."""
    newest, frozen = state_dir.registry.newest_adapter().manifest, find_base(base)
    if isinstance(frozen, OwnModel):
        raise ConfigError(f"model {base} has no embeddings, to which a head is fitted: name another base", about="base")
    tensors, config, labels = read_seed(folder, None)
    if tuple(labels) != newest.labels:
        text = f"{folder} has other labels than version {newest.version}, or in another order: make it with phrases of "
        raise ConfigError(f"{text}these labels, in their order", about="labels")
    manifest, blob = seed_version(tensors, config, labels, frozen.digest)
    _require_width(frozen, folder, Layout.of(tensors))
    return Target(manifest, blob, settings, rounds, margin)


def _require_width(base: Base, folder: Path, layout: Layout) -> None:
    """Check that an adapter's head reads the embeddings of a base. Raises ConfigError; DataError: it has no head."""
    config = jsontext.decode(storage.read(base.folder / "config.json", LONGEST["config.json"]))
    width, head = config.get("hidden_size", 0) + config.get(LEXICAL, 0), ClassifierHead.of(layout)
    if width != head.hidden:
        text = f"{folder} is of a base with embeddings of {head.hidden} numbers, and {base.folder} gives {width}: make "
        raise ConfigError(f"{text}it with 'edgeadapt base start' on that base", about="--peft")


def check(state_dir: CoordinatorStateDir, to: Target) -> None:
    """Check that a federation can migrate. Raises ConfigError: the registry began on this base, sums have no accuracy
    or no moments, or devices keep the head to themselves."""
    settings = to.settings
    if not to.manifest.labels:
        raise ConfigError("a language model has no head that a sum fits: begin a new federation", about="labels")
    if settings.privacy.noisy or state_dir.settings.privacy.noisy:
        text = "sums with noise have no accuracy, by which a migration is judged: begin a new federation on the base, "
        raise ConfigError(f"{text}and compare releases with 'edgeadapt coordinator evaluate'", about="privacy")
    if Part.HEAD in METHODS[settings.method].private or Part.HEAD not in METHODS[settings.method].shared:
        text = f"method {settings.method} keeps heads on the devices, and a migration fits one to a sum: "
        raise ConfigError(f"{text}set another method", about="method")
    settings.task(to.manifest)  # its method may not train such an adapter
    with_rounds(settings, 0, 1, analytic=True)  # groups have no analytic head
    begun = _begun(state_dir.registry, to.manifest.base_digest)
    if begun and begun[0].version == 0:
        raise ConfigError("the federation has been on this base from version 0 on: name another one", about="base")
    used = {version.manifest.sha256 for version in state_dir.registry.versions()}
    if not begun and to.manifest.sha256 in used:
        text = "devices have trained from this first adapter before, and do not begin with it again: make another one "
        raise ConfigError(f"{text}with 'edgeadapt base start --seed'", about="--peft")


def migrate(leader: CoordinatorStateDir, grid: Grid, to: Target) -> Iterator[MigrationRound]:
    """Do the steps that are left, and yield each round once it is committed. ``result`` then says what was found.
    ``leader``: as of ``coordinator.app.lead``. Raises as that and ``check``; EdgeAdaptError: a round was aborted, or
    its sum has no accuracy, or is known to have none before it is asked for. Repeat the call to go on."""
    check(leader, to)
    if MigrationStep.BEFORE in left(leader.registry, to):
        _require_held_out(leader, len([*grid.get_node_ids()]))
        (before,) = _rounds(leader, grid, leader.settings, [MigrationStep.BEFORE])
        newest = leader.registry.newest_adapter().manifest
        _accuracy(newest)
        _publish(leader, newest, to.manifest, to.blob)  # at once: what is measured is what the new base has to reach
        yield before
    if MigrationStep.HEAD in left(leader.registry, to):
        yield from _rounds(leader, grid, to.settings, [MigrationStep.HEAD])
    if steps := left(leader.registry, to):
        yield from _rounds(leader, grid, to.settings, steps)


def left(registry: Registry, to: Target) -> list[MigrationStep]:
    begun = _begun(registry, to.manifest.base_digest)
    done = [_fits_head(each) for each in begun if each.plan is not None]
    first = [] if begun else [MigrationStep.BEFORE]
    head = [] if any(done) else [MigrationStep.HEAD]
    training = [MigrationStep.TRAINING] * to.rounds + [MigrationStep.AFTER]
    return [*first, *head, *training[done.count(False) :]]


def result(registry: Registry, to: Target) -> MigrationResult:
    """Say what a migration found, all of whose rounds were done. Raises EdgeAdaptError: a sum has no accuracy."""
    seed, *made = _begun(registry, to.manifest.base_digest)
    head = next(each for each in made if _fits_head(each))
    trained = [each for each in made if not _fits_head(each)]
    old = registry.version(seed.version - 1).manifest
    before, after = _accuracy(old), _accuracy(trained[to.rounds])
    worse = after < before - to.margin - SLACK
    version = trained[to.rounds].version - 1
    return MigrationResult(version, old.version, before, _accuracy(head), _accuracy(trained[0]), after, worse)


def take_back(leader: CoordinatorStateDir) -> VersionManifest:
    """Publish the newest version on the base before the newest one again, above the others, and return it. Raises
    ConfigError: the registry has one base."""
    manifests = [version.manifest for version in leader.registry.versions()]
    newest = manifests[-1]
    old = next((each for each in reversed(manifests) if each.base_digest != newest.base_digest), None)
    if old is None:
        raise ConfigError(f"{leader.folder} has versions on one base: there is nothing to take back", about="base")
    _publish(leader, newest, old, leader.registry.blob(old.version))
    return leader.registry.newest_adapter().manifest


def conclude(leader: CoordinatorStateDir, to: Target) -> MigrationResult:
    """Accept the new base, or publish the old version again if the new base is worse. Raises as ``result``."""
    found, done = result(leader.registry, to), len(leader.registry.rounds())
    if found.worse:
        take_back(leader)
    else:
        table = to.settings.model_dump(mode="json") | {"rounds": max(to.settings.rounds, done)}
        settings = FederationSettings.parse(table, SETTINGS)
        storage.replace(leader.folder / SETTINGS, HEADER + settings.to_toml().encode(), storage.PUBLIC)
    return found


def with_rounds(settings: FederationSettings, done: int, count: int, *, analytic: bool) -> FederationSettings:
    """Return settings whose next ``count`` rounds, after those that are ``done``, are of one kind. Raises ConfigError:
    the federation has groups, and the rounds are of the analytic head."""
    table = settings.model_dump(mode="json")
    table["rounds"] = done + count
    table["analytic"]["rounds"] = count if analytic else 0
    table["evaluation"]["rounds"] = table["observation"]["rounds"] = table["discovery"]["rounds"] = 0
    table["evaluation"]["every"] = 0
    return FederationSettings.parse(table, SETTINGS)


def _rounds(
    leader: CoordinatorStateDir, grid: Grid, settings: FederationSettings, steps: list[MigrationStep]
) -> Iterator[MigrationRound]:
    done, analytic = len(leader.registry.rounds()), steps[0] is MigrationStep.HEAD
    running = replace(leader, settings=with_rounds(settings, done, len(steps), analytic=analytic))
    for step, record in zip(steps, lead(running, grid), strict=True):
        yield MigrationRound(step, record, len([*grid.get_node_ids()]))
        if record.aborted:
            text = f"round {record.round}, {step.value}, was aborted: {record.aborted}"
            raise EdgeAdaptError(f"{text}; repeat the command to go on", about="round")


def _require_held_out(leader: CoordinatorStateDir, devices: int) -> None:
    """Check, before a round is spent, that ``devices`` may have the held-out examples that an accuracy takes. Nobody
    but a sum knows how many they have: at most a weight cap each, and too few if the newest round's sum, of as many
    devices, has no accuracy. Raises EdgeAdaptError."""
    settings, newest = leader.settings, leader.registry.newest_adapter().manifest
    asked = min(devices, settings.cohort.size or devices)
    needed = f"an accuracy takes {MINIMUM_HELD_OUT} held-out examples of all devices together"
    if asked * settings.aggregation.weight_cap < MINIMUM_HELD_OUT:
        text = f"{needed}, and {asked} devices count at most {settings.aggregation.weight_cap} each: let more take part"
        raise EdgeAdaptError(f"{text}, or raise aggregation.weight_cap", about="accuracy")
    summed = newest.plan is not None and newest.privacy is None  # a sum with noise has none, however many there are
    if summed and ACCURACY not in newest.metrics and asked <= len(newest.survivors):
        text = f"{needed}, and the {len(newest.survivors)} of round {newest.round} had fewer: let more than these take"
        raise EdgeAdaptError(f"{text} part, or do a round with 'coordinator run' once they have more", about="accuracy")


def _publish(leader: CoordinatorStateDir, newest: VersionManifest, manifest: VersionManifest, blob: bytes) -> None:
    moved = replace(
        manifest,
        version=newest.version + 1,
        parent=newest.sha256,
        round=len(leader.registry.rounds()),
        plan=None,
        rule=None,
        combination=None,
        survivors=(),
        metrics={},
        privacy=newest.privacy,
    )
    leader.transcripts.finish()  # an open log would seem to have begun with it
    leader.require_lead()
    leader.registry.publish(moved, blob, leader.key)


def _begun(registry: Registry, base: str) -> list[VersionManifest]:
    manifests = [version.manifest for version in registry.versions()]
    return [*takewhile(lambda each: each.base_digest == base, reversed(manifests))][::-1]


def _fits_head(manifest: VersionManifest) -> bool:
    return manifest.rule is not None and optimizer.of_rule(manifest.rule) == AnalyticTask.RULE


def _accuracy(manifest: VersionManifest) -> float:
    """Return the accuracy of the version from which a round made this one. Raises EdgeAdaptError: there is none."""
    if ACCURACY not in manifest.metrics:
        text = f"the sum of round {manifest.round} has no accuracy, which takes {MINIMUM_HELD_OUT} held-out examples"
        raise EdgeAdaptError(f"{text} of all devices together: let more devices take part", about="accuracy")
    return round(manifest.metrics[ACCURACY], DECIMALS)
