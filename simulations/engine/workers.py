"""Processes that work at the same time, each on one thread: for the devices of a simulation, or the jobs of a suite.

A process holds an object, and works on the calls to it one after the other. What it logs comes back with the outcome.
The first process imports the libraries, and the others are forked from it before anything runs in it, so that they
share that memory. They exchange Python's objects over pipes that nobody else can open; one ends at once when the other
end of its pipe is closed. Each device belongs to one process, which holds its state and gives it its requests in the
order in which they were sent. So a run makes the same adapters with any number of processes."""

import logging
import logging.handlers
import multiprocessing
import os
import queue
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any, Self

import torch
from flwr.app import Context, Message

from aggregation.errors import EdgeAdaptError
from aggregation.steps import Step
from client.node.statedir import DeviceStateDir
from client.training.trainer import FrozenBase
from coordinator.transport import identify
from edgeadapt.bases.base import Base
from edgeadapt.formats.storage import kill_safe
from simulations.engine.devices import LyingApp, MemoryDevices
from simulations.engine.grid import FaultModel, GridLog, InProcessGrid, context_of

DEVICE_LOG = "edgeadapt.device"
METHODS = ("forkserver", "spawn")  # of starting a process, the first that the system has
AT_A_TIME = 8  # requests
TORCH_ENGINE = "client.training.torchengine"  # imports transformers and peft

Notify = Callable[[str], None]  # takes what is done at the moment, in a few words


class WorkerKilledError(BaseException):
    """Is raised when a process has ended. It is not an ``Exception``, which the coordinator blames on the device."""


class Process:
    """Runs one process. A thread sends it one call after the other, and waits for the outcome of each. ``make`` gives
    the object, in the process; it can be pickled. ``log``: a file for what the process prints. ``libraries``: modules
    that the first process imports for all."""

    def __init__(self, make: Callable[[Notify], Any], log: Path | None = None, libraries: Sequence[str] = ()) -> None:
        method = next(each for each in METHODS if each in multiprocessing.get_all_start_methods())
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            own = make.func.__module__ if isinstance(make, partial) else __name__
            context.set_forkserver_preload([__name__, own, *libraries])
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, log), daemon=True)
        self._process.start()
        theirs.close()  # or the end of the process would not end the connection
        self._thread = ThreadPoolExecutor(1)

    def call(self, what: Callable[..., Any], *given: object, note: Notify = lambda text: None) -> "Future[Any]":
        """Call ``what`` with the object and the arguments, in the process. ``note`` is called with what the object
        notifies of. The outcome raises what was raised in the process, and ``WorkerKilledError`` if that has ended."""
        return self._thread.submit(self._exchange, what, given, note)

    def close(self) -> int | None:
        """End the process, if it has not ended, and return its exit code."""
        self._process.kill()  # what it has not written is not needed
        self._thread.shutdown(cancel_futures=True)
        self._process.join()
        self._connection.close()
        code: int | None = self._process.exitcode
        return code

    def _exchange(self, what: Callable[..., Any], arguments: Sequence[object], note: Notify) -> Any:
        try:
            self._connection.send((what, arguments))
            while isinstance(answer := self._connection.recv(), str):
                note(answer)
        except (EOFError, OSError) as error:
            raise WorkerKilledError from error
        outcome, records = answer
        for record in records:
            logger = logging.getLogger(record.name)
            if logger.isEnabledFor(record.levelno) and logger.hasHandlers():  # or Python prints it on standard error
                logger.handle(record)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def _serve(connection: Connection, make: Callable[[Notify], Any], log: Path | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends this one
    if log:
        with log.open("ab") as file:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(1)
    identify()
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    logger = logging.getLogger(DEVICE_LOG)
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.handlers.QueueHandler(records))
    calls: queue.SimpleQueue[tuple[Callable[..., Any], Sequence[object]]] = queue.SimpleQueue()
    Thread(target=_receive, args=(connection, calls), daemon=True).start()
    held = make(connection.send)
    with kill_safe():
        while True:
            what, arguments = calls.get()
            try:
                outcome = what(held, *arguments)
            except Exception as error:  # for the process that asked
                outcome = error
                if log:
                    traceback.print_exc()
            connection.send((outcome, [records.get() for _ in range(records.qsize())]))


def _receive(connection: Connection, calls: "queue.SimpleQueue[tuple[Callable[..., Any], Sequence[object]]]") -> None:
    while True:
        try:
            calls.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # nobody waits for the call under way


@dataclass(frozen=True, slots=True)
class Fleet:
    folder: Path  # in which each device has its state directory, under its name
    base: FrozenBase
    nodes: Mapping[int, str]  # node → name of its device
    attack: str = "none"  # the kind of the lie of the devices that lie, ``liars``
    liars: frozenset[str] = frozenset()
    plain: bool = False  # whether the rounds have no masks

    def state_dir(self, name: str) -> DeviceStateDir:
        return DeviceStateDir.open(self.folder / name)


class Workers:
    """Starts ``number`` processes of the devices and ends them, as a context manager. ``prepare`` is called with the
    names of the devices that are about to be asked, and makes what is missing of them. Raises EdgeAdaptError at the end
    of the block, about ``--workers``, if a process was killed."""

    def __init__(
        self, number: int, fleet: Fleet, prepare: Callable[[Sequence[str]], object] = lambda names: None
    ) -> None:
        self._prepare = prepare
        libraries = [TORCH_ENGINE] if type(fleet.base) is Base else []  # takes seconds to import
        self._workers = [Process(partial(_Answering, fleet), libraries=libraries) for _ in range(number)]
        self._worker_of = {node: self._workers[k % number] for k, node in enumerate(sorted(fleet.nodes))}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for worker in self._workers:
            worker.close()
        if isinstance(error, WorkerKilledError):
            text = "a process of the devices was killed, as happens where memory runs out: continue with --resume, and"
            raise EdgeAdaptError(f"{text} with fewer --workers", about="--workers") from error

    def answer(self, requests: Sequence[Message]) -> list[Callable[[], Message]]:
        """Let devices work on requests. Returns functions that wait for the answers (``Process.call``), in that order.
        A process gets some requests at a time, or the exchange would take longer than the answers to short ones."""
        mine: dict[Process, list[int]] = {}
        for place, request in enumerate(requests):
            mine.setdefault(self._worker_of[request.metadata.dst_node_id], []).append(place)
        answers: dict[int, Callable[[], Message]] = {}
        for worker, places in mine.items():
            for some in (places[at : at + AT_A_TIME] for at in range(0, len(places), AT_A_TIME)):
                outcome = worker.call(_Answering.answer, [requests[place] for place in some])
                answers |= {place: partial(_nth, outcome, nth) for nth, place in enumerate(some)}
        return [answers[place] for place in range(len(requests))]

    def before(self, step: Step | None, names: Sequence[str]) -> None:
        self._prepare(names)
        self._all(_Answering.before, step, names)

    def write(self) -> None:
        self._all(_Answering.write)

    def _all(self, what: Callable[..., Any], *given: object) -> None:
        for outcome in [worker.call(what, *given) for worker in self._workers]:
            outcome.result()


class WorkerGrid(InProcessGrid):
    """Lets its devices (``devices``: node → name) work in other processes, from the moment when they are asked."""

    def __init__(
        self, workers: Workers, devices: Mapping[int, str], faults: FaultModel, log: GridLog | None = None
    ) -> None:
        super().__init__(_never, devices, faults, workers.before, log)
        self._workers = workers

    def _begin(self, requests: Sequence[Message]) -> list[Callable[[], Message]]:
        return self._workers.answer(requests)


def _nth(outcome: "Future[list[Message]]", nth: int) -> Message:
    return outcome.result()[nth]


def _never(request: Message, context: Context) -> Message:
    raise AssertionError("the devices work in other processes")


class _Answering:
    def __init__(self, fleet: Fleet, notify: Notify) -> None:
        self._fleet, self._devices = fleet, MemoryDevices(fleet.state_dir, fleet.base, fleet.plain)
        self._app = LyingApp(fleet.attack, fleet.liars, self._devices.open)
        self._contexts: dict[int, Context] = {}

    def answer(self, requests: Sequence[Message]) -> list[Message]:
        return [self._app(request, self._context(request.metadata.dst_node_id)) for request in requests]

    def _context(self, node: int) -> Context:
        return self._contexts.setdefault(node, context_of(node, self._fleet.nodes[node]))

    def before(self, step: Step | None, names: Sequence[str]) -> None:
        self._devices.before(step, names)

    def write(self) -> None:
        self._devices.write()
