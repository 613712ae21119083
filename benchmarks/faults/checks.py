"""What a fault has cost: compare records, versions, logs and the devices' ledgers with what they were, and audit them.

The audit is that of `edgeadapt audit verify`. A contribution that a log has, and a device's ledger has not, is privacy
that was spent unrecorded.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from aggregation.errors import EdgeAdaptError
from aggregation.messages import MaskedInput
from benchmarks.faults.fleet import FaultFleet
from benchmarks.faults.processes import wait_until
from client.node.privacyledger import PrivacyLedger
from client.node.statedir import DeviceStateDir
from coordinator.statedir import TRANSCRIPT, CoordinatorStateDir
from coordinator.transcripts import StoredLog
from edgeadapt.audit import AuditInput, AuditOptions
from edgeadapt.audit.account import Account, logged
from edgeadapt.audit.transcripts import logs
from edgeadapt.formats.roundrecord import RoundRecord
from simulations.engine import provision

DELTA = 1e-6  # for which epsilons are compared
TOLERANCE = 1e-9  # relative


def losses(fleet: FaultFleet, before: tuple[RoundRecord, ...]) -> list[str]:
    """What was lost or counted twice since ``before``, one line each; empty: nothing.

    ``coordinator up`` must not run. A log that a kill left open is closed, as the next start does.
    """
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
