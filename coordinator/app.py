"""The coordinator's Flower ServerApp: opens the home that the run configuration names, runs its rounds on any grid."""

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from aggregation.errors import ConfigError
from coordinator.rounds import federate
from coordinator.statedir import CoordinatorStateDir
from coordinator.wire import Clock, SystemClock, Wire

STATE = "coordinator-state"  # key of the run configuration: the coordinator's folder

log = logging.getLogger("edgeadapt.coordinator")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds that are still to do."""
    _show_log()
    folder = context.run_config.get(STATE)
    if not isinstance(folder, str) or not folder:
        raise ConfigError(f"the run configuration needs {STATE!r}: the coordinator's folder")
    state_dir = CoordinatorStateDir.open(Path(folder))
    # A simulated grid brings its own time, which does not wait.
    clock: Clock = getattr(grid, "clock", None) or SystemClock()
    for record in federate(state_dir, Wire(grid, clock, state_dir.settings.deadline)):
        log.info(
            "round %d of %d: %s",
            record.round,
            state_dir.settings.rounds,
            record.aborted or f"{len(record.survivors)} survivors, {len(record.dropped)} lost",
            extra={"record": record, "rounds": state_dir.settings.rounds},
        )


def _show_log() -> None:
    """Write the log to Flower's stream of the run, unless whoever runs this already listens."""
    if not log.hasHandlers():
        parent = logging.getLogger("edgeadapt")
        parent.addHandler(logging.StreamHandler())
        parent.setLevel(logging.INFO)
