"""The parts of an adapter that a device trains in the rounds and does not share, such as FedPer's head.

They begin as in the first adapter that the device trains, and go on from round to round and from session to session. A
device that is asked for a plan again must answer as before: the difference of two answers under the same masks is that
of two updates. So the device keeps what the last plan started from, too.

A part that was private once, on a frozen base, stays private: the device refuses every plan that shares it, whatever
the labels, the layout and the coordinator are. Such parts are in one encrypted file with their numbers, so that no kill
leaves the ones without the others, and only the owner's ``edgeadapt device forget`` deletes either."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from aggregation import sealed, wire
from aggregation.messages import Digest
from aggregation.session import refused
from edgeadapt.methods.parts import Part
from edgeadapt.rounds.roundtask import RoundTask

MAX_BYTES = 2**28  # bytes of the tensors, as a file
MAX_EVER = 2**16  # bases times their parts
_BLOB = wire.blob(MAX_BYTES)
_EVER = wire.sequence(wire.text(f"[0-9a-f]{{64}}/({'|'.join(Part)})"), MAX_EVER)


@dataclass(frozen=True, slots=True)
class PrivateParts(sealed.SealedRecord):
    """The private parts before and after the last plan for which the device trained some, and which ever were.
    ``before`` and ``after`` are safetensors files."""

    MAGIC: ClassVar[bytes] = b"edgeadapt/private-parts/2\x00"

    subject: Digest  # what they belong to (``client.training.private.subject_of``)
    plan: Digest
    before: Annotated[bytes, _BLOB] = field(repr=False)
    after: Annotated[bytes, _BLOB] = field(repr=False)
    ever: Annotated[tuple[str, ...], _EVER]

    def start(self, subject: bytes, plan: bytes = b"") -> bytes | None:
        """Choose the file from which a training starts; None if the parts are of another subject. ``plan``: digest of
        the plan; that of the last one gives what that one started from."""
        if self.subject != subject:
            return None
        return self.before if self.plan == plan else self.after


def ever_private(known: PrivateParts | None, base: str, parts: Iterable[Part]) -> tuple[str, ...]:
    """List each part that was private in a plan so far, after the digest of its base (hex) and a slash, in order."""
    return tuple(sorted({f"{base}/{part}" for part in parts}.union(known.ever if known else ())))


def check_unshared(known: PrivateParts | None, base: str, task: RoundTask) -> None:
    """Check that a task shares no part that this device ever trained and kept to itself on the base with this digest.
    Whether the task trains what it shares makes no difference. Raises ProtocolError: it shares one."""
    if shared := sorted(task.changes & private_on(known, base)):
        text = f"task.shared: this device keeps the part {shared[0]} to itself, because it trained it without sharing "
        text += "it: take a method that does not share it, or ask the owner to run 'edgeadapt device forget'"
        raise refused(text, "task.shared")


def private_on(known: PrivateParts | None, base: str) -> frozenset[Part]:
    """List the parts that the device ever trained and kept to itself on the base with this digest."""
    return frozenset(part for part in Part if known and f"{base}/{part}" in known.ever)
