"""Move a base's embeddings so that those of some texts have mean zero.

The embeddings of many encoders lie in a narrow cone: of multilingual-e5-small, two phrases have a cosine of .83 on
average. Then all rows of a head see nearly the same input, which acts as a second bias of each label, and devices that
hold few of the labels pull the global adapter towards theirs. The mean is subtracted from the bias of the encoder's
last layer norm, so that nothing else has to know of it; the result is a base with a digest of its own.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel

from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base, find_base
from edgeadapt.bases.classifiergraph import MAX_TOKENS
from edgeadapt.formats.storage import new_folder
from edgeadapt.methods.classifier import in_batches, pooled
from export.onnx.dequantize import copy_others

CLOSE = 1e-3  # share of the mean's length: float32 over a few hundred additions


def centered(base: Base, texts: Sequence[str], out: Path) -> Base:
    """Write the encoder whose mean over each text's tokens is zero on average over ``texts`` to a new or empty folder.
    Raises ConfigError: the encoder does not end in a layer norm with a bias, as BERT's does."""
    if not texts:
        raise ConfigError("name texts to center on", about="texts")
    with new_folder(out) as stage, torch.inference_mode():
        model, tokenizer = pretrained.load(base, AutoModel), pretrained.tokenizer(base)
        mean = _means(model, tokenizer, texts).mean(0)
        norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm) and module.bias is not None]
        if norms and norms[-1].bias.shape == mean.shape:
            norms[-1].bias.sub_(mean)
        if not _means(model, tokenizer, texts).mean(0).norm() <= CLOSE * mean.norm():
            raise ConfigError(
                "this base cannot be centered, as it does not end in a layer norm with a bias: use it as it is",
                about="base",
            )
        model.save_pretrained(stage)
        copy_others(base, stage)
    return find_base(str(out))


def _means(model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Mean over each text's tokens, shape ``(texts, hidden)``."""
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.no_padding()
    rows = [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]
    return in_batches(lambda ids, mask: pooled(model(input_ids=ids, attention_mask=mask)[0], mask), rows)
