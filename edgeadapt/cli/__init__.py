"""``edgeadapt adapters``: versions and their releases. A command is imported when it is called."""

import click

from edgeadapt.commandline import LazyGroup

HERE = "edgeadapt.cli"
# command → (module, attribute, one line for --help, extra that it needs)
COMMANDS = {
    "diff": (f"{HERE}.versions", "diff", "Compare two versions, tensor by tensor.", ""),
    "gates": (f"{HERE}.promotion", "gates", "Write gates.toml: what a promotion demands.", ""),
    "list": (f"{HERE}.versions", "list_", "List versions, with their rounds, metrics and channels.", ""),
    "promote": (f"{HERE}.promotion", "promote", "Give a channel another one's release, if it passes.", ""),
    "rollback": (f"{HERE}.promotion", "rollback", "Publish an earlier release again.", ""),
    "rollout": (f"{HERE}.promotion", "rollout", "Say which devices get the newest release.", ""),
    "sbom": (f"{HERE}.sbom", "sbom", "Print a version's software bill of materials.", "governance"),
    "show": (f"{HERE}.versions", "show", "Show what made a version, and where it is.", ""),
    "verdict": (f"{HERE}.promotion", "verdict", "Say whether a release that is rolled out is worse.", ""),
    "watch": (f"{HERE}.promotion", "watch", "Roll a channel back when an evaluation demands it.", ""),
}


@click.command("adapters", cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
def adapters() -> None:
    """Govern the versions of an adapter: DIR is a coordinator's state directory, REPO a repository of channels.

    See docs/how-to/govern-adapters.md.

    \b
    Example, start to end:
      edgeadapt adapters list fleet --releases releases
      edgeadapt adapters gates releases
      edgeadapt adapters promote releases canary stable --share 10 --key vendor.key
      edgeadapt adapters watch fleet stable --releases releases
      edgeadapt adapters rollout releases stable --share 100
      edgeadapt adapters rollback releases stable --to 1 --key vendor.key
    """
