"""``edgeadapt device policy`` and ``forget``: the commands on a device's state directory."""

import json
import math
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import click

from aggregation.errors import ConfigError
from client.cli import options
from edgeadapt import commandline

WIDTH = 18
FORGETTING = (
    "The coordinator can then show this device a different past, and repeat rounds that it took part in. Parts of an "
    "adapter that the device trained and kept to itself are deleted, and may be shared later."
)


@click.command()
@options.state_dir
@commandline.as_json
def policy(state_dir: Path, as_json: bool) -> None:
    """Print the policy in force, from [policy] in device.toml; * marks a limit that differs from its default.

    Below are the conditions of [eligibility] with what is read now; - marks one that is not met. The last line says
    what this device's contributions may have revealed, as the epsilon of differential privacy, and what the limit
    leaves.

    \b
    Example:
      edgeadapt device policy --state kitchen
    """
    from client.node.eligibility import conditions
    from client.node.policy import PolicySettings
    from client.node.privacyledger import PrivacyLedger
    from client.node.readings import SYSTEM
    from client.node.statedir import DeviceStateDir

    opened = DeviceStateDir.open(state_dir)
    limits, ledger = opened.settings.policy, opened.load(PrivacyLedger) or PrivacyLedger()
    values = limits.model_dump(mode="json")
    spent = ledger.spent.epsilon(limits.delta)
    defaults = PolicySettings().model_dump(mode="json")
    demanded = conditions(opened, SYSTEM, datetime.now().astimezone())
    eligible = all(condition.met for condition in demanded)
    left = max(0.0, limits.maximum_epsilon - spent) if limits.maximum_epsilon else None
    if as_json:
        changed = [key for key in values if values[key] != defaults[key]]
        finite = spent if math.isfinite(spent) else None
        account = {"epsilon": finite, "left": left, "noisy": ledger.noisy, "bare": ledger.bare}
        eligibility = {"eligible": eligible, "conditions": [asdict(condition) for condition in demanded]}
        shown = {"policy": values, "changed": changed, "privacy": account, "eligibility": eligibility}
        click.echo(json.dumps(shown))
        return
    for key, value in values.items():
        mark = " " if value == defaults[key] else "*"
        click.echo(f"{mark} {key:{WIDTH}} {json.dumps(value)}")
        click.echo(f"    {PolicySettings.model_fields[key].description}")
    if demanded:
        click.echo("eligible now" if eligible else "not eligible now")
    for condition in demanded:
        click.echo(f"{' ' if condition.met else '-'} {condition.name:{WIDTH}} {condition.reading}")
    of = f" of {limits.maximum_epsilon:g}, {left:.2f} left," if left is not None else ""
    bare = f", and {ledger.bare} without noise, which nothing bounds" if ledger.bare else ""
    click.echo(f"spent: epsilon {spent:.2f}{of} for delta {limits.delta:g} by {ledger.noisy} contributions{bare}")


@click.command()
@options.state_dir
@click.option("--yes", is_flag=True, help="Do not ask.")
@commandline.as_json
def forget(state_dir: Path, yes: bool, as_json: bool) -> None:
    """Leave the session, and delete what this device remembers of the coordinator: its log, the last adapter, the
    parts of adapters that it trained without sharing them, and what it computed of its texts.

    For a coordinator that lost its transcripts or its newest adapters, or whose rounds failed too often while they were
    unmasked: the device refuses its offers or plans, because they contradict what it remembers. Or to share such parts
    from then on, trained again.

    \b
    Example:
      edgeadapt device forget --state kitchen
    """
    from client.node.statedir import DeviceStateDir

    opened = DeviceStateDir.open(state_dir)
    if not yes and not confirmed(FORGETTING):
        raise ConfigError("nothing was deleted: the answer was no", about="--yes")
    with opened.locked():
        opened.forget()
    line = "deleted; this device accepts the coordinator's next offer as its first"
    commandline.print_result({"forgotten": str(state_dir)}, line, as_json)


def confirmed(consequences: str) -> bool:
    try:
        return click.confirm(f"{consequences} Continue?", err=True)
    except click.Abort as error:
        if isinstance(error.__context__, EOFError):
            raise ConfigError("standard input is closed, so nobody can confirm: give --yes", about="--yes") from None
        raise
