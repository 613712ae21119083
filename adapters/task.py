"""One round's training task, and the layout of a device's contribution.

The coordinator signs the task as part of its plan, in which it is opaque to the protocol. The segments of the
contribution are the sums that are aggregated under the masks. ``client/training`` trains; ``coordinator/`` computes the
next adapter from the sums.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from adapters import jsontext
from adapters.layout import Layout
from adapters.peftconfig import PeftConfig
from aggregation.errors import ConfigError, ProtocolError
from aggregation.vector import Segment, VectorSpec

MAX_LOSS = 20.0  # nats; a device's loss is clipped to it, so that the metric has a bound

Positive = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, slots=True)
class Task:
    """One round's training, the same for every device of the cohort."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    peft_config: PeftConfig
    labels: tuple[str, ...]
    epochs: Annotated[int, Field(gt=0, le=100)]
    batch_size: Annotated[int, Field(gt=0, le=1024)]
    learning_rate: Annotated[float, Field(gt=0, le=1)]  # of AdamW
    weight_decay: Annotated[float, Field(ge=0, le=1)]
    seed: Annotated[int, Field(ge=0)]  # of the order of the examples; each device mixes in its own name

    def encode(self) -> bytes:
        """JSON, the same bytes for equal tasks: ``Task.decode(task.encode()) == task``."""
        return jsontext.encode(asdict(self))

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Read a task.

        Raises:
            ProtocolError: A field is missing, unknown or out of range.
        """
        try:
            return TypeAdapter(cls).validate_json(raw, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            field = f"task.{'.'.join(map(str, first['loc']))}"
            raise ProtocolError(f"{field}: {first['msg']}", about=field) from error


def contribution_spec(
    layout: Layout, *, clip_norm: float, weight_cap: int, ring_bits: int, max_clients: int
) -> VectorSpec:
    """The sums of one round: the weighted delta, the weights and the metrics, each with its own bound.

    A device's weight is its number of examples, at most ``weight_cap``. ``delta`` is the clipped delta times the
    weight, so that a coordinate is within ``clip_norm * weight_cap``. ``correct``, ``loss`` and ``held_out`` come from
    the adapter that the device received, measured on its held-out part before training.

    Raises:
        ConfigError: The ring cannot hold the sum of so many devices, or cannot count their examples one by one.
    """
    segments = (
        Segment("delta", layout.size, clip_norm * weight_cap),
        Segment("weight", 1, float(weight_cap)),
        Segment("correct", 1, float(weight_cap)),
        Segment("loss", 1, MAX_LOSS * weight_cap),
        Segment("held_out", 1, float(weight_cap)),
    )
    spec = VectorSpec(segments, ring_bits, max_clients)
    if spec.max_steps < weight_cap:  # a step above one: the sum is divided by weights, which must be exact
        raise ConfigError(
            f"a ring of {ring_bits} bits cannot count {weight_cap} examples of each of {max_clients} devices:"
            " take more bits or a lower weight cap",
            about="ring_bits",
            value=ring_bits,
        )
    return spec
