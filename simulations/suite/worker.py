"""A process that computes jobs of a suite: ``python -m simulations.suite.worker FOLDER``.

It reads a job from each line of standard input and writes messages to standard output, each a line of JSON:
``{"note": …}`` while it works, then ``{"done": true}`` or ``{"failed": …}``. When its input ends, because the suite was
interrupted or killed, it ends at once.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from aggregation.errors import EdgeAdaptError
from simulations.scenario import Scenario
from simulations.suite.measure import compute, compute_rounds
from simulations.suite.plan import Trial
from simulations.suite.settings import Kind
from simulations.suite.store import Store


def work(job: dict[str, Any], store: Store, notify: Callable[[str], None]) -> None:
    """Compute the rounds of a trial, or what comes after them, and keep the outcome.

    An error of the scenario, such as a training that diverges, is an outcome: it ends this trial only.
    """
    trial = Trial(Kind(job["kind"]), Scenario.parse(job["scenario"], "a suite"))
    try:
        if job["rounds"]:
            compute_rounds(trial, store, notify)
        else:
            store.put(trial, compute(trial, store, notify))
    except EdgeAdaptError as error:
        store.put(trial, str(error))


def _lines(jobs: "SimpleQueue[dict[str, Any]]") -> None:
    for line in sys.stdin:
        jobs.put(json.loads(line))
    os._exit(0)  # nobody waits for the job under way


def _main() -> None:
    torch.set_num_threads(1)
    store, out, jobs = Store(Path(sys.argv[1])), sys.stdout, SimpleQueue[dict[str, Any]]()
    Thread(target=_lines, args=(jobs,), daemon=True).start()

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no message
        while True:
            job = jobs.get()
            try:
                work(job, store, lambda note: send({"note": note}))
            except Exception as error:
                send({"failed": f"{type(error).__name__}: {error}"})
                raise
            send({"done": True})


if __name__ == "__main__":
    _main()
