"""``edgeadapt release``: releases for devices, by channel, in a repository of static files."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError
from edgeadapt import commandline
from edgeadapt.commandline import FILE, FOLDER, as_json, path_option, print_result
from edgeadapt.formats import storage
from edgeadapt.formats.release import CANARY, STABLE, Release
from edgeadapt.formats.settings import overridden
from edgeadapt.releases.actions import login_name
from edgeadapt.releases.repository import ChannelRepository, Published, pinned_keys

LONGEST = 2**16  # bytes of gates.toml that are read
ROOT = "root.json"  # in the repository's folder: what devices pin

repository = click.argument("folder", type=FOLDER, metavar="REPO")
name = click.argument("channel", metavar="CHANNEL")


@click.command()
@repository
@click.argument("names", nargs=-1, metavar="[CHANNEL]...")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A key of gates.toml; may be repeated.")
@as_json
def init(folder: Path, names: tuple[str, ...], overrides: tuple[str, ...], as_json: bool) -> None:
    """Make a repository in the new folder REPO, or add a CHANNEL to the one that is there. Devices pin REPO/root.json.

    A new one has the channels canary and stable, if none is named. Each has a key of its own, and stable is protected
    from the start. REPO/gates.toml, which explains each key, says what a release must pass before it is promoted:
    it is written unless somebody edited it. Its defaults refuse every release: edit it, or use --set.

    \b
    Examples:
      edgeadapt release init releases
      edgeadapt release init releases --set accuracy.held_out=held-out.tsv --set accuracy.margin=0.02
      edgeadapt release init releases stable-de
    """
    from edgeadapt.promotion.gates import GATES, HEADER, GateSettings

    gates, settings = folder / GATES, GateSettings.parse(overridden({}, overrides), "--set")
    edited = gates.exists() and storage.read(gates, LONGEST) != HEADER + GateSettings().to_toml().encode()
    if ChannelRepository.exists(folder):
        if edited and (overrides or not names):
            raise ConfigError(f"{gates} is there already: edit it, or name a CHANNEL to add", about=GATES)
        made = open_repository(folder)
        for channel in names:
            made.add_channel(channel, SystemEntropy())
    else:
        names = names or (CANARY, STABLE)
        made = ChannelRepository.create(folder, SystemEntropy(), datetime.now(UTC), names, by=login_name())
        _write_root(folder, made)
    if not edited:
        storage.replace(gates, HEADER + settings.to_toml().encode(), storage.PUBLIC)
    public, root = str(folder / "public"), str(folder / ROOT)
    line = f"channels {', '.join(made.channels)}; serve {public}; devices pin {root}; promotions pass {gates}"
    row = {"channels": list(made.channels), "public": public, "root": root, "gates": str(gates)}
    print_result(row, line, as_json)


@click.command()
@repository
@name
@commandline.bundle()
@path_option("--trust", "Keys that sign bundles. Default: trust.pem next to it.", type=FILE)
@as_json
def publish(folder: Path, channel: str, bundle: Path, trust: Path | None, as_json: bool) -> None:
    """Verify a bundle, and make it the next release of CHANNEL. Private adapters in it are left out.

    A release that devices would refuse, with an adapter older than that of the current one, is refused here, and any
    release of a protected channel, such as stable: for these there is 'edgeadapt release promote'.

    \b
    Examples:
      edgeadapt release publish releases canary --bundle runs/demo/bundle
      edgeadapt release publish releases canary --bundle bundle --trust vendor.pub.pem
    """
    published = open_repository(folder).publish(channel, bundle, pinned_keys(bundle, trust))
    left_out = [f"left out, because private: {', '.join(published.private)}"] if published.private else []
    print_published(published, {"left_out": published.private}, left_out, as_json)


@click.command()
@repository
@name
@click.option("--off", is_flag=True, help="Let publications make its releases again; the log notes it.")
@as_json
def protect(folder: Path, channel: str, off: bool, as_json: bool) -> None:
    """Let only promotions, which pass gates, make releases of CHANNEL from now on. Needs the key of targets.

    'edgeadapt release publish' then refuses, and an audit fails where somebody did it all the same.

    \b
    Examples:
      edgeadapt release protect releases stable-de
      edgeadapt release protect releases stable --off
    """
    open_repository(folder).protect(channel, on=not off)
    line = f"channel {channel} is {'not ' if off else ''}protected"
    print_result({"channel": channel, "protected": not off}, line, as_json)


@click.command()
@repository
@click.argument("role", metavar="[ROLE|CHANNEL]", required=False)
@click.option("--all", "everything", is_flag=True, help="Also root, targets and channels, with their keys.")
@click.option("--new-key", is_flag=True, help="Replace the key of ROLE or CHANNEL. Devices follow by themselves.")
@as_json
def renew(folder: Path, role: str | None, everything: bool, new_key: bool, as_json: bool) -> None:
    """Sign snapshot and timestamp again: to be called once a day, by a timer. Needs no key but theirs.

    Devices refuse a repository whose timestamp is older than a week, so that nobody can hold back a release for longer.

    ROLE is root, targets or snapshot (with timestamp). The new key of a channel does not sign a rollback that is
    prepared: prepare it again.

    \b
    Examples:
      edgeadapt release renew releases
      edgeadapt release renew releases --all
      edgeadapt release renew releases stable --new-key
    """
    if new_key != (role is not None) or (new_key and everything):
        raise ConfigError("--new-key goes with one ROLE or CHANNEL, and not with --all", about="--new-key")
    opened = open_repository(folder)
    if role is not None:
        discarded = opened.rotate(role, SystemEntropy())
        line, row = f"{role} has a new key", {"role": role, "discarded": discarded}
        if discarded:
            line += f"\nthe prepared rollback of channel {role} is discarded, since the old key signed it: prepare "
            line += f"one again with 'edgeadapt release rollout {folder} {role} … --key'"
    else:
        opened.renew(everything=everything)
        until = {role: expires for role, _, expires, _ in opened.metadata.roles()}
        line = "\n".join(f"{role:<12} until {expires:%Y-%m-%d}" for role, expires in until.items())
        row = {"until": {role: expires.isoformat() for role, expires in until.items()}}
    _write_root(folder, opened)
    print_result(row, line, as_json)


@click.command()
@repository
@as_json
def show(folder: Path, as_json: bool) -> None:
    """Show what each channel has, when each role's metadata expire, and which keys are here.

    Of a rollout it says for whom it is, and whether its rollback is prepared.

    \b
    Example:
      edgeadapt release show releases
    """
    opened = open_repository(folder)
    releases = {each: opened.release(each) for each in opened.channels}
    rollouts = {each: opened.rollout(each) for each in opened.channels}
    staged = {each: found for each, found in releases.items() if found and rollouts[each]}
    prepared = {each: opened.prepared.state(each, found) for each, found in staged.items()}
    roles = list(opened.metadata.roles())
    if as_json:
        row = {
            "channels": {each: found and json.loads(found.encode()) for each, found in releases.items()},
            "protected": sorted(opened.protected),
            "rollouts": {each: found and asdict(found) for each, found in rollouts.items()},
            "prepared": {
                each: {"condition": ready and asdict(ready), "problem": problem or None}
                for each, (ready, problem) in prepared.items()
            },
            "roles": {
                role: {
                    "version": version,
                    "expires": expires.isoformat(),
                    "keys": {str(path): path.is_file() for path in keys},
                }
                for role, version, expires, keys in roles
            },
        }
        click.echo(json.dumps(row))
        return
    for each, found in releases.items():
        text = f"release {found.number} of {found.made}: {_adapters(found)}" if found else "no release"
        click.echo(f"{each:<12} {text}{'; protected' if each in opened.protected else ''}")
        if rollout := rollouts[each]:
            click.echo(f"{'':<12} for {rollout}; release {rollout.previous} for the others")
            ready, problem = prepared[each]
            click.echo(f"{'':<12} {f'rollback to release {ready.again}: prepared' if ready else problem}")
    for role, version, expires, keys in roles:
        places = ", ".join(f"{path.name}{'' if path.is_file() else ' (not here)'}" for path in keys)
        late = " EXPIRED" if expires <= datetime.now(UTC) else ""
        click.echo(f"{role:<12} version {version}, until {expires:%Y-%m-%d}{late}, key {places}")


def open_repository(folder: Path) -> ChannelRepository:
    return ChannelRepository.open(folder, datetime.now(UTC), by=login_name())


def _write_root(folder: Path, opened: ChannelRepository) -> None:
    storage.replace(folder / ROOT, opened.root(), storage.PUBLIC)


def print_published(published: Published, more: dict[str, Any], lines: Iterable[str], as_json: bool) -> None:
    release = published.release
    row = {"channel": published.channel, "release": release.number, "adapters": release.adapters}
    text = f"{published.channel}, release {release.number}: {_adapters(release)}; {len(release.files)} files"
    print_result({**row, "files": release.files, **more}, "\n".join([text, *lines]), as_json)


def _adapters(release: Release) -> str:
    return ", ".join(f"{key} {version}" for key, version in sorted(release.adapters.items()))
