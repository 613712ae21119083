"""The limits of what a device trains for a coordinator: one table for every number that a coordinator chooses.

They belong to the device's owner (``client.node.policy``), and an audit names what the defaults refuse. A key
bounds what its name says: ``maximum_learning_rate`` and ``minimum_batch_size`` bound ``task.learning_rate`` and
``task.batch_size``. A number without a limit is refused, unless its kind says why it needs none
(``RoundTask.NEED_NO_LIMIT``). Limits are checked before an example is read: a refusal says nothing about examples."""

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from aggregation.errors import ConfigError, ProtocolError
from aggregation.session import COORDINATOR
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.peftconfig import require_trainable
from edgeadapt.formats.settings import Settings
from edgeadapt.rounds.roundtask import RoundTask


class TaskLimits(Settings):
    """Limits on what a coordinator may ask a device to train; the defaults are far above usual values."""

    maximum_magnitude: float = Field(default=1000.0, gt=0, description="largest absolute value in an adapter to train")
    maximum_parameters: int = Field(default=2**24, ge=1, description="most numbers in an adapter to train")
    maximum_scaling: float = Field(default=64.0, gt=0, description="largest factor of a LoRA update (alpha / rank)")
    maximum_virtual_tokens: int = Field(default=128, ge=0, description="most virtual tokens before a text")
    minimum_labels: int = Field(
        default=2,
        ge=1,
        description="fewest labels of a task: as many as the examples can have; 1 for a task with one output",
    )
    maximum_labels: int = Field(default=1024, ge=1, description="most labels of a task")
    maximum_learning_rate: float = Field(default=0.1, gt=0, description="largest learning rate of a task")
    maximum_weight_decay: float = Field(default=0.1, ge=0, description="largest weight decay of a task")
    maximum_momentum: float = Field(default=0.99, ge=0, lt=1, description="largest momentum of a task")
    maximum_proximal: float = Field(default=10.0, ge=0, description="largest weight of a task's proximal term")
    maximum_gradient_norm: float = Field(
        default=10.0,
        gt=0,
        description="largest L2 norm of a step's gradient, with the proximal term and the weight decay of sgd: a "
        "longer one is clipped to it, whatever the task says",
    )
    maximum_epochs: int = Field(
        default=10, ge=1, description="most passes over the examples, and over their variants, in a round"
    )
    minimum_batch_size: int = Field(default=2, ge=1, description="fewest examples in a step of training")
    maximum_batch_size: int = Field(default=64, ge=1, description="most examples in a step of training")

    def check(self, task: RoundTask, adapter: Tensors) -> None:
        """Check that the task and the adapter on offer, of finite tensors, are within these limits. Raises
        ProtocolError if a value is outside its limit or has none, or no adapter of the configuration can be trained."""
        with ProtocolError.blaming(COORDINATOR, ConfigError):
            require_trainable(task.peft_config)
        for about, value in (*_numbers_of(adapter), *_numbers_in(task)):
            self._check_number(about, value)

    def _check_number(self, about: str, value: float) -> None:
        name = about.partition(".")[2]
        low, high = (getattr(self, f"{side}_{name}", None) for side in ("minimum", "maximum"))
        reason = f"{about} {value:g} has no limit on this device" if low is None and high is None else ""
        if low is not None and value < low:
            reason = f"{about} {value:g} is below this device's minimum of {low:g}"
        # A larger norm than the device's own is not the one that it clips to.
        if high is not None and value > high and name != "gradient_norm":
            reason = f"{about} {value:g} is over this device's maximum of {high:g}"
        if reason:
            raise ProtocolError(reason, COORDINATOR, about=about)


def _numbers_of(adapter: Tensors) -> Iterator[tuple[str, float]]:
    yield "adapter.magnitude", max((float(np.abs(tensor).max(initial=0)) for tensor in adapter.values()), default=0.0)
    yield "adapter.parameters", sum(tensor.size for tensor in adapter.values())


def _numbers_in(task: RoundTask) -> Iterator[tuple[str, float]]:
    """Yield every number that a coordinator chooses with a task, by name, except those that need no limit."""
    config = task.peft_config
    yield "task.scaling", config.scaling_of("") if config.r else 0.0
    yield "task.virtual_tokens", config.num_virtual_tokens
    if task.labels:  # a language model has none
        yield "task.labels", len(task.labels)
    for name, value in task.numbers().items():
        yield f"task.{name}", value
