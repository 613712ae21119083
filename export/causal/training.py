"""The training graph of a causal language model: the loss of the learned tokens, and its gradient by every slot.

The answering graph has a cache and, on the builder path, fused operators without derivatives. So torch traces the model
once more, without a cache, with the logits of the learned tokens alone: those of all tokens would take more memory than
the rest of a pass, 200 kB a token with SmolLM2's vocabulary. The weights are those of the answering graph, byte for
byte, and ``headers.split`` stores them once."""

from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache

from aggregation.errors import ConfigError
from edgeadapt.bases.traininggraph import POSITIONS
from edgeadapt.formats.graphinputs import PREFIX, PROMPT, VIRTUAL
from export.causal.traced import KeyValueCache, cache_of
from export.onnx import graph, matmuls
from export.onnx.peftmodel import EXAMPLE_RANK, TOKENS, SlottedModel, examples, replace_module, with_inputs
from export.onnx.tasks import sizes
from export.onnx.tensorstore import TensorStore
from export.onnx.virtualtokens import accept_rows

EXAMPLE = (0, 1, 4, 2)  # indices of six positions


class LearnedLogits(nn.Module):
    """Compute the logits at some positions of the flattened tokens, shape ``(learned, vocabulary)``. It takes
    ``input_ids``, ``attention_mask``, ``positions`` and ``adapter``. Virtual tokens come before each text, and are not
    among the tokens that positions count."""

    def __init__(self, slotted: SlottedModel) -> None:
        """Share the parameters of a model. Raises ConfigError: the model does not have an output layer, or with a slot
        for a prefix as ``traced.cache_of``."""
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
        self.prefix: _AfterPrefix | None = None
        if PREFIX in slotted.inputs.virtual:
            self.model.inner = self.prefix = _AfterPrefix(inner, cache_of(slotted.model, sizes(inner.config)))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, adapter: dict[str, Tensor]
    ) -> Tensor:
        if PROMPT in adapter:
            positions = positions + (positions // input_ids.shape[1] + 1) * adapter[PROMPT].shape[-2]
        self._head.now = (positions,)
        if self.prefix is not None:
            self.prefix.now = (adapter[PREFIX],)
        logits: Tensor = self.model(input_ids, attention_mask, adapter)
        return logits


class _AtPositions(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.now: tuple[Tensor, ...] = ()

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.index_select(hidden.flatten(0, 1), 0, *self.now))
        return logits


class _AfterPrefix(nn.Module):
    """Model that reads texts after keys and values in its cache, as peft's prefix tuning gives them."""

    def __init__(self, model: nn.Module, cache: KeyValueCache) -> None:
        super().__init__()
        self.model, self.cache = model, cache
        self.size = len(cache.names) * cache.heads * cache.width  # numbers of a virtual token
        self.now: tuple[Tensor, ...] = ()

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        return embeddings

    def forward(self, attention_mask: Tensor, **tokens: Tensor) -> Any:
        (prefix,), cache, rows = self.now, self.cache, attention_mask.shape[0]
        parts = prefix.view(prefix.shape[0], len(cache.names), cache.heads, cache.width).permute(1, 2, 0, 3)
        past = [parts[number].expand(rows, -1, -1, -1) for number in range(len(cache.names))]
        mask = torch.cat([torch.ones_like(past[0][:, 0, :, 0], dtype=attention_mask.dtype), attention_mask], 1)
        filled = DynamicCache(zip(past[::2], past[1::2], strict=True))
        return self.model(attention_mask=mask, **tokens, **{cache.keyword: filled})


def trace(slotted: SlottedModel, store: TensorStore) -> onnx.ModelProto:
    """Trace token ids, attention mask, positions and slots → ``logits`` of the learned tokens, in float32. Raises
    ConfigError: torch cannot trace the model."""
    example, dynamic = examples(slotted)
    learned = LearnedLogits(slotted)
    if learned.prefix is not None:
        example[PREFIX] = torch.ones(EXAMPLE_RANK, learned.prefix.size)
        dynamic[PREFIX] = {0: Dim(VIRTUAL[PREFIX])}
    batch, sequence = Dim("batch"), Dim("sequence")
    tokens = {name: torch.ones(2, 3, dtype=torch.int64) for name in TOKENS}
    traced = graph.export(
        learned,
        {**tokens, POSITIONS: torch.tensor(EXAMPLE), "adapter": example},
        {**{name: {0: batch, 1: sequence} for name in TOKENS}, POSITIONS: {0: Dim("learned")}, "adapter": dynamic},
        inputs=[*TOKENS, POSITIONS, *example],
        outputs=[graph.ANSWER],
        store=store,
    )
    if PROMPT in example:
        accept_rows(traced)
    matmuls.normalize(traced, store)
    return traced
