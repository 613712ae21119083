"""The trainable view of a frozen encoder: mean pooling, a linear head, and LoRA through peft on chosen projections.

One function builds it, so that the vendor's seed, every device and the exporter hold the same module with the same
tensor names. Training loops live on the device (``client/training/trainer.py``), the ONNX graph in ``export/``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from adapters import pretrained
from adapters.base import Base
from adapters.graphinputs import PEFT_PREFIX
from adapters.layout import Floats, Tensors
from adapters.peftconfig import LoraSpec as LoraSpec
from aggregation.errors import ConfigError

MAX_TOKENS = 128  # of a text that is trained on or embedded
BATCH = 16  # texts that are embedded or scored at once
ENCODER = "encoder."  # begins the path of everything below a ``PhraseClassifier``'s head
HEAD_SCALE = 16.0  # logit of a phrase that lies exactly on its intent's prototype; a softmax temperature of 1/16


class PhraseClassifier(nn.Module):
    """``encoder`` → mean over the tokens that are not padding → unit length → linear ``classifier``."""

    def __init__(self, encoder: nn.Module, hidden: int, labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(hidden, labels)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit embeddings, shape ``(batch, hidden)``, of token ids of shape ``(batch, sequence)``."""
        states: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        return nn.functional.normalize(pooled(states, attention_mask), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, shape ``(batch, labels)``."""
        logits: Tensor = self.classifier(self.embed(input_ids, attention_mask))
        return logits


def pooled(states: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean over the tokens that are not padding, shape ``(batch, hidden)``."""
    weights = attention_mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1.0)


def build(base: Base, labels: int, lora: LoraSpec) -> PeftModel:
    """The base with a fresh adapter, in evaluation mode: every parameter frozen but LoRA's and the head's.

    The fresh adapter has peft's own random values; ``load`` sets others, ``seeded`` makes the vendor's.

    Raises:
        ConfigError: Fewer than two labels, a base that cannot be opened, no module of it bears a target's name, or one
            that does is not a linear layer.
    """
    if labels < 2:
        raise ConfigError(f"a classifier needs at least two labels, got {labels}", about="labels", value=labels)
    encoder = pretrained.load(base, AutoModel)
    return adapted(PhraseClassifier(encoder, encoder.config.hidden_size, labels), lora, modules_to_save=["classifier"])


def adapted(model: nn.Module, lora: LoraSpec, **settings: Any) -> PeftModel:
    """A frozen model with a fresh LoRA adapter on linear layers, in evaluation mode.

    Args:
        model: In evaluation mode.
        lora: Of the adapter.
        settings: Others of peft's ``LoraConfig``.

    Raises:
        ConfigError: No module of it bears a target's name, or one that does is not a linear layer.
    """
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), **settings)
    try:
        found = get_peft_model(model, config).eval()
    except ValueError as error:
        names = pretrained.layer_names(model)
        raise ConfigError(
            f"the base has no module named as in {list(lora.targets)}; it has {names}", about="target_modules"
        ) from error
    _require_linear(found)
    return found


def _require_linear(model: PeftModel) -> None:
    """Return if LoRA adapts linear layers only: the update of an embedding names the tokens of the examples.

    Raises:
        ConfigError: It adapts another one.
    """
    layers = {path: layer.get_base_layer() for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    for path, layer in layers.items():
        if not isinstance(layer, nn.Linear | Conv1D):  # the latter is a linear layer with transposed weights
            name = path.removeprefix(PEFT_PREFIX)
            raise ConfigError(
                f"target_modules name {name}, which is not a linear layer but {layer}: LoRA on an embedding would show"
                " which tokens the examples have; name linear layers only",
                about="target_modules",
            )


def tensors(model: PeftModel) -> Tensors:
    """Copies of the adapter's tensors as float32 arrays, under the names that PEFT saves."""
    state = get_peft_model_state_dict(model)
    return {name: value.detach().to(torch.float32).numpy().copy() for name, value in state.items()}


def load(model: PeftModel, adapter: Mapping[str, Floats]) -> None:
    """Set the adapter's values. The caller has checked them against the layout."""
    set_peft_model_state_dict(model, {name: torch.from_numpy(np.array(value)) for name, value in adapter.items()})


def tokenizer(base: Base, model: PeftModel) -> Tokenizer:
    """The base's tokenizer. It cuts texts off at ``MAX_TOKENS``, or earlier if the base has fewer positions."""
    found = Tokenizer.from_file(str(base.folder / "tokenizer.json"))
    found.enable_truncation(min(MAX_TOKENS, model.get_base_model().encoder.config.max_position_embeddings))
    found.no_padding()
    return found


def padded(tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both of shape ``(len(tokens), longest)``."""
    ids = pad_sequence(list(tokens), batch_first=True)
    return ids, pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)


def in_batches(forward: Callable[[Tensor, Tensor], Tensor], tokens: Sequence[Tensor]) -> Tensor:
    """The rows that a model gives for texts, in batches of similar length, which need little padding.

    Args:
        forward: Token ids and attention mask of a batch → one row for each text.
        tokens: The ids of each text; at least one text.

    Returns:
        The rows in the order of ``tokens``.
    """
    order = sorted(range(len(tokens)), key=lambda text: len(tokens[text]))
    batches = [[tokens[text] for text in order[at : at + BATCH]] for at in range(0, len(order), BATCH)]
    return torch.cat([forward(*padded(batch)) for batch in batches])[np.argsort(order)]


def embed(model: PeftModel, tokens: Tokenizer, texts: Sequence[str]) -> Floats:
    """Embeddings of the frozen base without adapter, shape ``(len(texts), hidden)``, each of L2 norm 1."""
    ids = [torch.tensor(encoding.ids) for encoding in tokens.encode_batch(list(texts))]
    with torch.inference_mode(), model.disable_adapter():
        return in_batches(model.get_base_model().embed, ids).numpy()


def seed_adapter(
    model: PeftModel, tokens: Tokenizer, phrases: Sequence[tuple[str, int]], labels: int, generator: torch.Generator
) -> Tensors:
    """The first adapter of a federation: ``seeded`` with the summed embeddings of each label's phrases.

    Args:
        model: From ``build``.
        tokens: From ``tokenizer``.
        phrases: At least one, each with the number of its label.
        labels: Rows of the head.
        generator: As for ``seeded``.

    Returns:
        float32 tensors under the names that PEFT saves. Guarantee: the LoRA update is zero, so that the classifier
        answers with the label whose phrases are nearest in the base's embedding space.
    """
    embeddings = embed(model, tokens, [text for text, _ in phrases])
    sums = np.zeros((labels, embeddings.shape[1]), np.float32)
    np.add.at(sums, [label for _, label in phrases], embeddings)
    return seeded(model, sums, generator)


def seeded(model: PeftModel, prototypes: Floats, generator: torch.Generator) -> Tensors:
    """The adapter on day one: LoRA that changes nothing (B = 0, A drawn as in its paper), a prototype head.

    Args:
        model: From ``build``.
        prototypes: Shape ``(labels, hidden)``, a mean embedding for each label; zero rows for labels without phrases.
        generator: Draws A; the same generator state gives the same adapter.
    """
    start = tensors(model)
    for name, value in start.items():
        if ".lora_A." in name:
            bound = 1 / np.sqrt(value.shape[1])
            draw = torch.rand(value.shape, generator=generator, dtype=torch.float32)
            start[name] = ((2 * draw - 1) * bound).numpy()
        elif ".lora_B." in name:
            start[name] = np.zeros_like(value)
        elif name.endswith("classifier.weight"):
            lengths = np.linalg.norm(prototypes, axis=1, keepdims=True)
            start[name] = (HEAD_SCALE * prototypes / np.maximum(lengths, 1e-12)).astype(np.float32)
        elif name.endswith("classifier.bias"):
            start[name] = np.zeros_like(value)
    return start
