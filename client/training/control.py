"""What bounds a training on a device besides its task: time, memory, heat and battery, held-out examples, and kills.
The task is the coordinator's or the personal step's. These limits are the device's, and hold for every engine
(``descent.descend``)."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aggregation import sealed
from aggregation.errors import EdgeAdaptError, TrustError
from edgeadapt.formats import jsontext, storage
from edgeadapt.formats.layout import Tensors

Doubles = NDArray[np.float64]
TOKENS = 512  # tokens of one pass, which bounds its memory; with MiniLM 0.4 MB a token
LONGEST_PAUSE = 60.0  # seconds
MAX_STATE = 2**30  # bytes
MAGIC = b"edgeadapt/training/1\x00"


@dataclass(frozen=True, slots=True)
class Best:
    loss: float
    values: Tensors = field(repr=False)
    stale: int = 0


@dataclass(frozen=True, slots=True)
class TrainingState:
    """A training between two steps. ``best``: with a patience, after the first epoch."""

    steps: int
    values: Tensors = field(repr=False)
    buffers: Mapping[str, Doubles] = field(repr=False)
    best: Best | None = None

    def encode(self) -> bytes:
        """Encode the length of a JSON text in 4 bytes, the text, which lists the arrays, and their numbers. Law:
        ``decode(encode(s))`` is ``s``, to the bit."""
        best = {} if self.best is None else {f"best/{name}": value for name, value in self.best.values.items()}
        named = {f"value/{name}": value for name, value in self.values.items()}
        arrays: dict[str, Any] = named | best | {f"buffer/{name}": value for name, value in self.buffers.items()}
        counts = [self.steps, *([] if self.best is None else [self.best.loss, self.best.stale])]
        arrays["counts"] = np.array(counts, np.float64)
        head = jsontext.encode([[name, value.dtype.str, value.shape] for name, value in arrays.items()])
        return len(head).to_bytes(4, "big") + head + b"".join(value.tobytes() for value in arrays.values())

    @classmethod
    def decode(cls, raw: bytes) -> "TrainingState":
        """Read what ``encode`` wrote. Raises TrustError if it is something else."""
        try:
            at = 4 + int.from_bytes(raw[:4], "big")
            arrays: dict[str, NDArray[Any]] = {}
            for name, kind, shape in jsontext.decode(raw[4:at]):
                value = np.frombuffer(raw, {"<f4": np.float32, "<f8": np.float64}[kind], math.prod(shape), at)
                arrays[name] = value.reshape(shape).copy()
                at += value.nbytes
            steps, *rest = arrays.pop("counts").tolist()
            best = Best(rest[0], _under("best/", arrays), int(rest[1])) if rest else None
            return cls(int(steps), _under("value/", arrays), _under("buffer/", arrays), best)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise TrustError("no state of a training", about="training.state") from error


@dataclass(slots=True)
class TrainingCheckpoint:
    """Where a training that may be killed keeps its state, encrypted."""

    path: Path  # in a private folder
    key: bytes = field(repr=False)  # 32 bytes that never leave the device
    subject: bytes  # digest of the training; the state of another one is not continued
    every: float = 10.0  # seconds between two states
    _written: float = field(default_factory=time.monotonic, repr=False)

    def read(self) -> TrainingState | None:
        """Read the state, if there is one of this training; what is damaged, or of another training, is left out."""
        try:
            raw = storage.read(self.path, MAX_STATE).removeprefix(MAGIC)
            return TrainingState.decode(sealed.decrypt(raw, self.key, MAGIC + self.subject))
        except (EdgeAdaptError, FileNotFoundError):
            return None

    def due(self) -> bool:
        return time.monotonic() - self._written >= self.every

    def write(self, state: TrainingState) -> None:
        """Replace the state. Raises OSError, as where the disk is full."""
        storage.replace(self.path, MAGIC + sealed.encrypt(state.encode(), self.key, MAGIC + self.subject))
        self._written = time.monotonic()

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class TrainingControl:
    seconds: float = math.inf  # no step begins after them: the training ends with what it has
    # Share of the time in which it computes, above 0: after each step it pauses, so that a battery lasts longer and a
    # device stays cool.
    duty_cycle: float = 1.0
    gradient_norm: float = math.inf  # largest L2 norm of a step's gradient, to which it is clipped
    # Whether a gradient that is not finite counts as zero, as in a round, which no example may end. On a device of
    # one's own it is an error, which says that the learning rate is too high.
    unfailing: bool = False
    # Most tokens of one pass, with padding. A larger batch is run in parts, whose gradients add up to its own (gradient
    # accumulation), so that this bounds memory.
    tokens: int = TOKENS
    patience: int = 0  # epochs without a lower loss on held-out examples after which the training ends; 0: never
    # The loss of an adapter on held-out examples; needed with a patience.
    held_out: Callable[[Tensors], float] | None = None
    until: Callable[[Tensors], bool] | None = None  # whether an adapter needs no further step
    checkpoint: TrainingCheckpoint | None = None
    step: Callable[[], object] = lambda: None  # called before each batch; an exception that it raises ends the training
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], object] = time.sleep

    def ends(self, begun: float, best: Best | None, values: Tensors) -> bool:
        if self.clock() - begun >= self.seconds or (best and best.stale >= self.patience > 0):
            return True
        return self.until is not None and self.until(values)

    @contextmanager
    def paced(self) -> Iterator[None]:
        begun = self.clock()
        yield
        if self.duty_cycle < 1:
            self.sleep(min((self.clock() - begun) * (1 / self.duty_cycle - 1), LONGEST_PAUSE))

    def judged(self, best: Best | None, trained: Tensors, whole: Tensors) -> Best | None:
        """Choose the best tensors after an epoch: these, or the previous ones, which are one epoch older now."""
        if self.held_out is None:
            return None
        loss = self.held_out(whole)
        loss = math.inf if math.isnan(loss) else loss
        if best is None or loss < best.loss:
            return Best(loss, trained)
        return replace(best, stale=best.stale + 1)


UNLIMITED = TrainingControl()


def _under(prefix: str, found: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
