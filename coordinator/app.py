"""The coordinator's Flower ServerApp: opens the state directory that the run configuration names, and runs its rounds.
The grid may be Flower's own or a simulated one."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError
from coordinator.launch import GATEWAY as GATEWAY
from coordinator.launch import JSON
from coordinator.launch import STATE as STATE
from coordinator.registry.lease import LOOK
from coordinator.rounds import federate
from coordinator.runstate import Need, Stopped
from coordinator.statedir import CoordinatorStateDir
from coordinator.transport import Clock, Transport
from edgeadapt import traces
from edgeadapt.commandline import JsonLines
from edgeadapt.formats.manifest import RoundRecord

log = logging.getLogger("edgeadapt.coordinator")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    _show_log(as_json=bool(context.run_config.get(JSON)))
    folder = context.run_config.get(STATE)
    if not isinstance(folder, str) or not folder:
        reason = f"the run configuration needs {STATE!r}: the coordinator's state directory"
        raise ConfigError(reason, about=STATE)
    state_dir = CoordinatorStateDir.open(Path(folder))
    address = context.run_config.get(GATEWAY)
    try:
        with _named(str(context.run_id)), traces.exporting(traces.COORDINATOR), state_dir.leading() as leader:
            if not leader.has_rounds_left or not isinstance(address, str) or not address:
                conduct(leader, grid)
                return
            with await_grid(leader, address, grid) as whole:
                conduct(leader, whole)
    except Stopped as stopped:
        log.info("%s", stopped)


def conduct(state_dir: CoordinatorStateDir, grid: Grid) -> None:
    """Run the rounds that are still to do, like ``lead``."""
    for _ in lead(state_dir, grid):
        pass


class _RunFields(logging.Filter):
    """Adds to each line of a log the run, and the round that was named last."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self._run, self._round = run, None

    def filter(self, record: logging.LogRecord) -> bool:
        self._round = getattr(record, "round", self._round)
        record.run, record.round = self._run, self._round
        return True


@contextmanager
def _named(run: str) -> Iterator[None]:
    fields, handlers = _RunFields(run), {*logging.getLogger().handlers, *logging.getLogger("edgeadapt").handlers}
    for handler in handlers:
        handler.addFilter(fields)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(fields)


def over_gateway(state_dir: CoordinatorStateDir, address: str) -> Iterator[RoundRecord]:
    """Run the rounds that are still to do over a gateway at ``address`` in this process, and yield each record. It
    waits for enough devices first. There are none if another coordinator ran them meanwhile. Raises as ``run`` and
    ``serving``."""
    run = SystemEntropy().bytes(8).hex()
    with _named(run), traces.exporting(traces.COORDINATOR), state_dir.leading() as leader:
        if not leader.has_rounds_left:
            return
        with await_grid(leader, address) as grid:
            yield from lead(leader, grid)


@contextmanager
def await_grid(leader: CoordinatorStateDir, address: str, flower: Grid | None = None) -> Iterator[Grid]:
    """Serve a gateway at ``address`` while the block runs, which begins once enough devices are there, with those of
    ``flower``'s SuperNodes."""
    from coordinator.gateway.grid import JoinedGrid, serving  # a coordinator without a gateway needs no gRPC services

    needed = leader.settings.aggregation.minimum_devices

    def look(devices: int) -> None:
        leader.run.waits(Need.DEVICES, devices, needed)
        leader.require_goes_on()

    with serving(leader, address, own_process=flower is None) as light:
        grid = light if flower is None else JoinedGrid(flower, light)
        grid.await_devices(needed, look)
        yield grid


def run(state_dir: CoordinatorStateDir, grid: Grid) -> Iterator[RoundRecord]:
    """Run the rounds that are still to do, and yield the record of each one once it is committed. Raises
    EdgeAdaptError: another run uses the state directory, or as ``federate``."""
    with state_dir.leading() as leader:
        yield from lead(leader, grid)


def lead(leader: CoordinatorStateDir, grid: Grid) -> Iterator[RoundRecord]:
    """Run the rounds of a state directory from ``CoordinatorStateDir.leading``, like ``run``."""
    # A simulated grid has its own time, which does not wait.
    clock: Clock = getattr(grid, "clock", None) or Clock()
    if leader.lease is not None or leader.is_service:
        clock = LeaderClock(clock, leader.require_goes_on)
    yield from federate(leader, Transport(grid, clock, leader.settings.deadline))


@dataclass(frozen=True, slots=True)
class LeaderClock(Clock):
    """End the run of a coordinator once another one leads, or it is to stop. Everything that waits reads a clock."""

    clock: Clock
    require: Callable[[], None]  # raises

    def now(self) -> float:
        self.require()
        return self.clock.now()

    def sleep(self, seconds: float) -> None:
        end = self.now() + seconds
        while (left := end - self.now()) > 0:
            self.clock.sleep(min(LOOK, left))

    def wait(self, seconds: float) -> None:
        self.require()
        self.clock.wait(seconds)


def _show_log(*, as_json: bool) -> None:
    """Write the log to Flower's stream of the run, unless the process already has a handler for it."""
    if not log.hasHandlers():
        parent, handler = logging.getLogger("edgeadapt"), logging.StreamHandler()
        if as_json:
            handler.setFormatter(JsonLines())
        parent.addHandler(handler)
        parent.setLevel(logging.INFO)
