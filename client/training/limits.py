"""The limits of what a device trains for a coordinator.

They are checked before an example is read, so that a refusal says nothing about examples. An adapter with huge numbers
can make the loss overflow only on devices that hold a certain phrase. One within the limits might still do so; the
device then answers with a contribution of zero (``contribute.Outcome.nothing``).
"""

import math
from dataclasses import dataclass

import numpy as np

from adapters.analytic import AnalyticTask
from adapters.layout import Tensors
from adapters.peftconfig import require_trainable
from adapters.task import Task
from adapters.taskkinds import AnyTask
from aggregation.errors import ConfigError, ProtocolError
from aggregation.session import COORDINATOR
from client.training.control import TOKENS, TrainingControl


@dataclass(frozen=True, slots=True)
class TrainingLimits:
    """Limits on the training of this device. They belong to its owner; the defaults are far above usual values.

    Args:
        maximum_magnitude: Largest absolute value in an adapter.
        maximum_parameters: Most numbers in an adapter, which bounds what training and masking cost.
        maximum_scaling: Largest factor of a LoRA update, ``alpha / rank`` of plain LoRA.
        maximum_virtual_tokens: Most virtual tokens before a text, each of which takes the time of a token.
        minimum_labels: Fewest labels of a classifier's task. If it has fewer than the examples, only some devices can
            train, and the sum is over these few alone.
        maximum_labels: Most labels of a task.
        maximum_learning_rate: Largest learning rate.
        maximum_epochs: Most passes over the examples in a round.
        maximum_batch_size: Most examples in a step.
        maximum_tokens: Most tokens of one pass over the base, with padding, which bounds the memory that training
            needs: a larger batch is trained in parts.
        maximum_seconds: Longest training of a round, which ends then with what it has. 0: any.
        duty_cycle: Share of the time in which training computes, above 0; it pauses after each step.
        moments: Whether to contribute to an analytic head. Whoever knows the sum of second moments can tell rather well
            whether a certain phrase is in it (docs/explanation/threat-model.md).
        answer_quantum_seconds: Offers and plans are answered at a multiple of this time after they arrived. 0: at once.
    """

    maximum_magnitude: float = 1000.0
    maximum_parameters: int = 2**24  # 64 MiB of float32
    maximum_scaling: float = 64.0
    maximum_virtual_tokens: int = 128
    minimum_labels: int = 2
    maximum_labels: int = 1024
    maximum_learning_rate: float = 0.1
    maximum_epochs: int = 10
    maximum_batch_size: int = 64
    maximum_tokens: int = TOKENS
    maximum_seconds: float = 0.0
    duty_cycle: float = 1.0
    moments: bool = True
    answer_quantum_seconds: float = 60.0

    def control(self) -> TrainingControl:
        """What these limits let a training do."""
        return TrainingControl(self.maximum_seconds or math.inf, self.duty_cycle, self.maximum_tokens)

    def check(self, task: AnyTask, adapter: Tensors) -> None:
        """Return if the task and the adapter on offer are within these limits.

        Args:
            task: As decoded.
            adapter: Finite tensors.

        Raises:
            ProtocolError: A value is outside its limit, no adapter of the configuration can be trained, or the task is
                an analytic head and the owner contributes to none.
        """
        config = task.peft_config
        try:
            require_trainable(config)
        except ConfigError as error:
            raise ProtocolError.of(error, COORDINATOR) from None
        labels = len(task.labels)
        if 0 < labels < self.minimum_labels:  # a language model has none
            reason = f"task.labels {labels} is below this device's minimum of {self.minimum_labels}"
            raise ProtocolError(reason, COORDINATOR, about="task.labels", value=labels)
        if isinstance(task, AnalyticTask) and not self.moments:
            reason = "this device contributes to no analytic head"
            raise ProtocolError(reason, COORDINATOR, about="task.moments")
        magnitude = max((float(np.abs(tensor).max(initial=0)) for tensor in adapter.values()), default=0.0)
        rules: tuple[tuple[str, float, float], ...] = (
            ("adapter.magnitude", magnitude, self.maximum_magnitude),
            ("adapter.parameters", sum(tensor.size for tensor in adapter.values()), self.maximum_parameters),
            ("task.scaling", config.scaling_of("") if config.r else 0.0, self.maximum_scaling),
            ("task.virtual_tokens", config.num_virtual_tokens, self.maximum_virtual_tokens),
            ("task.labels", labels, self.maximum_labels),
        )
        if isinstance(task, Task):
            rules += (
                ("task.learning_rate", task.learning_rate, self.maximum_learning_rate),
                ("task.epochs", task.epochs, self.maximum_epochs),
                ("task.batch_size", task.batch_size, self.maximum_batch_size),
            )
        for about, value, limit in rules:
            if value > limit:
                reason = f"{about} {value:g} is over this device's maximum of {limit:g}"
                raise ProtocolError(reason, COORDINATOR, about=about, value=value)
