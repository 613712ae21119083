"""The first adapter of a federation, made from a few public phrases for each label and written as a PEFT folder.

``edgeadapt coordinator publish`` takes the folder. It holds what ``peft`` saves, and ``labels.txt``.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from adapters import classifier
from adapters.base import Base
from adapters.classifier import LoraSpec
from adapters.peft.folder import LABELS
from adapters.storage import new_folder


def write_seed(base: Base, phrases: Sequence[tuple[str, str]], lora: LoraSpec, seed: int, out: Path) -> tuple[str, ...]:
    """Make the first adapter and write its folder, completely or not at all.

    Args:
        base: The frozen base.
        phrases: Labels and phrases. The labels' order of first appearance is that of the head's rows.
        lora: Of the adapter.
        seed: Draws LoRA's A matrices.
        out: A new folder.

    Returns:
        The labels, in the order of the head's rows.

    Raises:
        ConfigError: ``out`` holds something, there are fewer than two labels, or as ``classifier.build``.
        OSError: The folder cannot be written.
    """
    labels = tuple(dict.fromkeys(label for label, _ in phrases))
    with new_folder(out) as stage:
        model = classifier.build(base, len(labels), lora)
        numbered = [(phrase, labels.index(label)) for label, phrase in phrases]
        tokens, generator = classifier.tokenizer(base, model), torch.Generator().manual_seed(seed)
        classifier.load(model, classifier.seed_adapter(model, tokens, numbered, len(labels), generator))
        model.save_pretrained(str(stage), save_embedding_layers=False)
        (stage / "README.md").unlink(missing_ok=True)  # peft's, with nothing filled in
        (stage / LABELS).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    return labels
