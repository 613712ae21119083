"""``edgeadapt device``: what a person does with a bundle on a device. A command is imported when it is called."""

import click

from lazygroup import LazyGroup

# command → (module, attribute, one line for --help, extra that it needs)
COMMANDS = {
    "adapters": ("client.cli.adapters", "adapters", "List the adapters of a bundle, each verified.", ""),
    "chat": ("client.cli.chat", "chat", "Talk to the language model of a bundle.", ""),
    "enrol": ("client.cli.enrol", "enrol", "Make this device's key, and ask the authority to certify it.", ""),
    "forget": ("client.cli.forget", "forget", "Start the memory of the coordinator's log anew.", ""),
    "infer": ("client.cli.infer", "infer", "Print the intent of each phrase, or continue a text.", ""),
    "install": ("client.cli.install", "install", "Take what the authority sends: certificate, revocations.", ""),
    "policy": ("client.cli.policy", "policy", "Print what this device demands of every offer.", ""),
    "serve-web": ("client.cli.serve_web", "serve_web", "Run a bundle in the browser: serve its page.", ""),
}


@click.command(cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
def device() -> None:
    """Inference on a device: verify a bundle, answer phrases, chat.

    The public keys that may sign a bundle are pinned in trust.pem, in the folder that holds the bundle.
    """
