"""``edgeadapt device``: enrolment of a device, and inference with a bundle. A command is imported when it is called."""

import click

from edgeadapt.commandline import LazyGroup

# command → (module, attribute, one line for --help, extra that it needs)
COMMANDS = {
    "enrol": ("client.cli.enrol", "enrol", "Create a device's state directory; certify its key, renew.", "gateway"),
    "run": ("client.cli.agent", "agent", "Take part through the coordinator's gateway.", "gateway"),
    "policy": ("client.cli.node", "policy", "Print the device's policy.", ""),
    "forget": ("client.cli.node", "forget", "Delete what the device remembers of the coordinator.", ""),
    "data": ("client.cli.data", "data", "Check, import or erase this device's examples.", ""),
    "infer": ("client.cli.infer", "infer", "Classify phrases, or continue texts.", ""),
    "chat": ("client.cli.chat", "chat", "Chat with the language model of a bundle.", ""),
    "index": ("client.cli.sources", "index", "Index own files for questions.", ""),
    "ask": ("client.cli.sources", "ask", "Find passages of own files, or texts worth a label.", ""),
    "learn": ("client.cli.learn", "learn", "Learn corrections on this device, or undo that.", ""),
    "personalize": ("client.cli.learn", "personalize", "Make a private adapter from this device's examples.", ""),
    "usage": ("client.cli.bundles", "usage", "Count answers on this device, show or erase the counts.", ""),
    "update": ("client.cli.bundles", "update", "Bring a bundle to the release of its channel.", ""),
    "serve": ("client.cli.serve", "serve", "Answer many tenants by HTTP, each with its adapters.", "serve"),
    "web": ("client.cli.serve_web", "serve_web", "Serve a page that runs a bundle in the browser.", ""),
}

__all__ = ["device"]


@click.command(cls=LazyGroup, table=COMMANDS)
def device() -> None:
    """Enrol a device, and run a bundle on it: classify phrases, or chat.

    The public keys that may sign a bundle are pinned in trust.pem, in the folder that contains the bundle.
    """
