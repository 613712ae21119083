"""Which labels a device's examples have: those of its signed bundle, or of the first task that it trained.

Examples with a label that the task lacks do not count, and names in a task say which do. A coordinator that chose new
labels for a round would get a sum over only the devices that have examples of these. So it does not choose them: a task
has the labels of an adapter in the device's bundle, in their order. A base in a plain folder does not have a list of
labels; there the first task's are remembered, on other bases as well, until the owner runs ``edgeadapt device forget``.
Whether a plan is refused follows from these lists alone, before an example is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Annotated

from aggregation import wire
from aggregation.errors import ProtocolError
from aggregation.messages import MAX_TRAINING, HexDigest
from aggregation.session import COORDINATOR
from aggregation.wire import Codec
from client.inference.trust import Trust
from client.training.trainer import FrozenBase
from edgeadapt.formats import jsontext
from edgeadapt.formats.bundle import VerifiedBase, adapter_names


@dataclass(frozen=True, slots=True)
class TaskLabels:
    """The labels of the last task that a device trained, as JSON. ``base``: digest of the frozen base, hex."""

    base: HexDigest
    encoded: Annotated[bytes, wire.blob(MAX_TRAINING)]

    @classmethod
    def of(cls, base: str, labels: Sequence[str]) -> "TaskLabels":
        return cls(base, jsontext.encode(list(labels)))

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels in order; none of a language model."""
        return tuple(jsontext.decode(self.encoded))


TASK_LABELS: Codec[TaskLabels] = wire.record(TaskLabels)


def on_plan(known: TaskLabels | None, base: FrozenBase, labels: tuple[str, ...]) -> TaskLabels:
    """Check the ``labels`` of a round, and return those to remember; ``known`` is None before the first task. Raises
    DataError, TrustError: an adapter's manifest in the bundle is missing, or no trusted key signed it; ProtocolError:
    they are other labels than before."""
    signed = signed_labels(base)
    if signed and labels not in signed:
        remedy = "train with the labels of the release, or update the bundle"
        raise _refusal(labels, signed[0], "this device's signed bundle", remedy)
    if not signed and known is not None and known.labels != labels:
        remedy = "run 'edgeadapt device forget' if the application has other labels now"
        raise _refusal(labels, known.labels, "the tasks before", remedy)
    return TaskLabels.of(base.digest, labels)


def signed_labels(base: FrozenBase) -> tuple[tuple[str, ...], ...]:
    """List the labels of each adapter in the bundle of a base that was not made on this device; none of a plain folder.
    Raises DataError, TrustError as ``Bundle.adapter_manifest``."""
    if not isinstance(base, VerifiedBase):
        return ()
    bundle = Trust.open(base.folder.parent).bundle
    manifests = (bundle.adapter_manifest(name) for name in adapter_names(bundle.folder))
    return tuple(manifest.labels for manifest in manifests if manifest.parent is None)


def _refusal(labels: Sequence[str], own: Sequence[str], whose: str, remedy: str) -> ProtocolError:
    """Refuse a task whose ``labels`` are not ``own``; names the first that differs."""
    pairs = list(zip_longest(labels, own))
    number = next(i for i, (found, expected) in enumerate(pairs) if found != expected)
    found, expected = ("missing" if name is None else repr(name[:40]) for name in pairs[number])
    reason = f"task.labels: label {number} of the task is {found}, and that of {whose} is {expected}: {remedy}"
    return ProtocolError(reason, COORDINATOR, about="task.labels")
