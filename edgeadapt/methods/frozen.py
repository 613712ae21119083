"""Runs a model from the hidden states that enter the first layer which an adapter changes.

The layers below are frozen and have no adapter, so they give a text the same states in every step of a training: they
are computed once (``edgeadapt.bases.states``). How a family of models calls its layers shows while one text passes
them. That both ways give the same answer is measured before either is used.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from edgeadapt.formats.layout import Floats
from edgeadapt.formats.peftconfig import LAYER, PeftConfig

PROBE = ((1, 2, 3, 4, 5), (6, 7, 3))  # tokens of two texts
TOLERANCE = 1e-4  # difference of an output, relative to the largest
AT_ONCE = 2048  # tokens
Run = Callable[[Tensor, Tensor], Tensor]  # token ids and mask, shape (texts, longest) → outputs without padding


class _ReachedError(Exception):
    """Leaves a model at the first layer above the frozen ones."""


class FrozenLayers:
    """The layers of a model below the adapted ones; not for several threads."""

    def __init__(self, layers: nn.ModuleList, first: int, run: Run) -> None:
        """``first``: number of the first adapted layer. ``run``: calls the model."""
        self._run, self.first = run, first
        self._given: Tensor | None = None  # states with which the model begins
        self._stops = False  # whether a call ends with the states
        self._reached: Tensor | None = None
        for number, layer in enumerate(layers):
            if number < first:
                layer.forward = self._passing(layer.forward)
        layers[first].register_forward_pre_hook(self._enter, with_kwargs=True)

    @classmethod
    def of(cls, model: nn.Module, config: PeftConfig, run: Run) -> Self | None:
        """Find the frozen layers of an adapted model; None: there are none, or it cannot begin with states."""
        paths = [path for path, module in model.named_modules() if hasattr(module, "base_layer")]
        numbers = [inner for path in paths if (inner := LAYER.match(f".{path}"))]
        first = min((int(inner[1]) for inner in numbers), default=0)
        if not first or len(numbers) < len(paths) or config.bias == "all":
            return None
        lists = {path[: inner.start(1) - 2] for path, inner in zip(paths, numbers, strict=True)}
        if len(lists) != 1 or not isinstance(layers := model.get_submodule(lists.pop()), nn.ModuleList):
            return None
        ids, mask = _padded([torch.tensor(row) for row in PROBE])
        with torch.inference_mode():
            whole, frozen = run(ids, mask), cls(layers, first, run)
            try:
                with frozen.resumed(frozen.states(PROBE)):
                    resumed = run(ids, mask)
            except Exception:  # of any family: it has states that are not a tensor for each text, say
                return None
        close = torch.allclose(resumed, whole, rtol=0, atol=TOLERANCE * float(whole.abs().max()))
        return frozen if close else None

    def states(self, tokens: Sequence[Sequence[int]], *, together: bool = False) -> list[Floats]:
        """Compute what enters the first adapted layer for each text, shape ``(tokens, hidden)``.

        Guarantee: a text's states do not depend on the others, unless those of one length are computed ``together``,
        which takes a fifth of the time: then they do by rounding.
        """
        result: list[Floats] = [None] * len(tokens)  # type: ignore[list-item]
        order = sorted(range(len(tokens)), key=lambda text: len(tokens[text]))
        for length, group in groupby(order, key=lambda text: len(tokens[text])):
            texts = [*group]
            for at in range(0, len(texts), size := max(AT_ONCE // length, 1) if together else 1):
                some = texts[at : at + size]
                for text, row in zip(some, self._states(torch.tensor([tokens[text] for text in some])), strict=True):
                    result[text] = row.numpy()
        return result

    @contextmanager
    def resumed(self, states: Sequence[Floats]) -> Iterator[None]:
        """Within the block, begin each call of the model with the states of its texts."""
        self._given = pad_sequence([torch.tensor(row) for row in states], batch_first=True)
        try:
            yield
        finally:
            self._given = None

    def _states(self, ids: Tensor) -> Tensor:
        self._stops = True
        try:
            with torch.inference_mode():
                self._run(ids, torch.ones_like(ids))
        except _ReachedError:
            pass
        finally:
            self._stops = False
        if self._reached is None:
            raise RuntimeError("the model left out the first adapted layer")
        reached, self._reached = self._reached, None
        return reached

    def _passing(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Make a layer pass on what it reads, in the form in which it answers, while states are given."""
        size = 0  # of the tuple in which it answers; 0: with a tensor

        def passing(*args: Any, **kwargs: Any) -> Any:
            nonlocal size
            if self._given is None:
                output = forward(*args, **kwargs)
                size = len(output) if isinstance(output, tuple) else 0
                return output
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *[None] * (size - 1)) if size else hidden

        return passing

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._stops:
            self._reached = args[0] if args else kwargs["hidden_states"]
            raise _ReachedError
        if self._given is None:
            return None
        if args:
            return (self._given, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._given}


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    ones = [torch.ones_like(row) for row in rows]
    return pad_sequence(list(rows), batch_first=True), pad_sequence(ones, batch_first=True)
