"""AdamW in NumPy, and training with it: what the training of an adapter needs besides gradients.

The rules are those of ``client.training.trainer``, which trains with torch: equal gradients give equal adapters, up to
rounding.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adapters.layout import Tensors
from adapters.parts import part_of
from adapters.task import Task
from aggregation.errors import DataError

BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch's defaults, and those of the paper
Doubles = NDArray[np.float64]
GradientsOf = Callable[[Tensors, list[int]], tuple[float, Tensors]]


@dataclass(slots=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2, as torch has it).

    The moments are in double precision, in which the squares of small gradients are no denormal numbers.
    """

    learning_rate: float
    weight_decay: float
    _steps: int = 0
    _moments: dict[str, tuple[Doubles, Doubles]] = field(default_factory=dict, repr=False)

    def step(self, parameters: Tensors, gradients: Tensors) -> None:
        """Replace each parameter that has a gradient; their arrays stay as they are.

        Args:
            parameters: By name, float32.
            gradients: Of some of them, the same ones in each step, of the same shapes.
        """
        self._steps += 1
        first_bias, second_bias = (1 - beta**self._steps for beta in BETAS)
        for name, found in gradients.items():
            gradient = found.astype(np.float64)
            first, second = self._moments.get(name, (np.zeros(gradient.shape), np.zeros(gradient.shape)))
            first = BETAS[0] * first + (1 - BETAS[0]) * gradient
            second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
            self._moments[name] = first, second
            change = first / first_bias / (np.sqrt(second / second_bias) + EPSILON)
            decayed = parameters[name] * (1 - self.learning_rate * self.weight_decay)
            parameters[name] = (decayed - self.learning_rate * change).astype(np.float32)


def descend(
    start: Tensors,
    order: Iterable[list[int]],
    gradients_of: GradientsOf,
    task: Task,
    step: Callable[[], object] = lambda: None,
) -> Tensors:
    """Minimize a loss with AdamW over the parts of an adapter that a task trains.

    Args:
        start: All tensors of the adapter, and R of Fed-SB if the task trains it.
        order: Batches, as indices of examples.
        gradients_of: Tensors and batch → its mean loss, and the gradients by at least the trained tensors.
        task: Learning rate, weight decay, proximal term and parts.
        step: Called before each batch; an exception that it raises ends the training.

    Returns:
        All tensors, finite.

    Raises:
        DataError: The adapter has none of the parts, or a loss or a trained tensor is not finite.
    """
    values, trained = dict(start), [name for name in start if part_of(name) in task.trained]
    if not trained:
        raise DataError("the adapter has none of the parts that the task trains", about="task.trained")
    optimizer = AdamW(task.learning_rate, task.weight_decay)
    for batch in order:
        step()
        loss, found = gradients_of(values, batch)
        if not np.isfinite(loss):
            raise DataError("the training loss is not finite; lower the learning rate", about="training.loss")
        gradients = {name: found[name] for name in trained}
        if task.proximal:  # FedProx (Li et al. 2020); Ditto's personal objective is the same (Li et al. 2021)
            pull = np.float32(task.proximal)
            gradients = {name: value + pull * (values[name] - start[name]) for name, value in gradients.items()}
        optimizer.step(values, gradients)
    return finite(values)


def finite(trained: Tensors) -> Tensors:
    """Return the tensors that a training made. After its last step, no loss shows whether they are finite.

    Raises:
        DataError: One holds NaN or infinity.
    """
    if not all(np.isfinite(tensor).all() for tensor in trained.values()):
        raise DataError("the trained adapter is not finite; lower the learning rate", about="training.adapter")
    return trained
