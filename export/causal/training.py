"""The training graph of a causal language model: the loss of the learned tokens, and its gradient by every slot.

The answering graph has a cache and, on the builder path, fused operators without derivatives. So torch traces the model
once more, without a cache, with the logits of the learned tokens alone: those of all tokens would take more memory than
the rest of a pass, 200 kB a token with SmolLM2's vocabulary. The weights are those of the answering graph, byte for
byte, and ``headers.split`` stores them once.
"""

from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from adapters.traininggraph import POSITIONS
from aggregation.errors import ConfigError
from export.onnx import graph, matmuls
from export.onnx.peftmodel import TOKENS, SlottedModel, examples, replace_module, with_inputs
from export.onnx.tensorstore import TensorStore

EXAMPLE = (0, 1, 4, 2)  # of six positions


class LearnedLogits(nn.Module):
    """A language model that takes ``input_ids``, ``attention_mask``, ``positions`` and ``adapter``, and returns the
    logits at these positions of the flattened tokens, shape ``(learned, vocabulary)``.
    """

    def __init__(self, slotted: SlottedModel) -> None:
        """Of a model without virtual tokens, whose parameters are shared.

        Raises:
            ConfigError: The model has no output layer.
        """
        super().__init__()
        self.model = with_inputs(slotted)
        inner: Any = self.model.inner
        head = inner.get_output_embeddings()
        path = next((path for path, module in inner.named_modules() if module is head), None)
        if head is None or path is None:
            kind = type(inner).__name__
            raise ConfigError(f"{kind} has no output layer, so it has no training graph", about=kind)
        self._head = _AtPositions(head)
        replace_module(inner, path, self._head)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, adapter: dict[str, Tensor]
    ) -> Tensor:
        self._head.now = (positions,)
        logits: Tensor = self.model(input_ids, attention_mask, adapter)
        return logits


class _AtPositions(nn.Module):
    """The output layer, which reads the hidden states at some positions of all texts."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.now: tuple[Tensor, ...] = ()

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.index_select(hidden.flatten(0, 1), 0, *self.now))
        return logits


def trace(slotted: SlottedModel, store: TensorStore) -> onnx.ModelProto:
    """Token ids, attention mask, positions and slots → ``logits`` of the learned tokens, in float32.

    Args:
        slotted: The model, in memory.
        store: Takes the weights.

    Raises:
        ConfigError: torch cannot trace the model.
    """
    example, dynamic = examples(slotted)
    batch, sequence = Dim("batch"), Dim("sequence")
    tokens = {name: torch.ones(2, 3, dtype=torch.int64) for name in TOKENS}
    traced = graph.export(
        LearnedLogits(slotted),
        {**tokens, POSITIONS: torch.tensor(EXAMPLE), "adapter": example},
        {**{name: {0: batch, 1: sequence} for name in TOKENS}, POSITIONS: {0: Dim("learned")}, "adapter": dynamic},
        inputs=[*TOKENS, POSITIONS, *example],
        outputs=[graph.ANSWER],
        store=store,
    )
    matmuls.normalize(traced, store)
    return traced
