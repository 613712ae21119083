"""Is the log whole? Numbering, and every signed checkpoint against the entries before it."""

from dataclasses import replace

from aggregation import envelope
from aggregation.errors import ProtocolError
from aggregation.pki.identity import PublicKey
from aggregation.session import COORDINATOR
from aggregation.transcript import ENTRY, EVERYONE, Checkpoint, Entry, Place, Reading, Stage, merkle
from coordinator.audit.report import Problem

UNREADABLE = "unreadable"


def checkpoints(reading: Reading, coordinator: PublicKey, unfinished: bool) -> list[Checkpoint]:
    """The checkpoints, each of which fits the entries before it.

    Args:
        reading: Of the log.
        coordinator: Whose signatures they must bear.
        unfinished: Accept a log that goes on after its last checkpoint: of a session under way.

    Raises:
        Problem: An entry is damaged, missing, moved or repeated, or the log is not closed.
    """
    tree, found, covered = merkle.Tree(), list[Checkpoint](), 0
    for index, entry in enumerate(reading.entries):
        if entry.index != index:
            where = replace(entry.place, index=index)
            raise Problem(f"its number is {entry.index}: an entry was removed, moved or repeated", where)
        if entry.kind == Checkpoint.TAG:
            found.append(_checked(entry, coordinator, tree, covered, found))
            covered = index + 1
        tree.append(ENTRY.encode(entry))
    _ended(reading, found, covered, unfinished)
    return found


def _checked(
    entry: Entry, coordinator: PublicKey, tree: merkle.Tree, covered: int, before: list[Checkpoint]
) -> Checkpoint:
    try:
        checkpoint = envelope.open_verified(Checkpoint, entry.message, coordinator, COORDINATOR)
    except ProtocolError as error:
        raise Problem(str(error), entry.place) from None
    if before and before[-1].stage is Stage.CLOSED:
        raise Problem("the log was closed before", entry.place)
    if (checkpoint.size, checkpoint.root) != (tree.size, tree.root()):
        raise Problem(f"entries {covered} to {entry.index - 1} are not those that the coordinator signed", entry.place)
    if before and (checkpoint.offer, checkpoint.previous) != (before[0].offer, before[0].previous):
        raise Problem("the checkpoint is of another session", entry.place)
    return checkpoint


def _ended(reading: Reading, found: list[Checkpoint], covered: int, unfinished: bool) -> None:
    size = len(reading.entries)
    if reading.problem:
        raise Problem(reading.problem, Place(size, UNREADABLE, 0, EVERYONE))
    if not size:
        raise Problem("the log is empty")
    closed = bool(found) and found[-1].stage is Stage.CLOSED
    if closed and covered < size:
        raise Problem("the log was closed before", reading.entries[covered].place)
    if not closed and not unfinished:
        raise Problem(
            "the log is not closed: its end was cut off, or the session is under way", reading.entries[-1].place
        )
