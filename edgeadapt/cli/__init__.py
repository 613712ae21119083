"""``edgeadapt release`` and ``edgeadapt audit``. A command is imported when it is called."""

import click

from edgeadapt.commandline import LazyGroup

HERE = "edgeadapt.cli"
# command → (module, attribute, one line for --help, extra that it needs)
RELEASE = {
    "init": (f"{HERE}.channel", "init", "Make a repository with gates, or add a channel.", ""),
    "publish": (f"{HERE}.channel", "publish", "Make a bundle the next release of a channel.", ""),
    "show": (f"{HERE}.channel", "show", "Show channels, releases, roles and keys.", ""),
    "renew": (f"{HERE}.channel", "renew", "Sign again what expires soon, or with a new key.", ""),
    "protect": (f"{HERE}.channel", "protect", "Let only promotions make a channel's releases.", ""),
    "promote": (f"{HERE}.promotion", "promote", "Give a channel another one's release, if it passes.", ""),
    "rollout": (f"{HERE}.promotion", "rollout", "Say which devices get the newest release.", ""),
    "rollback": (f"{HERE}.promotion", "rollback", "Publish an earlier release again.", ""),
    "watch": (f"{HERE}.promotion", "watch", "Roll a channel back when an evaluation demands it.", ""),
    "drift": (f"{HERE}.promotion", "drift", "Say whether a fleet's answers have changed.", ""),
    "versions": (f"{HERE}.versions", "versions", "List versions; show, compare or itemize one.", "governance"),
}
AUDIT = {
    "verify": (f"{HERE}.audit", "verify", "Check every session, or a repository of channels.", ""),
    "show": (f"{HERE}.audit", "show", "List the rounds, their survivors and dropouts.", ""),
}

__all__ = ["audit_group", "release_group"]


@click.command("release", cls=LazyGroup, table=RELEASE)
def release_group() -> None:
    """Release bundles to devices by channel: static files that any web server or folder carries.

    REPO is a repository of channels. REPO/public is what is served. REPO/keys are the keys of the roles: move those of
    root and targets away while they are not used. DIR is a coordinator's state directory, with the versions of an
    adapter. See docs/how-to/channels.md and docs/how-to/govern-adapters.md.

    \b
    Example, start to end:
      edgeadapt release init releases
      edgeadapt release publish releases canary --bundle runs/demo/bundle
      edgeadapt release promote releases canary stable --share 10 --key vendor.key
      edgeadapt release watch fleet stable --releases releases
      edgeadapt release rollout releases stable --share 100
      edgeadapt release rollback releases stable --to 1 --key vendor.key
      edgeadapt release versions fleet --releases releases
    """


@click.command("audit", cls=LazyGroup, table=AUDIT)
def audit_group() -> None:
    """Check from its transcripts that a coordinator followed the protocol, and what was done with its releases.

    \b
    Examples:
      edgeadapt audit verify runs/demo
      edgeadapt audit show runs/demo
    """
