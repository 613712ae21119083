"""The command `python -m benchmarks`, run in a checkout. A benchmark is imported when it is called."""

import click

from edgeadapt import program
from edgeadapt.commandline import LazyGroup

PROGRAM = "python -m benchmarks"
# command → (module, attribute, one line for --help, extra that it needs)
COMMANDS = {
    "faults": ("benchmarks.commands.faults", "faults", "Faults in a fleet's processes, and what they cost.", ""),
    "gateway": ("benchmarks.commands.gateway", "gateway", "Rounds and load of the gateway for light devices.", ""),
    "ondevice": ("benchmarks.commands.ondevice", "ondevice", "A language model against torch and llama.cpp.", ""),
    "privacy": ("benchmarks.commands.privacy", "privacy", "Epsilon against accuracy, and what canaries find.", ""),
    "profile": ("benchmarks.commands.profile", "profile", "Where a language model's time and memory go.", ""),
    "secagg": ("benchmarks.commands.secagg", "secagg", "Secure aggregation against Flower's SecAgg+.", ""),
    "simulation": ("benchmarks.commands.simulation", "simulation", "The engine against Flower's own.", ""),
    "training": ("benchmarks.commands.training", "training", "Training without torch, against torch.", ""),
}


@click.command(cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Compare this implementation with a named peer in one run."""


if __name__ == "__main__":
    program.main(bench, PROGRAM)
