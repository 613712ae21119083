"""Run the jobs of a suite in processes of their own, each on one thread, until nothing is left.

A process that is killed, or an interruption, loses at most the jobs under way.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from aggregation.errors import DataError
from simulations.suite.plan import Suite
from simulations.suite.schedule import Job, pending, ready
from simulations.suite.store import Store

ENDED = {"ended": True}  # a worker's last message
LOGS = "logs"

Message = dict[str, Any]
Show = Callable[[float, float, list[str]], None]  # work done, work left, and what the workers do, a line each


@dataclass(slots=True)
class _Worker:
    """One process, and the job that it has."""

    number: int
    process: "subprocess.Popen[str]"
    log: Path
    job: Job | None = None
    notes: str = ""

    def assign(self, job: Job) -> None:
        trial = job.trial
        table = json.loads(trial.scenario.model_dump_json())
        line = json.dumps({"kind": trial.kind.value, "scenario": table, "rounds": job.rounds})
        assert self.process.stdin is not None  # noqa: S101  # it is a pipe
        self.job, self.notes = job, ""
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it was killed before it read: ``_await`` says so
            with suppress(BrokenPipeError):  # of what is not written, which Python would complain about at its end
                self.process.stdin.close()

    def line(self) -> str:
        what = "" if self.job is None else f"{self.job.label}: {'rounds ' if self.job.rounds else ''}{self.notes}"
        return what.rstrip(": ")


@dataclass(slots=True)
class _Pool:
    """The processes of a suite. They end with this one, whatever ends it."""

    folder: Path
    messages: "SimpleQueue[tuple[_Worker, Message]]" = field(default_factory=SimpleQueue)
    workers: list[_Worker] = field(default_factory=list)

    def start(self) -> _Worker:
        log = self.folder / LOGS / f"worker-{len(self.workers) + 1}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as errors:
            process = subprocess.Popen(  # noqa: S603  # our own module
                [sys.executable, "-m", "simulations.suite.worker", str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for this process, which ends the others
            )
        worker = _Worker(len(self.workers) + 1, process, log)
        self.workers.append(worker)
        Thread(target=self._listen, args=(worker,), daemon=True).start()
        return worker

    def stop(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.wait()

    def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None  # noqa: S101  # it is a pipe
        for line in worker.process.stdout:
            self.messages.put((worker, json.loads(line)))
        self.messages.put((worker, ENDED))


def execute(suite: Suite, store: Store, jobs: int, show: Show) -> None:
    """Run all jobs that are left.

    Args:
        suite: Its settings.
        store: Its folder.
        jobs: Processes at the same time.
        show: Called after each change.

    Raises:
        ConfigError, DataError: An arm's search found nothing, or a process ended with an error.
    """
    pool, done = _Pool(store.path), 0.0
    try:
        while True:
            running = {worker.job.key for worker in pool.workers if worker.job is not None}
            waiting = [job for job in ready(suite, store) if job.key not in running]
            for job in waiting[: jobs - len(running)]:
                idle = next((worker for worker in pool.workers if worker.job is None), None)
                (idle or pool.start()).assign(job)
            left = sum(job.weight for job in pending(suite, store))
            _show_all(show, done, left, pool)
            if all(worker.job is None for worker in pool.workers):
                return
            finished = _await(pool, partial(_show_all, show, done, left, pool))
            assert finished.job is not None  # noqa: S101  # it has reported it
            done += finished.job.weight
            finished.job = None
    finally:
        pool.stop()


def _show_all(show: Show, done: float, left: float, pool: _Pool) -> None:
    show(done, left, [worker.line() for worker in pool.workers if worker.job is not None])


def _await(pool: _Pool, changed: Callable[[], None]) -> _Worker:
    """The next worker that finishes its job.

    Raises:
        DataError: A process ended with an error, or was killed.
    """
    while True:
        worker, message = pool.messages.get()
        if message.get("done"):
            return worker
        if "note" in message:
            worker.notes = message["note"]
            changed()
            continue
        label = worker.job.label if worker.job else "starting"
        reason = message.get("failed") or f"its process ended with code {worker.process.wait()}"
        raise DataError(
            f"{label}: {reason}; see {worker.log}, and continue with --resume (with fewer --jobs if memory is short)",
            about="--jobs",
        )
