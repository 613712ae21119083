"""``edgeadapt device update``: bring a bundle to the current release of the channel that it follows."""

import json
from pathlib import Path

import click

from aggregation.entropy import SystemEntropy
from client.cli import options
from client.updates import ChannelSource, follow
from client.updates import update as bring
from edgeadapt import commandline


@click.command()
@commandline.bundle()
@options.trust
@click.option("--repository", metavar="URL|DIR", help="The repository's public folder. Needed once, with the next two.")
@click.option("--channel", metavar="NAME", help="The channel to follow, such as stable.")
@click.option("--root", type=commandline.FILE, metavar="FILE", help="root.json of the repository, to pin.")
@click.option("--language", metavar="CODE", help="The device's language, such as de, for rollouts; needed once.")
@commandline.as_json
def update(
    bundle: Path,
    trust: Path | None,
    repository: str | None,
    channel: str | None,
    root: Path | None,
    language: str | None,
    as_json: bool,
) -> None:
    """Bring the bundle in DIR to the release that its channel has for this device. Private adapters stay.

    The first call names the repository and pins its root; later calls need the bundle only. Nothing older, expired or
    not signed as the root demands is accepted, and whatever fails, the bundle in use stays. An interrupted update goes
    on with the files that it has. While a release is rolled out to a share of devices, the device itself determines
    whether it is one of them.

    \b
    Examples:
      edgeadapt device update --bundle kitchen/bundle --repository https://updates.example.org --channel stable \\
        --root root.json
      edgeadapt device update --bundle kitchen/bundle
    """
    named = (repository, channel, root)
    if any(named):
        if repository is None or channel is None or root is None:
            raise click.UsageError("name --repository, --channel and --root together")
        follow(bundle, ChannelSource(repository, channel), root)

    def note(name: str, size: int) -> None:
        click.echo(f"fetching {name}, {size:,} bytes", err=True)

    updated = bring(bundle, trust, note, language=language, entropy=SystemEntropy())
    release, source = updated.release, updated.source
    if as_json:
        row = {"channel": source.channel, "release": release.number, "made": release.made, "changed": updated.changed}
        aside = [str(path) for path in updated.set_aside]
        row |= {"adapters": release.adapters, "bytes": updated.fetched, "set_aside": aside}
        click.echo(json.dumps({**row, "chosen": updated.offer.chosen, "why": updated.offer.why}))
        return
    adapters = ", ".join(f"{name} {version}" for name, version in sorted(release.adapters.items()))
    state = f"{updated.fetched:,} bytes fetched" if updated.changed else "already there"
    click.echo(f"{source.channel}, release {release.number} of {release.made}: {adapters}; {state}")
    click.echo(updated.offer.why)
    for path in updated.set_aside:
        click.echo(f"set aside {path}: a private adapter for another base")
