"""The options that commands of ``edgeadapt bundle`` share, and how their values are read."""

import click

from aggregation.errors import ConfigError
from edgeadapt.commandline import number_option, path_option
from edgeadapt.formats.peftconfig import PeftConfig, require_gradients
from export.addition import PROFILE
from export.onnx.exported import ExportedBase

profiled = click.option("--profile", metavar="NAME", help=f"How weights of the base are stored. Default: {PROFILE}.")
signed_by = path_option(
    "--key", "Private key that signs; see 'key'.", name="key_file", required=True, metavar="KEY.pem"
)
from_registry = path_option("--registry", "A coordinator's state directory with a registry.", metavar="DIR")
from_folder = path_option("--peft", "A folder that peft saved.", name="peft_folder", metavar="DIR")
which = number_option(
    "--version", "Version. Default: the newest; of a PEFT folder the one after the bundle's.", 0, 2**63 - 1, metavar="N"
)
pinned = path_option(
    "--trust", "Public keys. Default: the registry's own, or trust.pem in the folder that holds the bundle."
)
the_policy = path_option("--policy", "What the bundle may answer from now on, TOML.")
the_card = path_option("--card", "Owner, purpose, data, license and languages, TOML.")
the_labels = path_option("--labels", "Of a PEFT folder: the labels of its head, one a line, in order.")


def learning(exported: ExportedBase, config: PeftConfig | None) -> str:
    """Complete a line about an exported base: whether devices can train it, or the adapter that it is for."""
    reason = exported.untrainable
    if config is not None and exported.gradients is not None:
        try:
            require_gradients(config)
        except ConfigError as error:
            reason = str(error)
    if reason:
        return f"\ndevices cannot train it without torch: {reason}"
    difference = exported.gradients
    return "" if difference is None else f", devices can train it (gradients {difference:.2g} from torch)"
