"""``edgeadapt release``: releases for devices, by channel, in a repository of static files."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import click

from aggregation.entropy import SystemEntropy
from edgeadapt import commandline
from edgeadapt.commandline import FILE, FOLDER, as_json, print_result
from edgeadapt.formats import storage
from edgeadapt.releases.actions import login_name
from edgeadapt.releases.repository import ChannelRepository, Published, pinned_keys

ROOT = "root.json"  # in the repository's folder: what devices pin

repository = click.argument("folder", type=FOLDER, metavar="DIR")
name = click.argument("channel", metavar="CHANNEL")


@click.command()
@repository
@click.option("--channel", "names", multiple=True, metavar="NAME", help="Default: canary and stable. May be repeated.")
@as_json
def init(folder: Path, names: tuple[str, ...], as_json: bool) -> None:
    """Make a repository in the new folder DIR. Devices pin DIR/root.json.

    \b
    Examples:
      edgeadapt release init releases
      edgeadapt release init releases --channel stable --channel stable-de
    """
    chosen = {"channels": names} if names else {}
    made = ChannelRepository.create(folder, SystemEntropy(), _now(), **chosen, by=login_name())
    _write_root(folder, made)
    public, root = str(folder / "public"), str(folder / ROOT)
    line = f"channels {', '.join(made.channels)}; serve {public}; devices pin {root}"
    print_result({"channels": list(made.channels), "public": public, "root": root}, line, as_json)


@click.command()
@repository
@name
@commandline.bundle()
@click.option("--trust", type=FILE, metavar="FILE", help="Keys that sign bundles. Default: trust.pem next to it.")
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
    _print(_open(folder).publish(channel, bundle, pinned_keys(bundle, trust)), as_json)


@click.command()
@repository
@name
@as_json
def add(folder: Path, channel: str, as_json: bool) -> None:
    """Add a channel with a key of its own. A channel stable is protected from the start.

    \b
    Example:
      edgeadapt release add releases stable-de
    """
    _open(folder).add_channel(channel, SystemEntropy())
    print_result({"channel": channel}, f"channel {channel}", as_json)


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
    _open(folder).protect(channel, on=not off)
    line = f"channel {channel} is {'not ' if off else ''}protected"
    print_result({"channel": channel, "protected": not off}, line, as_json)


@click.command()
@repository
@click.option("--all", "everything", is_flag=True, help="Also root, targets and channels, with their keys.")
@as_json
def renew(folder: Path, everything: bool, as_json: bool) -> None:
    """Sign snapshot and timestamp again: to be called once a day, by a timer. Needs no key but theirs.

    Devices refuse a repository whose timestamp is older than a week, so that nobody can hold back a release for longer.

    \b
    Examples:
      edgeadapt release renew releases
      edgeadapt release renew releases --all
    """
    opened = _open(folder)
    opened.renew(everything=everything)
    _write_root(folder, opened)
    until = {role: expires for role, _, expires, _ in opened.metadata.roles()}
    line = "\n".join(f"{role:<12} until {expires:%Y-%m-%d}" for role, expires in until.items())
    print_result({"until": {role: expires.isoformat() for role, expires in until.items()}}, line, as_json)


@click.command()
@repository
@click.argument("role", metavar="ROLE|CHANNEL")
@as_json
def rotate(folder: Path, role: str, as_json: bool) -> None:
    """Replace the key of root, targets, snapshot (with timestamp) or a channel. Devices follow by themselves.

    The new key of a channel does not sign a rollback that is prepared: prepare it again.

    \b
    Example:
      edgeadapt release rotate releases stable
    """
    opened = _open(folder)
    discarded = opened.rotate(role, SystemEntropy())
    _write_root(folder, opened)
    remedy = f"prepare one again with 'edgeadapt release rollout {folder} {role} … --key'"
    line = f"{role} has a new key"
    if discarded:
        line += f"\nthe prepared rollback of channel {role} is discarded, since the old key signed it: {remedy}"
    print_result({"role": role, "discarded": discarded}, line, as_json)


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
    opened = _open(folder)
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
        adapters = ", ".join(f"{key} {version}" for key, version in sorted(found.adapters.items())) if found else ""
        text = f"release {found.number} of {found.made}: {adapters}" if found else "no release"
        click.echo(f"{each:<12} {text}{'; protected' if each in opened.protected else ''}")
        if rollout := rollouts[each]:
            click.echo(f"{'':<12} for {rollout}; release {rollout.previous} for the others")
            ready, problem = prepared[each]
            click.echo(f"{'':<12} {f'rollback to release {ready.again}: prepared' if ready else problem}")
    for role, version, expires, keys in roles:
        places = ", ".join(f"{path.name}{'' if path.is_file() else ' (not here)'}" for path in keys)
        late = " EXPIRED" if expires <= _now() else ""
        click.echo(f"{role:<12} version {version}, until {expires:%Y-%m-%d}{late}, key {places}")


def _open(folder: Path) -> ChannelRepository:
    return ChannelRepository.open(folder, _now(), by=login_name())


def _write_root(folder: Path, opened: ChannelRepository) -> None:
    storage.replace(folder / ROOT, opened.root(), storage.PUBLIC)


def _now() -> datetime:
    return datetime.now(UTC)


def _print(published: Published, as_json: bool) -> None:
    release = published.release
    if as_json:
        row = {"channel": published.channel, "release": release.number, "adapters": release.adapters}
        click.echo(json.dumps({**row, "files": release.files, "left_out": published.private}))
        return
    adapters = ", ".join(f"{key} {version}" for key, version in sorted(release.adapters.items()))
    click.echo(f"{published.channel}, release {release.number}: {adapters}; {len(release.files)} files")
    if published.private:
        click.echo(f"left out, because private: {', '.join(published.private)}")
