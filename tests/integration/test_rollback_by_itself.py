"""A bad canary is taken off every device by itself, and a good one stays: real processes, and a clock of their checks.

The coordinator with its gateway, the agents of light devices, their timers and the machine that watches are processes.
The watching machine has the key of snapshot and timestamp and no other. The base is tiny.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from client.training.examples import Example, Split, in_split, read_examples, write_examples
from edgeadapt.bases.base import Base
from edgeadapt.releases.history import audit_repository
from export.bundle.sources import from_registry
from export.onnx.classifier import export_classifier
from export.onnx.exported import Profile
from export.onnx.slotted import with_mean_head
from tests.support.gateway import HOST, wait_until
from tests.support.hostile import audit_failures
from tests.support.rollout import NOISE, StagedFleet, louder, permuted, run
from tests.support.up import coordinator_of, going_up

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]  # test_evaluation.py does it in one process

ROOT = Path(__file__).parents[2]
DEVICES, HELD_OUT = 4, 60  # so many of each
INTERVAL = 1.0  # seconds between two checks of a device
LONG = 100.0  # seconds, on a machine that has other work
TIMER = """
import json, sys, time
from pathlib import Path
from aggregation.entropy import SystemEntropy
from client.updates import update
bundle, interval = Path(sys.argv[1]), float(sys.argv[2])
while True:
    began = time.time()
    release = update(bundle, entropy=SystemEntropy()).release.number
    print(json.dumps({"began": began, "ended": time.time(), "release": release}), flush=True)
    time.sleep(interval)
"""


class Process:
    """A process, and the JSON lines that it printed, each with the time of its arrival."""

    def __init__(self, *command: object) -> None:
        words = [sys.executable, *map(str, command)]
        self.lines: list[tuple[float, dict[str, Any]]] = []
        self.process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.errors: list[str] = []
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append((time.time(), json.loads(line)))

    def _read_errors(self) -> None:
        self.errors.extend(self.process.stderr or ())

    def await_line(self, found: Callable[[dict[str, Any]], bool]) -> float:
        """When the first line came that is so."""

        def come() -> list[float]:
            assert self.process.poll() is None, self.errors
            return [at for at, line in list(self.lines) if found(line)]

        try:
            wait_until(come, LONG)
        except AssertionError:
            print(self.lines[-3:], self.errors[-3:])
            raise
        return come()[0]

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(LONG)
        for reader in self._readers:
            reader.join(LONG)


@contextmanager
def running(*command: object) -> Iterator[Process]:
    process = Process(*command)
    try:
        yield process
    finally:
        process.end()


def evaluated(fleet: StagedFleet, folder: Path) -> None:
    """A round of evaluation by commands: 'evaluate', then 'up' until it is done."""
    run("coordinator", "evaluate", folder, "--releases", fleet.folder, "--channel", "stable")
    with going_up(folder) as up:
        assert up.wait() == 0, up.other


def test_a_bad_canary_is_off_every_device_at_its_next_check_without_a_person_and_a_good_one_stays(
    app_fleet_of: Callable[..., Any], tiny_base: Base
) -> None:
    exported = export_classifier(with_mean_head(tiny_base, ["query", "value"]), tiny_base, Profile.FP32, training=True)
    together = {"aggregation__ring_bits": 32, "aggregation__minimum_devices": DEVICES, "evaluation__most": HELD_OUT}
    together |= {"evaluation__noise_multiplier": NOISE}
    made = app_fleet_of(DEVICES, rounds=1, analytic__rounds=1, **together)
    made.federate(made.grid())
    for client in made.population.clients:
        path = made.state_dir(client.name).examples
        own = read_examples(path, len(made.population.labels))
        held_out = in_split(own, Split.VALIDATION)
        extra = [Example(f"{each.text} now", each.label, Split.VALIDATION) for each in held_out]
        write_examples(path, [*in_split(own, Split.TRAIN), *[*held_out, *extra][:HELD_OUT]])
    fleet = StagedFleet.of(made, exported)
    folder, port = coordinator_of(made)
    good = from_registry(folder, 1, None)
    fleet.publish("stable", good, 1)
    fleet.publish("canary", permuted(good), 2)
    fleet.join()
    fleet.promote()
    assert len(fleet.having(1)) == len(fleet.having(2)) == DEVICES // 2
    keys = fleet.keep_only_the_snapshots_key()

    watch = ("-m", "edgeadapt", "release", "watch", folder, "stable", "--releases", fleet.folder)
    with ExitStack() as stack:
        for state_dir in made.nodes.values():
            words = ("device", "run", "--state", state_dir, "--gateway", f"{HOST}:{port}")
            stack.enter_context(running("-m", "edgeadapt", *words))
        timers = {
            name: stack.enter_context(running("-c", TIMER, fleet.bundle(name), INTERVAL)) for name in fleet.devices
        }
        watcher = stack.enter_context(running(*watch, "--interval", INTERVAL, "--json"))
        watcher.await_line(lambda line: line["outcome"] == "no verdict")
        evaluated(fleet, folder)
        published = watcher.await_line(lambda line: line["outcome"] == "rolled back")
        for timer in timers.values():
            timer.await_line(lambda line: line["began"] > published)
        print(f"{'device':<12} {'release':>7} {'off after':>10}   checks every {INTERVAL:g} s")
        for name, timer in timers.items():
            checks = [line for _, line in timer.lines]
            first = next(line for line in checks if line["release"] == 3)
            before = {line["release"] for line in checks if line["ended"] < first["began"]}
            print(f"{name:<12} {before.pop():>7} {first['ended'] - published:>+9.2f} s")
            after = [line["release"] for line in checks if line["began"] > published]
            assert set(after) == {3}, after  # the first check after the rollback, and those after that
        assert len(fleet.having(3)) == DEVICES

        fleet.give_back(keys)
        fleet.publish("canary", louder(good), 4)
        fleet.promote()
        fleet.keep_only_the_snapshots_key()
        evaluated(fleet, folder)
        kept = watcher.await_line(lambda line: line["outcome"] == "kept")
        for timer in timers.values():
            timer.await_line(lambda line: line["began"] > kept)
    assert len(fleet.having(4)) == len(fleet.having(3)) == DEVICES // 2
    actions = [each.action for each in audit_repository(fleet.folder, None).records]
    judged = [(each.kind, each.release, each.evaluation.worse) for each in actions if each.evaluation]
    assert judged == [("rollback", 3, True), ("evaluate", 4, False)]
    assert audit_failures(folder) == set()
