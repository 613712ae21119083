"""The marks of a word (``markedwords``) as a model of torch reads them."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from aggregation.errors import ConfigError
from edgeadapt.bases.markedwords import MARKED


@dataclass(frozen=True, slots=True)
class Marks:
    """A hook before the forward pass of an encoder, which then reads a text without its marks."""

    begin: int  # numbers of their tokens
    end: int
    instead: int  # of the token that a mark becomes, which nothing attends to

    @classmethod
    def of(cls, config: Any) -> Self | None:
        """Return those of a base's configuration, if it states them. Raises ConfigError: it is damaged."""
        if (stated := getattr(config, MARKED, None)) is None:
            return None
        numbers = [each for each in stated if type(each) is int] if isinstance(stated, list) else []
        if len(numbers) != 2 or numbers != stated:
            reason = f"{MARKED} in config.json is damaged: make it again with 'base change --mark'"
            raise ConfigError(reason, about=MARKED)
        return cls(numbers[0], numbers[1], getattr(config, "pad_token_id", None) or 0)

    def __call__(self, encoder: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids, mask = given["input_ids"], given.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        seen = self._seen(ids)
        return args, given | {"input_ids": torch.where(seen, ids, self.instead), "attention_mask": mask * seen}

    def weights(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return 1 for each token whose state counts, shape of ``mask``: between marks, or all if there are none."""
        begun, ended = ids == self.begin, ids == self.end
        inside = (begun.long() - ended.long()).cumsum(1) * self._seen(ids) * mask
        inside = inside.clamp(0, 1)
        return torch.where(inside.sum(1, keepdim=True) > 0, inside, mask * self._seen(ids))

    def _seen(self, ids: Tensor) -> Tensor:
        return (ids != self.begin) & (ids != self.end)
