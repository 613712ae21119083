"""``edgeadapt release``: which one a channel has, whether it is worse, and what follows."""

import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from aggregation.errors import ConfigError, EdgeAdaptError
from aggregation.pki.identity import IdentityKey
from edgeadapt import commandline, traces
from edgeadapt.cli.channel import name, open_repository, print_published, repository
from edgeadapt.commandline import FILE, FOLDER, FiniteRange, as_json, number_option, option, path_option, print_result
from edgeadapt.formats.bundle import TRUST
from edgeadapt.formats.keyfiles import read_key
from edgeadapt.formats.release import ALL
from edgeadapt.promotion import gates
from edgeadapt.promotion.evaluations import act, judge
from edgeadapt.releases.actions import GateResult
from edgeadapt.releases.prepared import RollbackCondition
from edgeadapt.releases.repository import ChannelRepository, Published
from edgeadapt.releases.rollback import prepare, require_signer, roll_back

language = option(
    "--language CODE", "Only devices with this language, such as de; may be repeated.", name="languages", multiple=True
)
vendor_key = path_option(
    "--key",
    "The vendor's key: sign the rollback now, for 'release watch' to publish if the release is worse.",
    name="key_file",
    type=FILE,
)
releases = path_option("--releases", "The repository of channels.", required=True, metavar="REPO")
trusted = path_option("--trust", "The coordinator's public key, PEM. Default: the one of DIR.")
adapter_name = commandline.adapter("adapter", "Which adapter of both releases.", default="global", show_default=True)


def share_of(meaning: str) -> commandline.Decorator:
    return click.option("--share", type=click.IntRange(0, ALL), default=ALL, metavar="PERCENT", help=meaning)


@click.command()
@repository
@click.argument("source", metavar="FROM")
@click.argument("channel", metavar="TO")
@path_option("--trust", "Keys that sign bundles, as devices pin them. Default: REPO/trust.pem.", type=FILE)
@share_of("Of devices that get the release; the others keep the one before. Default: all.")
@language
@vendor_key
@as_json
def promote(
    folder: Path,
    source: str,
    channel: str,
    trust: Path | None,
    share: int,
    languages: tuple[str, ...],
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Make the current release of channel FROM the next one of channel TO, if it passes the gates of REPO/gates.toml.

    Both releases are put together and run as on a device. Each gate's figure is printed and signed into the log, also
    of a promotion that is refused, which ends with exit code 6.

    With --share or --language it is rolled out in stages: go on with 'edgeadapt release rollout'. With --key, the
    rollback is signed at the same time and kept in REPO/prepared, where 'edgeadapt release watch' finds it.

    \b
    Examples:
      edgeadapt release promote releases canary stable
      edgeadapt release promote releases canary stable --share 10 --key vendor.key
    """
    opened = open_repository(folder)
    if not (folder / gates.GATES).is_file():
        reason = f"{folder} has no {gates.GATES}: write one with 'edgeadapt release init {folder}'"
        raise ConfigError(reason, about=gates.GATES)
    settings = gates.GateSettings.read(folder / gates.GATES)
    release, current = opened.release(source), opened.release(channel)
    if source == channel:
        raise ConfigError(f"FROM and TO are both {channel}: name two channels", about="channel")
    if release is None:
        raise ConfigError(f"channel {source} has no release to promote", about="channel")
    key = None if key_file is None else read_key(key_file)
    if key is not None:
        if share == ALL and not languages:
            raise ConfigError("a rollback is prepared for a rollout in stages: name --share too", about="--key")
        require_signer(opened, source, release, key.public)
    about: dict[str, Any] = {"source": source, "channel": channel, "release": release.number, "share": share}
    with traces.exporting(traces.GOVERNANCE), traces.span("promotion", **about):
        with tempfile.TemporaryDirectory(prefix=".promotion-", dir=folder) as work:  # there files can be linked
            keys = trust or folder / TRUST
            candidate = gates.AssembledRelease.of(opened, source, release, keys, Path(work) / "candidate")
            before = None
            if current is not None:
                before = gates.AssembledRelease.of(opened, channel, current, keys, Path(work) / "current")
            results = gates.PromotionTrial(settings, folder, candidate, before).results()
        if not as_json:
            for result in results:
                click.echo(f"{'passed' if result.passed else 'REFUSED'}  {result.gate}: {result.text}")
        if not all(result.passed for result in results):
            opened.refuse(source, release, channel, results)
            gates.require_passed(results, f"release {release.number} of {source}")
        with traces.span("publish"):
            published = opened.promote(source, release.number, channel, results, share=share, languages=languages)
    _print(published, results, as_json, _prepared(opened, channel, key, settings))


@click.command()
@repository
@name
@share_of("Of devices that get the release. Default: all, or all with the languages.")
@language
@vendor_key
@as_json
def rollout(
    folder: Path, channel: str, share: int, languages: tuple[str, ...], key_file: Path | None, as_json: bool
) -> None:
    """Change which devices get the release that CHANNEL rolls out. With all devices, the rollout is complete.

    Each device decides for itself, by a random number that never leaves it: one that is in at 10 % is in at 50 %. A
    device that has the release never goes back when the share shrinks; 'edgeadapt release rollback' takes it back.
    A rollback that is prepared is signed again by the channel's key; with --key, another one is prepared.

    \b
    Examples:
      edgeadapt release rollout releases stable --share 50
      edgeadapt release rollout releases stable --share 20 --language de --language fr
      edgeadapt release rollout releases stable --share 100
    """
    opened, key, settings = open_repository(folder), None if key_file is None else read_key(key_file), None
    release = opened.release(channel)
    if key is not None and release is not None:  # before anything is changed
        settings = gates.GateSettings.read(folder / gates.GATES)
        require_signer(opened, channel, release, key.public)
    published = opened.set_rollout(channel, share, languages, again=key is not None)
    _print(published, (), as_json, _prepared(opened, channel, key, settings))


@click.command()
@repository
@name
@number_option("--to", "Number of the release.", 1, name="number", required=True, metavar="N")
@path_option("--key", "The vendor's key, which signs bundles.", required=True, type=FILE)
@as_json
def rollback(folder: Path, channel: str, number: int, key: Path, as_json: bool) -> None:
    """Publish release N of CHANNEL again, its adapters signed under a version above all others. No gate is asked.

    Devices never go back to an older version: they get the old content as a new one, with their next update.

    \b
    Example:
      edgeadapt release rollback releases stable --to 3 --key vendor.key
    """
    opened, vendor = open_repository(folder), read_key(key)
    with traces.exporting(traces.GOVERNANCE), traces.span("rollback", channel=channel, again=number):
        published = roll_back(opened, channel, number, vendor)
    _print(published, (), as_json)


@click.command()
@click.argument("state_dir", type=FOLDER, metavar="DIR")
@name
@releases
@trusted
@adapter_name
@click.option("--once", is_flag=True, help="Look once, and end.")
@click.option("--dry-run", is_flag=True, help="Only say whether the release is worse; then the exit code is 6.")
@option(
    "--interval SECONDS", "Between two looks.", type=FiniteRange(min=0.1, max=86_400), default=60.0, show_default=True
)
@commandline.as_lines
def watch(
    state_dir: Path,
    channel: str,
    releases: Path,
    trust: Path | None,
    adapter: str,
    once: bool,
    dry_run: bool,
    interval: float,
    as_json: bool,
) -> None:
    """Roll CHANNEL back when the last evaluation of DIR finds the release that it rolls out worse than the one before.

    The rollback was signed when the rollout began, by 'edgeadapt release promote --key', so this machine needs no key
    but that of snapshot and timestamp in REPO/keys. Each verdict is signed into the log, from which
    'edgeadapt audit verify' computes it again. Without --once it goes on, and prints a line when something changes.

    The evaluation is a round that 'edgeadapt coordinator evaluate' adds. The release is worse if its accuracy is below
    by more than accuracy.margin of REPO/gates.toml with 95 % confidence. An evaluation for which a release was taken
    back already gives no verdict on another one.

    \b
    Examples:
      edgeadapt release watch fleet stable --releases releases
      edgeadapt release watch fleet stable --releases releases --once --json
      edgeadapt release watch fleet stable --releases releases --dry-run
    """
    if dry_run:
        _verdict(releases, state_dir, trust, channel, adapter, as_json)
        return
    with traces.exporting(traces.GOVERNANCE):
        last = ""
        while True:
            try:
                with traces.span("watch", channel=channel) as span:
                    step = act(open_repository(releases), state_dir, trust, channel, adapter)
                    span.set(outcome=step.outcome)
                row = {
                    "outcome": step.outcome,
                    "text": step.text,
                    "release": step.release and step.release.number,
                    "evaluation": step.evaluation and asdict(step.evaluation),
                }
                line, failed = json.dumps(row) if as_json else step.text, False
            except (EdgeAdaptError, OSError) as error:
                if once or not last:  # it was called wrongly
                    raise
                line, failed = json.dumps({"error": str(error)}) if as_json else f"edgeadapt: {error}", True
            if line != last:
                click.echo(line, err=failed)
            if once:
                return
            last = line
            time.sleep(interval)


@click.command()
@click.argument("state_dir", type=FOLDER, metavar="DIR")
@trusted
@as_json
def drift(state_dir: Path, trust: Path | None, as_json: bool) -> None:
    """Say whether the answers of the fleet of DIR have changed between its last two rounds of observation.

    'edgeadapt coordinator observe' adds such a round. Where nothing has changed, a change is found with a probability
    of 5 % at most. The exit code is 6 if the answers have changed.

    \b
    Example:
      edgeadapt release drift fleet
    """
    from edgeadapt.releases.drift import compare, observations
    from edgeadapt.releases.lineage import Lineage

    drifts = compare(*observations(each.manifest for each in Lineage.read(state_dir, trust, None).versions))
    print_result(drifts.row(), str(drifts), as_json)
    if drifts.changed:
        raise gates.GateError("the answers of the fleet have changed: look at what devices are asked", about="drift")


def _verdict(releases: Path, state_dir: Path, trust: Path | None, channel: str, adapter: str, as_json: bool) -> None:
    """Print the verdict on the release that a channel rolls out. Raises GateError: it is worse."""
    repository = open_repository(releases)
    repository.compared(channel, adapter)
    margin = gates.GateSettings.read(releases / gates.GATES).accuracy.margin
    evaluation, _ = judge(repository, state_dir, trust, channel, adapter, margin)
    row = {"round": evaluation.round, "metrics": evaluation.metrics, "worse": evaluation.worse}
    print_result(row | asdict(evaluation.verdict), str(evaluation), as_json)
    if evaluation.worse:
        reason = f"the newest release of {channel} is worse than the one before: take it back with "
        raise gates.GateError(f"{reason}'edgeadapt release rollback'", about="evaluation")


def _prepared(
    opened: ChannelRepository, channel: str, key: IdentityKey | None, settings: gates.GateSettings | None
) -> RollbackCondition | None:
    if key is not None and settings is not None and opened.rollout(channel) is not None:
        return prepare(opened, channel, key, settings.accuracy.margin, drift=settings.rollback_on_drift)
    prepared = opened.prepared.read(channel)
    return None if prepared is None else prepared[1]


def _print(
    published: Published, results: tuple[GateResult, ...], as_json: bool, ready: RollbackCondition | None = None
) -> None:
    rollout, lines = published.rollout, []
    if rollout is not None:
        lines.append(f"for {rollout}; release {rollout.previous} for the others")
        lines.append(f"rollback to release {ready.again}: prepared" if ready else "rollback: not prepared, name --key")
    row = {"gates": [asdict(each) for each in results], "rollout": rollout and asdict(rollout)}
    print_published(published, row | {"prepared": ready and asdict(ready)}, lines, as_json)
