"""Processes that work for the devices of a simulation, each for its share of them: more than one core in the rounds.

Each device belongs to one process, which holds its state and gives it its requests in the order in which they were
sent. So a run makes the same adapters with any number of processes. What devices log comes back with their answers. The
first process imports the libraries, and the others are forked from it before anything runs in it, so that they share
that memory. Processes that belong together exchange Python's objects, over pipes that nobody else can open.
"""

import logging
import logging.handlers
import multiprocessing
import queue
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from flwr.app import Context, Message

from adapters.storage import kill_safe
from aggregation.errors import EdgeAdaptError
from aggregation.steps import Step
from client.node.statedir import DeviceStateDir
from client.training.trainer import FrozenBase
from simulations.engine.attackers import LyingApp
from simulations.engine.devices import MemoryDevices
from simulations.engine.grid import FaultModel, InProcessGrid, context_of, identify

DEVICE_LOG = "edgeadapt.device"
METHODS = ("forkserver", "spawn")  # of starting a process, the first that the system has


@dataclass(frozen=True, slots=True)
class Fleet:
    """What a worker process knows of the devices.

    Attributes:
        folder: In which each device has its state directory, under its name.
        base: Of all of them.
        nodes: Node → name of its device.
        attack: The kind of the lie of the devices that lie.
        liars: Their names.
    """

    folder: Path
    base: FrozenBase
    nodes: Mapping[int, str]
    attack: str = "none"
    liars: frozenset[str] = frozenset()

    def state_dir(self, name: str) -> DeviceStateDir:
        """The state directory of a device, which exists."""
        return DeviceStateDir.open(self.folder / name)


class WorkerKilledError(BaseException):
    """A process has ended. No ``Exception``: the coordinator takes one for a failure of the device, and goes on."""


class Workers:
    """A context manager that starts the processes and ends them.

    Args:
        number: Of processes, at least 1.
        fleet: The devices.
        prepare: Called with the names of the devices that are about to be asked: makes what is missing of them.

    Raises:
        EdgeAdaptError: At the end of the block, about ``--workers``: a process was killed.
    """

    def __init__(
        self, number: int, fleet: Fleet, prepare: Callable[[Sequence[str]], object] = lambda names: None
    ) -> None:
        method = next(each for each in METHODS if each in multiprocessing.get_all_start_methods())
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload([__name__])
        self._prepare = prepare
        self._workers = [_Process(context, fleet) for _ in range(number)]
        self._worker_of = {node: self._workers[k % number] for k, node in enumerate(sorted(fleet.nodes))}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.close()
        if isinstance(error, WorkerKilledError):
            raise EdgeAdaptError(
                "a process of the devices was killed, as happens where memory runs out: continue with --resume, and "
                "with fewer --workers",
                about="--workers",
            ) from error

    def answer(self, request: Message) -> Callable[[], Message]:
        """Let a device work on a request.

        Returns:
            A function that waits for the answer, called once. It raises what the device's process raised, and
            ``WorkerKilledError`` if that has ended.
        """
        return self._worker_of[request.metadata.dst_node_id].call(_Answering.answer, request)

    def before(self, step: Step | None, names: Sequence[str]) -> None:
        self._prepare(names)
        self._all(_Answering.before, step, names)

    def write(self) -> None:
        self._all(_Answering.write)

    def _all(self, what: Callable[..., Any], *given: object) -> None:
        for outcome in [worker.call(what, *given) for worker in self._workers]:
            outcome()


class WorkerGrid(InProcessGrid):
    """A grid whose devices work in other processes, from the moment when they are asked.

    Args:
        workers: The processes.
        devices: Node → name of its device.
        faults: Of the network.
    """

    def __init__(self, workers: Workers, devices: Mapping[int, str], faults: FaultModel) -> None:
        super().__init__(_never, devices, faults, workers.before)
        self._workers = workers

    def _begin(self, request: Message) -> Callable[[], Message]:
        return self._workers.answer(request)


def _never(request: Message, context: Context) -> Message:
    raise AssertionError("the devices work in other processes")


class _Process:
    """One process. A thread sends it one call after the other, and waits for the outcome of each."""

    def __init__(self, context: Any, fleet: Fleet) -> None:
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, fleet), daemon=True)
        self._process.start()
        theirs.close()  # or the end of the process would not end the connection
        self._thread = ThreadPoolExecutor(1)

    def call(self, what: Callable[..., Any], *given: object) -> Callable[[], Any]:
        return partial(_outcome, self._thread.submit(self._exchange, what, given))

    def close(self) -> None:
        self._process.kill()  # what it has not written is not needed
        self._thread.shutdown(cancel_futures=True)
        self._process.join()
        self._connection.close()

    def _exchange(self, what: Callable[..., Any], given: Sequence[object]) -> tuple[Any, list[logging.LogRecord]]:
        try:
            self._connection.send((what, given))
            found: tuple[Any, list[logging.LogRecord]] = self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerKilledError from error
        return found


def _outcome(exchanged: Future[tuple[Any, list[logging.LogRecord]]]) -> Any:
    found, records = exchanged.result()
    for record in records:
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
    if isinstance(found, Exception):
        raise found
    return found


class _Answering:
    """The devices in a worker process."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, self._devices = fleet, MemoryDevices(fleet.state_dir, fleet.base)
        self._app = LyingApp(fleet.attack, fleet.liars, self._devices.open)
        self._contexts: dict[int, Context] = {}

    def answer(self, request: Message) -> Message:
        node = request.metadata.dst_node_id
        context = self._contexts.setdefault(node, context_of(node, self._fleet.nodes[node]))
        return self._app(request, context)

    def before(self, step: Step | None, names: Sequence[str]) -> None:
        self._devices.before(step, names)

    def write(self) -> None:
        self._devices.write()


def _serve(connection: Connection, fleet: Fleet) -> None:
    """Work until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends this one
    torch.set_num_threads(1)
    identify()
    kept: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    logger = logging.getLogger(DEVICE_LOG)
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.handlers.QueueHandler(kept))
    devices = _Answering(fleet)
    with kill_safe():
        while True:
            try:
                what, given = connection.recv()
            except EOFError:
                return
            try:
                found = what(devices, *given)
            except Exception as error:  # for the process that asked
                found = error
            connection.send((found, [kept.get() for _ in range(kept.qsize())]))
