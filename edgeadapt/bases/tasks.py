"""What a head learns from labels: classification, or a task that a package adds (docs/how-to/extend.md). A label of the
data becomes a target, a vector of numbers. A task compares a head's outputs with targets: a loss for training, a score
for rounds, arms and reports. Nothing else knows what the numbers mean."""

import importlib
import json
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from aggregation.errors import ConfigError, DataError
from edgeadapt.extensions import Extensions

CLASSIFICATION: Final = "classification"
WORDS: Final = "words"  # classification of marked words (``edgeadapt.bases.markedwords``)
CLASSES = (CLASSIFICATION, WORDS)  # tasks whose targets are the numbers of labels
MULTILABEL = "multilabel"
Target = tuple[float, ...]
Numbers = NDArray[np.floating[Any]]


class Objective(Protocol):
    """Compares outputs, shape ``(rows, outputs)``, with targets, shape ``(rows, width)``."""

    @property
    def metric(self) -> str: ...

    def outputs(self, labels: Iterable[str]) -> tuple[str, ...]:
        """Name the head's outputs, from the labels of all examples. Raises ConfigError."""
        ...

    def losses(self, outputs: Numbers, targets: Numbers) -> Numbers:
        """Compute a loss for each row, shape ``(rows,)``."""
        ...

    def score(self, outputs: Numbers, targets: Numbers) -> Numbers:
        """Score each row from 0 to 1, where 1 is best, shape ``(rows,)``."""
        ...

    def answer(self, outputs: Numbers, names: Sequence[str]) -> Any:
        """Say what the outputs of one text, shape ``(outputs,)``, mean."""
        ...


class LearningTask(Protocol):
    """A task of others. ``metric`` names what ``score`` gives; ``version`` may say which devices agree."""

    metric: str

    def outputs(self, labels: Sequence[str]) -> Sequence[str]: ...  # different labels → names of the head's outputs

    def target(self, label: str, outputs: Sequence[str]) -> Sequence[float]: ...  # raises ValueError for a wrong label

    def loss(self, outputs: Any, targets: Any) -> Any: ...  # torch tensors with a row for each text → shape (rows,)

    def score(self, outputs: Numbers, targets: Numbers) -> NDArray[Any]: ...  # from 0 to 1, shape (rows,)

    def answer(self, outputs: Numbers, names: Sequence[str]) -> Any: ...  # of one text


@dataclass(frozen=True, slots=True)
class Classification:
    """One label for each text. A target is the number of the label; the loss is the cross-entropy in nats."""

    metric: str = "accuracy"

    def outputs(self, labels: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted({*labels}))

    def losses(self, outputs: Numbers, targets: Numbers) -> Numbers:
        logits, rows = outputs.astype(np.float64), np.arange(len(outputs))
        shifted = logits - logits.max(axis=1, keepdims=True)
        losses: Numbers = np.log(np.exp(shifted).sum(axis=1)) - shifted[rows, targets[:, 0].astype(np.int64)]
        return losses

    def score(self, outputs: Numbers, targets: Numbers) -> Numbers:
        right: Numbers = (outputs.argmax(axis=1) == targets[:, 0]).astype(np.float64)
        return right

    def answer(self, outputs: Numbers, names: Sequence[str]) -> str:
        return names[int(outputs.argmax())]


class MultiLabel:
    """Any number of labels for a text: a list of them in JSON, or joined by ``+``. A score is the share of the labels,
    right or answered, that are both (Jaccard's index); 1 if there are none."""

    version = 1
    metric = "overlap of labels"

    def outputs(self, labels: Sequence[str]) -> Sequence[str]:
        names: set[str] = set()
        for label in labels:
            with suppress(ValueError):  # ``target`` refuses it
                names.update(self._names(label))
        return sorted(names)

    def target(self, label: str, outputs: Sequence[str]) -> Sequence[float]:
        if odd := {*self._names(label)} - {*outputs}:
            raise ValueError(f"{min(odd)!r} is not a label")
        return [float(name in self._names(label)) for name in outputs]

    def loss(self, outputs: Any, targets: Any) -> Any:
        entropy = importlib.import_module("torch.nn.functional").binary_cross_entropy_with_logits
        return entropy(outputs, targets, reduction="none").mean(1)

    def score(self, outputs: Numbers, targets: Numbers) -> NDArray[Any]:
        said, right = outputs > 0, targets > 0
        either = (said | right).sum(1)
        shares: NDArray[Any] = np.where(either, (said & right).sum(1) / np.maximum(either, 1), 1.0)
        return shares

    def answer(self, outputs: Numbers, names: Sequence[str]) -> list[str]:
        return [name for name, output in zip(names, outputs, strict=True) if output > 0]

    def _names(self, label: str) -> list[str]:
        if not label.startswith("["):
            return [name.strip() for name in label.split("+") if name.strip()]
        try:
            names = json.loads(label)
        except (ValueError, RecursionError):
            raise ValueError("the list of labels is not JSON") from None
        if not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError("a list of labels has texts only")
        return [name.strip() for name in names]


@dataclass(frozen=True, slots=True)
class OwnTask:
    """A task of ``TASKS`` besides classification. What it returns is checked; errors quote no example."""

    name: str
    make: Callable[[], LearningTask]

    @property
    def version(self) -> str:
        return str(getattr(self.make, "version", ""))

    @property
    def metric(self) -> str:
        return str(self._mine.metric)

    def outputs(self, labels: Iterable[str]) -> tuple[str, ...]:
        names = tuple(self._call("outputs", sorted({*labels})))
        if not names or len({*names}) < len(names) or not all(isinstance(name, str) and name for name in names):
            raise self._odd("outputs", f"{names!r}"[:160] + ", which are not different names")
        return names

    def target(self, label: str, outputs: Sequence[str]) -> Target:
        """Return the target of a label. Raises ValueError, which says what is wrong with the label; DataError: the task
        failed, or its target is not a list of numbers."""
        target = self._call("target", label, outputs)
        try:
            numbers = tuple(float(number) for number in target)
        except (OverflowError, TypeError, ValueError):
            numbers = ()
        if not numbers or not np.isfinite(numbers).all():
            raise self._odd("target", "something else than a list of finite numbers")
        return numbers

    def loss(self, outputs: Any, targets: Any) -> Any:
        losses = self._call("loss", outputs, targets)
        if (shape := tuple(getattr(losses, "shape", ()))) != (rows := (len(outputs),)):
            raise self._odd("loss", f"a tensor of shape {shape}, not {rows}, one number for each text")
        return losses

    def losses(self, outputs: Numbers, targets: Numbers) -> Numbers:
        tensor = importlib.import_module("torch").from_numpy  # in an extra, which only those who train install
        losses: Numbers = self.loss(tensor(outputs.astype(np.float64)), tensor(targets.astype(np.float64))).numpy()
        return losses

    def score(self, outputs: Numbers, targets: Numbers) -> Numbers:
        scores = np.asarray(self._call("score", outputs, targets), np.float64)
        if scores.shape != (len(outputs),) or not ((scores >= 0) & (scores <= 1)).all():
            raise self._odd("score", f"an array of shape {scores.shape}, not {(len(outputs),)} from 0 to 1")
        return scores

    def answer(self, outputs: Numbers, names: Sequence[str]) -> Any:
        return self._call("answer", outputs, names)

    @property
    def _mine(self) -> LearningTask:
        return _made(self.make)

    def _call(self, method: str, *given: Any) -> Any:
        try:
            return getattr(self._mine, method)(*given)
        except Exception as error:
            if method == "target" and type(error) is ValueError:
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__} in line {place.lineno} of {place.filename}"
            raise DataError(f"{method} of the task {self.name!r} failed: {reason}", about="data.task") from error

    def _odd(self, method: str, what: str) -> DataError:
        return DataError(f"{method} of the task {self.name!r} gave {what}", about="data.task")


def label_text(value: object) -> str:
    """Return the label of a row as a task reads it: a text, a number, or the JSON of a list.

    >>> label_text(4.5), label_text(["wifi", "bill"])
    ('4.5', '["wifi", "bill"]')
    """
    return value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def check_task(name: str, make: Callable[[], LearningTask]) -> None:
    """Check that a task has what it needs. Raises ConfigError."""
    methods = ("outputs", "target", "loss", "score", "answer")
    if missing := [method for method in methods if not callable(getattr(make, method, None))]:
        raise ConfigError(f"the task {name!r} has no method {missing[0]}: see docs/how-to/extend.md", about="data.task")
    if not isinstance(metric := getattr(make, "metric", None), str) or not metric.isprintable() or not metric:
        raise ConfigError(f"the task {name!r} has no metric: name what its score is, in a text", about="data.task")


TASKS = Extensions[Callable[[], Any]](
    "edgeadapt.tasks",
    "task",
    "data.task",
    {**dict.fromkeys(CLASSES, Classification), MULTILABEL: MultiLabel},
    check_task,
)


def find_task(name: str) -> Objective:
    """Find a task. Raises ConfigError as ``Extensions.find``."""
    make = TASKS.find(name)
    return Classification() if name in CLASSES else OwnTask(name, make)


@lru_cache(maxsize=8)
def _made(make: Callable[[], LearningTask]) -> LearningTask:
    return make()
