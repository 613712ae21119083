"""The trainable view of a frozen encoder: mean pooling, a linear head, and an adapter of one of peft's methods. One
function builds it, so that the vendor's seed, every device and the exporter hold the same module with the same tensor
names. Training loops live on the device (``client/training``), the ONNX graph in ``export/``."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import LEXICAL, MOST_LEXICAL, Base
from edgeadapt.bases.classifiergraph import MAX_TOKENS
from edgeadapt.bases.marks import Marks
from edgeadapt.bases.mediaencoder import MediaEncoder
from edgeadapt.bases.tasks import OwnTask
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.trainable import adapted, initial
from edgeadapt.methods.trainable import load as load
from edgeadapt.methods.trainable import tensors as tensors

BATCH = 16  # texts that are embedded or scored at once
HEAD_SCALE = 16.0  # logit of a phrase that lies exactly on its intent's prototype; a softmax temperature of 1/16
BUCKETS = 4096  # tokens whose numbers are equal modulo this share a row


class LexicalFeatures(nn.Module):
    """Says which tokens a text has, in whatever order: the sum of a row of random signs for each, at unit length. A
    text of n different tokens is nearly at right angles to one that shares none of them (random indexing: Kanerva et
    al. 2000; Achlioptas 2003). The rows are the same in every base: bits of SHAKE-256."""

    signs: Tensor  # shape (BUCKETS, size), of -1, 1, and 0 for what does not count

    def __init__(self, size: int, skipped: Sequence[int]) -> None:
        super().__init__()
        self.size = size
        stream = hashlib.shake_256(b"edgeadapt lexical features 1").digest(BUCKETS * size // 8)
        signs = 2 * np.unpackbits(np.frombuffer(stream, np.uint8)).reshape(BUCKETS, size).astype(np.int8) - 1
        signs[[number % BUCKETS for number in skipped]] = 0
        self.register_buffer("signs", torch.from_numpy(signs), persistent=False)

    @classmethod
    def of(cls, config: Any) -> Self | None:
        """Make those that a base's configuration states, if it does. Raises ConfigError: it is damaged."""
        if (stated := getattr(config, LEXICAL, None)) is None:
            return None
        try:
            size, skipped = stated["size"], [*stated["skipped"]]
            sound = type(size) is int and size % 8 == 0 and 0 < size <= MOST_LEXICAL
            sound = sound and all(type(number) is int and number >= 0 for number in skipped)
        except (KeyError, TypeError):
            sound = False
        if not sound:
            reason = f"{LEXICAL} in config.json is damaged: make it again with 'base change --lexical'"
            raise ConfigError(reason, about=LEXICAL)
        return cls(size, skipped)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        rows = self.signs[input_ids % BUCKETS].to(torch.float32)
        return nn.functional.normalize((rows * attention_mask.unsqueeze(-1)).sum(1), dim=-1)


class PhraseClassifier(nn.Module):
    """Maps ``encoder`` → mean over the tokens that are not padding, or places of a picture → unit length → linear
    ``classifier``. A base with lexical features has these beside the mean, as long as it; both together have unit
    length."""

    def __init__(self, encoder: Any, labels: int) -> None:
        """Raises ConfigError as ``LexicalFeatures.of``."""
        super().__init__()
        self.encoder = encoder
        self.lexical = LexicalFeatures.of(encoder.config)
        self.width = encoder.config.hidden_size + (self.lexical.size if self.lexical else 0)
        self.classifier = nn.Linear(self.width, labels)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return unit embeddings, shape ``(batch, width)``, of token ids of shape ``(batch, sequence)``."""
        meaning = nn.functional.normalize(pooled(self.encoder, input_ids, attention_mask), dim=-1)
        if self.lexical is None:
            return meaning
        return nn.functional.normalize(torch.cat([meaning, self.lexical(input_ids, attention_mask)], -1), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits, shape ``(batch, labels)``."""
        logits: Tensor = self.classifier(self.embed(input_ids, attention_mask))
        return logits


def pooled(encoder: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the mean state over the tokens that are not padding, or over places, shape ``(batch, hidden)``; of a base
    with marks over those of the marked word, if there is one."""
    states: Tensor = encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
    if isinstance(encoder, MediaEncoder):
        return states.mean(1)
    if marks := Marks.of(encoder.config):
        attention_mask = marks.weights(input_ids, attention_mask)
    weights = attention_mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1.0)


def build(base: Base, labels: int, config: PeftConfig) -> PeftModel:
    """Build the base with a fresh adapter, in evaluation mode: every parameter frozen but the adapter's and the head's.
    The fresh adapter has peft's own random values; ``load`` sets others, ``seeded`` makes the vendor's. Raises
    ConfigError: fewer than two labels, a base that cannot be opened, virtual tokens, or as ``trainable.adapted``."""
    if labels < 2 and not isinstance(base.task, OwnTask):
        raise ConfigError(f"a classifier needs at least two labels, got {labels}", about="labels")
    if config.num_virtual_tokens:
        raise ConfigError(
            f"{config.peft_type} puts virtual tokens before a text, and a head over the mean of the tokens has none, in"
            " peft neither: train another method",
            about="num_virtual_tokens",
        )
    return adapted(PhraseClassifier(pretrained.encoder(base), labels), config, heads=["classifier"])


def tokenizer(base: Base, model: PeftModel) -> Any:
    """Return the base's ``Reader``, which cuts texts at ``MAX_TOKENS``, or earlier if the base has fewer positions."""
    loaded, config = pretrained.tokenizer(base), model.get_base_model().encoder.config
    loaded.enable_truncation(min(MAX_TOKENS, getattr(config, "max_position_embeddings", MAX_TOKENS)))
    loaded.no_padding()
    return loaded


def padded(tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, both of shape ``(len(tokens), longest)``."""
    ids = pad_sequence(list(tokens), batch_first=True)
    return ids, pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)


def in_batches(forward: Callable[[Tensor, Tensor], Tensor], tokens: Sequence[Tensor]) -> Tensor:
    """Apply ``forward`` to at least one text, in batches of similar length, which need little padding. ``forward`` maps
    token ids and attention mask of a batch to one row for each text. Rows keep the order of ``tokens``."""
    order = sorted(range(len(tokens)), key=lambda text: len(tokens[text]))
    batches = [[tokens[text] for text in order[at : at + BATCH]] for at in range(0, len(order), BATCH)]
    return torch.cat([forward(*padded(batch)) for batch in batches])[np.argsort(order)]


def embed(model: PeftModel, tokens: Any, texts: Sequence[str]) -> Floats:
    """Embed texts with the frozen base without adapter: shape ``(len(texts), width)``, each of L2 norm 1."""
    ids = [torch.tensor(encoding.ids) for encoding in tokens.encode_batch(list(texts))]
    with torch.inference_mode(), model.disable_adapter():
        return in_batches(model.get_base_model().embed, ids).numpy()


def seed_adapter(
    model: PeftModel, tokens: Any, phrases: Sequence[tuple[str, int]], labels: int, generator: torch.Generator
) -> Tensors:
    """Make the first adapter of a federation, ``seeded`` with the summed embeddings of each label's phrases, at least
    one, each with the number of its label. Guarantee: it changes nothing, so that the classifier answers with the label
    whose phrases are nearest in the base's embedding space."""
    embeddings = embed(model, tokens, [text for text, _ in phrases])
    sums = np.zeros((labels, embeddings.shape[1]), np.float32)
    np.add.at(sums, [label for _, label in phrases], embeddings)
    return seeded(model, sums, generator)


def seeded(model: PeftModel, prototypes: Floats, generator: torch.Generator) -> Tensors:
    """Make the adapter on day one: one that changes nothing (``trainable.initial``), and a prototype head.
    ``prototypes``: shape ``(labels, width)``, a mean embedding for each label; zero rows for labels without phrases.
    ``generator``: draws LoRA's A; the same generator state gives the same adapter."""
    start = initial(model, generator)
    for name, value in start.items():
        if name.endswith("classifier.weight"):
            lengths = np.linalg.norm(prototypes, axis=1, keepdims=True)
            start[name] = (HEAD_SCALE * prototypes / np.maximum(lengths, 1e-12)).astype(np.float32)
        elif name.endswith("classifier.bias"):
            start[name] = np.zeros_like(value)
    return start
