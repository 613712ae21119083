"""``edgeadapt adapters gates``, ``promote``, ``rollout`` and ``rollback``: which release a channel has."""

import json
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from adapters import storage
from adapters.bundle import TRUST
from adapters.keyfiles import read_key
from adapters.rollout import ALL
from adapters.settings import overridden
from aggregation.errors import ConfigError
from coordinator.channels.actions import GateResult, login_name
from coordinator.channels.repository import ChannelRepository, Published
from governance.gates import AssembledRelease, PromotionTrial, require_passed
from governance.gatesettings import GATES, HEADER, GateSettings

FOLDER = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)

repository = click.argument("folder", type=FOLDER, metavar="REPO")
language = click.option(
    "--language",
    "languages",
    multiple=True,
    metavar="CODE",
    help="Only devices with this language, such as de; may be repeated.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.command()
@repository
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A key of the file; may be repeated.")
def gates(folder: Path, overrides: tuple[str, ...]) -> None:
    """Write REPO/gates.toml, in which each key is explained: what a release must pass before it is promoted.

    \b
    Examples:
      edgeadapt adapters gates releases
      edgeadapt adapters gates releases --set accuracy.held_out=held-out.tsv --set accuracy.margin=0.02
    """
    _open(folder)
    path, settings = folder / GATES, GateSettings.parse(overridden({}, overrides), "--set")
    if path.exists():
        raise ConfigError(f"{path} is there already: edit it", about=GATES)
    storage.replace(path, HEADER + settings.to_toml().encode(), storage.PUBLIC)
    click.echo(f"{path}: edit it before a promotion")


@click.command()
@repository
@click.argument("source", metavar="FROM")
@click.argument("channel", metavar="TO")
@click.option(
    "--trust", type=FILE, metavar="FILE", help="Keys that sign bundles, as devices pin them. Default: REPO/trust.pem."
)
@click.option(
    "--share",
    type=click.IntRange(0, ALL),
    default=ALL,
    metavar="PERCENT",
    help="Of devices that get the release; the others keep the one before. Default: all.",
)
@language
@as_json
def promote(
    folder: Path,
    source: str,
    channel: str,
    trust: Path | None,
    share: int,
    languages: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make the current release of channel FROM the next one of channel TO, if it passes the gates of REPO/gates.toml.

    Both releases are put together and run as on a device. Each gate's figure is printed and signed into the log, also
    of a promotion that is refused, which ends with exit code 6.

    With --share or --language it is rolled out in stages: go on with 'edgeadapt adapters rollout'.

    \b
    Examples:
      edgeadapt adapters promote releases canary stable
      edgeadapt adapters promote releases canary stable --share 10
    """
    opened = _open(folder)
    if not (folder / GATES).is_file():
        raise ConfigError(f"{folder} has no {GATES}: write one with 'edgeadapt adapters gates {folder}'", about=GATES)
    settings = GateSettings.read(folder / GATES)
    release, current = opened.release(source), opened.release(channel)
    if release is None:
        raise ConfigError(f"channel {source} has no release to promote", about="channel", value=source)
    with tempfile.TemporaryDirectory(prefix=".promotion-", dir=folder) as work:  # there files can be linked
        keys = trust or folder / TRUST
        candidate = AssembledRelease.of(opened, source, release, keys, Path(work) / "candidate")
        before = (
            None if current is None else AssembledRelease.of(opened, channel, current, keys, Path(work) / "current")
        )
        results = PromotionTrial(settings, folder, candidate, before).results()
    if not as_json:
        for each in results:
            click.echo(f"{'passed' if each.passed else 'REFUSED'}  {each.gate}: {each.text}")
    if not all(each.passed for each in results):
        opened.refuse(source, release, channel, results)
        require_passed(results, f"release {release.number} of {source}")
    made = opened.promote(source, release.number, channel, results, share=share, languages=languages)
    _print(made, results, as_json)


@click.command()
@repository
@click.argument("channel", metavar="CHANNEL")
@click.option(
    "--share",
    type=click.IntRange(0, ALL),
    default=ALL,
    metavar="PERCENT",
    help="Of devices that get the release. Default: all, or all with the languages.",
)
@language
@as_json
def rollout(folder: Path, channel: str, share: int, languages: tuple[str, ...], as_json: bool) -> None:
    """Say anew which devices get the release that CHANNEL rolls out. With all devices, the rollout is complete.

    Each device decides for itself, by a random number that never leaves it: one that is in at 10 % is in at 50 %. A
    device that has the release never goes back when the share shrinks; 'edgeadapt adapters rollback' takes it back.

    \b
    Examples:
      edgeadapt adapters rollout releases stable --share 50
      edgeadapt adapters rollout releases stable --share 20 --language de --language fr
      edgeadapt adapters rollout releases stable --share 100
    """
    _print(_open(folder).set_rollout(channel, share, languages), (), as_json)


@click.command()
@repository
@click.argument("channel", metavar="CHANNEL")
@click.option("--to", "number", type=click.IntRange(min=1), required=True, metavar="N", help="Number of the release.")
@click.option("--key", type=FILE, required=True, metavar="FILE", help="The vendor's key, which signs bundles.")
@as_json
def rollback(folder: Path, channel: str, number: int, key: Path, as_json: bool) -> None:
    """Publish release N of CHANNEL again, its adapters signed under a version above all others. No gate is asked.

    Devices never go back to an older version: they get the old content as a new one, with their next update.

    \b
    Example:
      edgeadapt adapters rollback releases stable --to 3 --key vendor.key
    """
    _print(_open(folder).roll_back(channel, number, read_key(key)), (), as_json)


def _open(folder: Path) -> ChannelRepository:
    return ChannelRepository.open(folder, datetime.now(UTC), by=login_name())


def _print(made: Published, results: tuple[GateResult, ...], as_json: bool) -> None:
    release = made.release
    if as_json:
        row: dict[str, Any] = {"channel": made.channel, "release": release.number, "adapters": release.adapters}
        row |= {"files": release.files, "gates": [asdict(each) for each in results]}
        click.echo(json.dumps({**row, "rollout": made.rollout and asdict(made.rollout)}))
        return
    adapters = ", ".join(f"{name} {version}" for name, version in sorted(release.adapters.items()))
    click.echo(f"{made.channel}, release {release.number}: {adapters}; {len(release.files)} files")
    if made.rollout is not None:
        click.echo(f"for {made.rollout}; release {made.rollout.previous} for the others")
