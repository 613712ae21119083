"""The command group `edgeadapt bench`. A command is imported when it is called."""

import click

from commandline import LazyGroup

# command → (module, attribute, one line for --help, extra that it needs)
COMMANDS = {
    "faults": ("simulations.cli.bench_faults", "faults", "Faults in a fleet's processes, and what they cost.", ""),
    "gateway": ("simulations.cli.bench_gateway", "gateway", "Rounds and load of the gateway for light devices.", ""),
    "ondevice": ("simulations.cli.bench_ondevice", "ondevice", "A language model against torch and llama.cpp.", ""),
    "privacy": ("simulations.cli.bench_privacy", "privacy", "Epsilon against accuracy, and what canaries find.", ""),
    "profile": ("simulations.cli.bench_profile", "profile", "Where a language model's time and memory go.", ""),
    "secagg": ("simulations.cli.bench_secagg", "secagg", "Secure aggregation against Flower's SecAgg+.", ""),
    "simulation": ("simulations.cli.bench_simulation", "simulation", "The engine against Flower's own.", ""),
    "training": ("simulations.cli.bench_training", "training", "Training without torch, against torch.", ""),
}


@click.command(cls=LazyGroup, table=COMMANDS)
def bench() -> None:
    """Compare this implementation with a named peer in one run."""
