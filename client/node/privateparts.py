"""The parts of an adapter that a device trains in the rounds and does not share, such as FedPer's head.

They begin as in the first adapter that the device trains, and go on from round to round and from session to session. A
device that is asked for a plan again must answer as before: the difference of two answers under the same masks is that
of two updates. So the device keeps what the last plan started from, too. The file is encrypted.
"""

from dataclasses import dataclass, field
from typing import Annotated

from aggregation import sealed, wire
from aggregation.messages import Digest
from aggregation.wire import Codec

MAX_BYTES = 2**28  # of the tensors, as a file
_MAGIC = b"edgeadapt/private-parts/1\x00"
_BLOB = wire.blob(MAX_BYTES)


@dataclass(frozen=True, slots=True)
class PrivateParts:
    """The private parts before and after the last plan for which the device trained some.

    Law: ``open(seal(p, k), k) == p``.

    Args:
        subject: What they belong to (``client.training.private.subject_of``).
        plan: Digest of the plan.
        before, after: Safetensors files.
    """

    subject: Digest
    plan: Digest
    before: Annotated[bytes, _BLOB] = field(repr=False)
    after: Annotated[bytes, _BLOB] = field(repr=False)

    def seal(self, key: bytes) -> bytes:
        """Encrypt them. ``key``: the device's sealing key."""
        return sealed.seal_record(_CODEC, self, key, _MAGIC)

    def start(self, subject: bytes, plan: bytes = b"") -> bytes | None:
        """The file from which a training starts; None if the parts are of another subject.

        Args:
            subject: Of the training.
            plan: Digest of the plan; that of the last one gives what that one started from.
        """
        if self.subject != subject:
            return None
        return self.before if self.plan == plan else self.after

    @classmethod
    def open(cls, raw: bytes, key: bytes) -> "PrivateParts":
        """Decrypt them.

        Raises:
            TrustError: They were altered, or sealed with another key.
        """
        return sealed.open_record(_CODEC, raw, key, _MAGIC)


_CODEC: Codec[PrivateParts] = wire.record(PrivateParts)
