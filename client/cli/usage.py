"""``edgeadapt device usage``: what a device counts of its own answers, and keeps of what it was asked."""

import json
from pathlib import Path
from typing import Any

import click

from aggregation.errors import ConfigError
from client.cli.options import printable
from client.inference.usage import EPOCH, KEPT, Usage, day_of, today
from client.learning import questions
from edgeadapt import commandline
from edgeadapt.rounds.observation import described


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
    _switch(bundle, on, texts, gone)
    first = (since.date() - EPOCH).days if since else today() - KEPT
    found, asked = Usage.read(bundle), questions.AskedTexts.read(bundle)
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
            click.echo(f"  {printable(described(key))}  {count}")


def _switch(bundle: Path, on: bool, texts: bool, gone: bool) -> None:
    if on and gone:
        raise ConfigError("--on counts answers and --erase ends that: give one of them", about="--on")
    if texts and not on:
        raise ConfigError("--texts keeps what is asked from now on: give it with --on", about="--texts")
    if texts:
        questions.begin(bundle)
    if on:
        Usage.begin(bundle)
    if gone:
        for kind in (Usage, questions.AskedTexts):
            kind.erase(bundle)
