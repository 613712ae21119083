"""What a device is asked to train, and what its contribution is made of: the words that both sides must read alike.

A ``Task`` travels inside the plan, signed by the coordinator and opaque to the protocol. The segments say which sums
ride under the mask. Training is in ``client/training``; how the sums become an adapter is ``coordinator/``.
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
MAX_SECONDS = 3600.0  # of training in one round, likewise

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
            raise ProtocolError(f"task: field {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def contribution_spec(
    layout: Layout, *, clip_norm: float, weight_cap: int, ring_bits: int, max_clients: int
) -> VectorSpec:
    """The sums of one round: the weighted delta, the weights, and metrics, each within its own bound.

    An example weighs one, up to ``weight_cap`` a device. ``delta`` is the clipped delta times the weight, so a
    coordinate stays within ``clip_norm * weight_cap``. ``correct``, ``loss`` and ``held_out`` come from the adapter
    that the device received, measured on its held-out part before training.

    Raises:
        ConfigError: The ring cannot hold the sum of so many devices, or cannot count their examples one by one.
    """
    segments = (
        Segment("delta", layout.size, clip_norm * weight_cap),
        Segment("weight", 1, float(weight_cap)),
        Segment("correct", 1, float(weight_cap)),
        Segment("loss", 1, MAX_LOSS * weight_cap),
        Segment("held_out", 1, float(weight_cap)),
        Segment("seconds", 1, MAX_SECONDS),
    )
    spec = VectorSpec(segments, ring_bits, max_clients)
    if spec.max_steps < weight_cap:  # a step above one: the sum is divided by weights, which must be exact
        raise ConfigError(
            f"a ring of {ring_bits} bits cannot count {weight_cap} examples of each of {max_clients} devices:"
            " take more bits or a lower weight cap"
        )
    return spec
