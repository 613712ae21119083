"""``edgeadapt simulate``, and ``demo``, which ``edgeadapt.program`` mounts. A command is imported when it is called."""

import click

from edgeadapt.commandline import LazyGroup

# command → (module, attribute, one line for --help, extra that it needs)
COMMANDS = {
    "run": ("simulations.cli.simulate", "simulate", "Run a scenario, from population to report.", "simulations"),
    "migrate": ("simulations.cli.simulate", "migrate", "Move a run's fleet to another base.", "simulations"),
    "look": ("simulations.cli.look", "look", "Show clients, sizes, labels; or list what is shipped.", "simulations"),
    "suite": ("simulations.cli.simulate", "suite", "Compare arms of a scenario on several seeds.", "simulations"),
    "privacy": ("coordinator.cli.privacy", "privacy", "Print noise and epsilon for sizes of a cohort.", "coordinator"),
}

__all__ = ["simulate_group"]


@click.command("simulate", cls=LazyGroup, table=COMMANDS)
def simulate_group() -> None:
    """Run federations on this machine: what does each client get alone, and what together?

    \b
    Examples:
      edgeadapt simulate run texts.csv --set data.client=user
      edgeadapt simulate look
      edgeadapt simulate suite households.toml --seeds 3
      edgeadapt simulate privacy --numbers 50000 --set privacy.mechanism=skellam --set privacy.epsilon=8
    """
