"""``edgeadapt device update`` and ``usage``, and ``edgeadapt bundle list``: the commands on a device's bundle."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, EdgeAdaptError
from client.cli import options
from edgeadapt import commandline

if TYPE_CHECKING:
    from client.inference.library import Library


@click.command()
@commandline.bundle()
@options.trust
@commandline.as_json
def adapters(bundle: Path, trust: Path | None, as_json: bool) -> None:
    """List and verify the adapters of a bundle. An adapter that fails verification is listed with the reason.

    \b
    Example:
      edgeadapt bundle list --bundle runs/demo/bundle
    """
    from client.inference.library import Library

    library = Library.open(bundle, trust)
    rows = [_verified(library, name) for name in library.names()]
    if as_json:
        click.echo(json.dumps({"adapters": rows}, ensure_ascii=False, default=dict))
    else:
        for adapter in rows:
            click.echo(_described(adapter))
    if refused := [adapter["name"] for adapter in rows if "refused" in adapter]:
        reason = f"{len(refused)} of {len(rows)} adapters failed verification: {', '.join(refused)}; copy them again"
        raise DataError(reason, about="bundle.adapters")


def _verified(library: "Library", name: str) -> dict[str, Any]:
    try:
        manifest = library.trust.adapter(name, library.base).manifest
    except EdgeAdaptError as error:
        return {"name": name, "refused": str(error)}
    return {
        "name": name,
        "kind": "global" if manifest.parent is None else "personal",
        "version": manifest.version,
        "format": manifest.format,
        "rank": manifest.rank,
        "bytes": manifest.size,
        "privacy": asdict(manifest.privacy) if manifest.privacy else None,
        "card": manifest.card,
        "sha256": manifest.sha256,
        "labels": list(manifest.labels),
    }


def _described(adapter: dict[str, Any]) -> str:
    if "refused" in adapter:
        return f"{adapter['name']}  refused: {adapter['refused']}"
    privacy = f"{_privacy(adapter['privacy'])}  " if adapter["kind"] == "global" else ""
    labels = f"{len(adapter['labels'])} labels  " if adapter["labels"] else ""
    card = f"\n  {adapter['card']}" if adapter["card"] else ""
    return (
        f"{adapter['name']}  {adapter['kind']}  version {adapter['version']}  {adapter['format']}  "
        f"rank {adapter['rank']}  {labels}{privacy}{adapter['bytes']:,} bytes  {adapter['sha256'][:12]}{card}"
    )


def _privacy(bound: dict[str, float] | None) -> str:
    if bound is None:
        return click.style("privacy none", bold=True)
    return f"epsilon {bound['epsilon']:.2f} for delta {bound['delta']:g}"


@click.command()
@commandline.bundle()
@options.trust
@click.option("--repository", metavar="URL|DIR", help="The repository's public folder. Needed once, with the next two.")
@click.option("--channel", metavar="NAME", help="The channel to follow, such as stable.")
@click.option("--root", type=commandline.FILE, metavar="FILE", help="root.json of the repository, to pin.")
@click.option("--language", metavar="CODE", help="The device's language, such as de, for rollouts; needed once.")
@click.option("--keep-adapters", type=click.IntRange(1), metavar="MIB", help="Hold so many; fetch others when used.")
@commandline.as_json
def update(
    bundle: Path,
    trust: Path | None,
    repository: str | None,
    channel: str | None,
    root: Path | None,
    language: str | None,
    keep_adapters: int | None,
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
    from client.updates import ChannelSource, follow
    from client.updates import update as bring

    if any((repository, channel, root, keep_adapters)):
        if repository is None or channel is None or root is None:
            raise click.UsageError("name --repository, --channel and --root together")
        follow(bundle, ChannelSource(repository, channel, keep_adapters and keep_adapters * 2**20), root)

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


@click.command()
@commandline.bundle()
@click.option("--on", "on", is_flag=True, help="Count answers from now on.")
@click.option("--texts", is_flag=True, help="With --on: also keep the texts, for 'device ask --next'.")
@click.option("--erase", "gone", is_flag=True, help="Delete counts and texts, and keep nothing from now on.")
@click.option("--since", type=click.DateTime(["%Y-%m-%d"]), metavar="DATE", help="Show the days from DATE on.")
@commandline.as_json
def usage(bundle: Path, on: bool, texts: bool, gone: bool, since: Any, as_json: bool) -> None:
    """Show what this device counts of its own answers, which no text is a part of; by default it counts nothing.

    Counted are answers of 'infer', 'chat' and edgeadapt.load by label, probability, unknown tokens, latency and adapter
    (of a language model by the last two), and corrections, for each of the last 62 days, encrypted next to the bundle.
    Only if policy.observations is set in device.toml, a round of observation takes shares of these counts, of past days
    and with noise, and nothing else.

    With --on --texts, a classifier's device also keeps the last 2000 texts that it was asked, encrypted as well: none
    with personal data or a secret that is recognised, and none leaves it.

    \b
    Examples:
      edgeadapt device usage --bundle phone/bundle --on
      edgeadapt device usage --bundle phone/bundle --on --texts
      edgeadapt device usage --bundle phone/bundle --since 2026-12-01
      edgeadapt device usage --bundle phone/bundle --erase
    """
    from client.inference.usage import EPOCH, KEPT, Usage, day_of, today
    from client.learning.questions import AskedTexts
    from edgeadapt.rounds.observation import described

    _switch(bundle, on, texts, gone)
    first = (since.date() - EPOCH).days if since else today() - KEPT
    found, asked = Usage.read(bundle), AskedTexts.read(bundle)
    days = [one for one in found.days if one.day >= first] if found else []
    if as_json:
        rows = [{"day": str(day_of(one.day)), "counts": dict(one.counts)} for one in days]
        click.echo(
            json.dumps(
                {"counting": found is not None, "texts": asked and len(asked.texts), "days": rows}, ensure_ascii=False
            )
        )
        return
    if found is None:
        click.echo("this device counts none of its answers: --on begins")
        return
    if asked:
        click.echo(f"{len(asked.texts)} texts are kept, for 'device ask --next'")
    if not days:
        click.echo("nothing was counted yet" if since is None else f"nothing was counted since {since.date()}")
    for one in days:
        click.echo(f"{day_of(one.day)}  {one.counts.get('lessons/answered', 0)} answers")
        for key, count in sorted(one.counts.items()):
            click.echo(f"  {options.printable(described(key))}  {count}")


def _switch(bundle: Path, on: bool, texts: bool, gone: bool) -> None:
    if on and gone:
        raise ConfigError("--on counts answers and --erase ends that: give one of them", about="--on")
    if texts and not on:
        raise ConfigError("--texts keeps what is asked from now on: give it with --on", about="--texts")
    from client.inference.usage import Usage
    from client.learning import questions

    if texts:
        questions.begin(bundle)
    if on:
        Usage.begin(bundle)
    if gone:
        for kind in (Usage, questions.AskedTexts):
            kind.erase(bundle)
