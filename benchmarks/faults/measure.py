"""Inject faults into a running fleet, one after the other, and say what each has cost.

A link between a device and the gateway delays what the device sends, so that a step is still under way when the fault
comes: the device's log says that it answers, and the answer is not there yet.
"""

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from aggregation.errors import EdgeAdaptError
from aggregation.messages import MaskedInput
from aggregation.steps import Step
from benchmarks.faults.faults import FAULTS, Fault, victim
from benchmarks.faults.fleet import FaultFleet, running_fleet
from benchmarks.faults.processes import Late, wait_until
from benchmarks.timing import Note, aligned
from client.node.privacyledger import PrivacyLedger
from client.node.statedir import DeviceStateDir
from coordinator.statedir import CoordinatorStateDir
from coordinator.transcripts import StoredLog
from edgeadapt.auditing import AuditInput, AuditOptions
from edgeadapt.auditing.account import Account, logged
from edgeadapt.auditing.transcripts import logs
from edgeadapt.formats.manifest import RoundRecord
from edgeadapt.formats.registryfiles import TRANSCRIPT
from edgeadapt.formats.storage import kill_safe
from simulations.engine import provision

DELTA = 1e-6  # for which epsilons are compared
TOLERANCE = 1e-9  # relative


def losses(fleet: FaultFleet, before: tuple[RoundRecord, ...]) -> list[str]:
    """What was lost or counted twice since ``before``, one line each; empty: nothing. ``coordinator up`` must not run.
    A log that a kill left open is closed, as the next start does."""
    found = [*_rounds(fleet.records(), before)]
    for machine in fleet.machines:
        state_dir = CoordinatorStateDir.open(machine.folder)
        _close_log(state_dir)
        state_dir.registry.close()
        found += [*_audit(fleet, machine.folder), *_privacy(fleet, machine.folder)]
    return found


def _close_log(state_dir: CoordinatorStateDir) -> None:
    wait_until(lambda: not state_dir.in_use, "the end of a run that a SuperLink started")
    with state_dir.leading() as leader:
        leader.transcripts.finish()


def _rounds(records: tuple[RoundRecord, ...], before: tuple[RoundRecord, ...]) -> Iterator[str]:
    if records[: len(before)] != before:
        yield "finished rounds are not as they were"
    if [record.round for record in records] != [*range(1, len(records) + 1)]:
        yield "a round is missing, or is there twice"
    made = [record.version for record in records if record.version is not None]
    if made != [*range(1, len(made) + 1)]:
        yield "a version is missing, or was made twice"


def _audit(fleet: FaultFleet, folder: Path) -> Iterator[str]:
    authority = fleet.out / provision.AUTHORITY / provision.AUTHORITY_KEY
    try:
        checked = AuditInput.open(folder, AuditOptions(authority=authority))
        checked.require(checked.audit(unfinished=False), unfinished=False)
    except EdgeAdaptError as error:
        yield f"the audit of {folder.name} fails: {error}"


def _privacy(fleet: FaultFleet, folder: Path) -> Iterator[str]:
    account, sent = Account(), Counter[str]()
    for path in logs(folder / TRANSCRIPT):
        entries = StoredLog.read(path, fleet.key.public).entries
        account = logged(account, entries)
        sent.update(entry.peer for entry in entries if entry.kind == MaskedInput.TAG)
    for name in fleet.names:
        ledger = DeviceStateDir.open(fleet.device(name)).load(PrivacyLedger) or PrivacyLedger()
        if ledger.bare or ledger.noisy < sent[name]:
            yield f"{name} has recorded {ledger.noisy} of the {sent[name]} contributions in the logs"
        spent = account.spent.get(name)
        if spent and ledger.spent.epsilon(DELTA) < spent.epsilon(DELTA) * (1 - TOLERANCE):
            yield f"{name} has recorded less privacy than the logs say that it spent"


DEVICES = 4  # one may drop out
DELAY = 0.3  # seconds that what a device sends takes to the gateway
NAMES = {
    Step.CHECK_IN: "check-in",
    Step.OFFER: "join",
    Step.ROSTER: "shares",
    Step.PLAN: "masked input",
    Step.SURVIVORS: "consistency",
    Step.UNMASK: "reveal",
}


@dataclass(frozen=True, slots=True)
class FaultOutcome:
    """What a fault at a step has cost."""

    fault: str
    stage: str  # of the round under way
    happened: str  # to that round
    lost: tuple[str, ...]  # one line for each loss
    seconds: float | None  # from the end of the fault to the next version of the adapter


def measure(names: Iterable[str], note: Note, stages: Sequence[Step] = tuple(Step)) -> list[FaultOutcome]:
    """Inject these faults, at those of their steps that are in ``stages``."""
    chosen, rows = [each for each in FAULTS if each.name in {*names}], list[FaultOutcome]()
    for shape in dict.fromkeys(each.shape for each in chosen):
        some = list[Fault]()
        for fault in (each for each in chosen if each.shape == shape):
            if why := fault.missing():
                rows.append(FaultOutcome(fault.name, "-", f"not run here: {why}", (), None))
            else:
                some.append(fault)
        if not some:
            continue
        try:
            with ExitStack() as stack:
                out = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "fleet"
                note("a fleet is made")
                with kill_safe():
                    fleet = stack.enter_context(running_fleet(out, DEVICES, shape))
                attend(fleet)
                while some:
                    rows += inject(fleet, some[0], note, stages)
                    del some[0]
        except (Late, EdgeAdaptError) as error:
            rows += [FaultOutcome(fault.name, "-", "the fleet does not run", (str(error),), None) for fault in some]
    return rows


def attend(fleet: FaultFleet) -> None:
    """Start the agents of all devices, each behind a link that delays what it sends."""
    for name in fleet.names:
        for machine in fleet.machines:
            machine.network.links[name].delay = DELAY
        fleet.attend(name)


def inject(fleet: FaultFleet, fault: Fault, note: Note, stages: Sequence[Step]) -> list[FaultOutcome]:
    """One fault at each of its steps; then the coordinator is stopped and everything is compared."""
    with fault.setting(fleet):
        return _inject_all(fleet, fault, note, [stage for stage in fault.stages if stage in stages])


def _inject_all(fleet: FaultFleet, fault: Fault, note: Note, stages: Sequence[Step]) -> list[FaultOutcome]:
    before, rows = fleet.records(), list[FaultOutcome]()
    fleet.start()
    try:
        for stage in stages:
            note(f"{fault.what}, at {NAMES[stage]}")
            try:
                rows.append(_inject(fleet, fault, stage))
            except (Late, EdgeAdaptError) as error:
                rows.append(FaultOutcome(fault.name, NAMES[stage], "training does not go on", (str(error),), None))
                break
    finally:  # whose disk is taken away then
        fleet.stop()
    lost = losses(fleet, before)
    return [FaultOutcome(row.fault, row.stage, row.happened, (*row.lost, *lost), row.seconds) for row in rows]


def _inject(fleet: FaultFleet, fault: Fault, stage: Step) -> FaultOutcome:
    _await_all(fleet)
    fleet.await_step(victim(fleet), stage)
    rounds = len(fleet.records())
    begin = fault.inject(fleet)
    after = fleet.await_version(rounds, "a round after the fault")
    seconds = time.monotonic() - begin
    happened = _story(fleet.records()[rounds:after])
    _await_all(fleet)  # the device that was disturbed is back
    return FaultOutcome(fault.name, NAMES[stage], happened, (), round(max(0.0, seconds), 1))


def _await_all(fleet: FaultFleet) -> None:
    """Wait until a round from now on has all devices, and another one begins."""
    seen = len(fleet.records())

    def complete() -> bool:
        return any(
            len(record.survivors) == len(fleet.names) and not record.dropped for record in fleet.records()[seen:]
        )

    wait_until(complete, "a round with all devices")


def _story(records: Sequence[RoundRecord]) -> str:
    """What became of the rounds up to the next version."""
    parts = [f"aborted: {record.aborted}" for record in records if record.aborted]
    made = next(record for record in records if record.version is not None)
    parts.append(f"{len(made.survivors)} devices in the next version")
    return "; ".join([*parts, *(f"one dropped out at {step}" for step in made.dropped.values())])


def as_json(rows: Sequence[FaultOutcome]) -> str:
    return json.dumps({"rows": [asdict(row) for row in rows], "load_average": os.getloadavg()[0]})


def table(rows: Sequence[FaultOutcome]) -> str:
    cells = aligned([("fault", "at", "lost", "seconds", "what happened"), *map(_cells, rows)], left=5)
    load = f"seconds from the end of the fault to the next version; load average {os.getloadavg()[0]:.1f}"
    return f"{cells}\n\n{load}"


def _cells(row: FaultOutcome) -> tuple[str, ...]:
    seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
    return row.fault, row.stage, "; ".join(row.lost) or "nothing", seconds, row.happened
