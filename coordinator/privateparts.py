"""The parts of an adapter that earlier rounds left on the devices, which no later round may share.

Devices refuse such a plan for good (``client.node.privateparts``). So a coordinator says it before it asks them.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from adapters import taskkinds
from adapters.layout import Layout
from adapters.parts import changed_by, part_of
from adapters.task import Task
from aggregation import envelope
from aggregation.errors import ConfigError
from aggregation.messages import Assignment
from aggregation.pki.identity import PublicKey
from aggregation.transcript import Entry
from coordinator.audit.transcripts import logs
from coordinator.storedlog import StoredLog


def check_unshared(folder: Path, coordinator: PublicKey, task: Task, layout: Layout) -> None:
    """Check that a task shares no part that a plan before it had devices train and keep to themselves.

    Logs are read from the newest one back, to a plan that shared as much: it passed this check.

    Args:
        folder: Of the transcripts.
        coordinator: Whose logs they are.
        task: Of the next rounds.
        layout: Of the adapter. A part without a tensor is neither shared nor kept.

    Raises:
        ConfigError: It shares one.
        TrustError: A log was altered.
    """
    shared = changed_by(task.shared) & {part_of(spec.name) for spec in layout.tensors}
    for path in reversed(logs(folder)):
        for earlier in reversed([*_trained(StoredLog.read(path, coordinator).entries)]):
            if kept := sorted(shared & earlier.private):
                text = f"the method shares the part {kept[0]}, which devices kept to themselves in an earlier round, "
                text += "and so they refuse it: set a method that does not share it, or begin a new federation"
                raise ConfigError(text, about="method", value=kept[0])
            if shared <= changed_by(earlier.shared):
                return


def _trained(entries: Iterable[Entry]) -> Iterator[Task]:
    """The tasks of a log's rounds of training, in order."""
    number = 0
    for entry in entries:
        if entry.kind == Assignment.TAG and entry.round > number:  # the first one of a round is complete
            number = entry.round
            task = taskkinds.decode(Assignment.decode(envelope.unverified_body(entry.message)).plan.training)
            if isinstance(task, Task):
                yield task
