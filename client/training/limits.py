"""The limits on the training of a device: those of a task, of time and memory, and what the owner contributes to."""

import math
from collections.abc import Callable

from pydantic import Field

from aggregation.errors import ProtocolError
from aggregation.session import COORDINATOR
from client.training.control import TOKENS, TrainingControl
from edgeadapt.formats.layout import Tensors
from edgeadapt.rounds.roundtask import RoundTask
from edgeadapt.rounds.tasklimits import TaskLimits


class TrainingLimits(TaskLimits):
    """Limits on the training of this device. They belong to its owner."""

    maximum_tokens: int = Field(
        default=TOKENS,
        ge=1,
        description="most tokens of one pass over the base, with padding; a larger batch is trained in parts, which "
        "bounds the memory",
    )
    maximum_seconds: float = Field(
        default=0.0,
        ge=0,
        description="longest training of a round, in seconds: it ends then with what it has; 0: any",
    )
    duty_cycle: float = Field(
        default=1.0,
        ge=0.01,
        le=1,
        description="share of the time in which training computes: it pauses after each step, which saves a battery "
        "and keeps the device cool",
    )
    moments: bool = Field(
        default=True, description="contribute the second moments of embeddings to a sum for an analytic head"
    )
    answer_quantum_seconds: float = Field(
        default=60.0,
        ge=0,
        le=86_400,
        description="offers and plans are answered at a multiple of this time after they arrived, in seconds; 0: at "
        "once. The multiple still shows coarsely how long training took, unless this is above the longest",
    )

    def control(self, step: Callable[[], object] = lambda: None) -> TrainingControl:
        seconds, norm = self.maximum_seconds or math.inf, self.maximum_gradient_norm
        return TrainingControl(seconds, self.duty_cycle, norm, True, self.maximum_tokens, step=step)

    def check(self, task: RoundTask, adapter: Tensors) -> None:
        """Check a task as ``TaskLimits.check`` does, and that the owner contributes to rounds of its kind."""
        super().check(task, adapter)
        if task.CONSENT and not getattr(self, task.CONSENT):
            reason = f"this device contributes no {task.CONSENT}"
            raise ProtocolError(reason, COORDINATOR, about=f"task.{task.CONSENT}")
