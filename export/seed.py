"""The first adapter of a federation, written as a PEFT folder: a classifier's from a few public phrases for each label.
``edgeadapt coordinator publish`` takes the folder. It holds what ``peft`` saves, and a classifier's ``labels.txt``."""

from collections.abc import Sequence
from pathlib import Path

import torch

from edgeadapt.bases.base import Base
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.storage import new_folder
from edgeadapt.methods import causal, classifier
from edgeadapt.methods.peft.folder import LABELS


def write_seed(
    base: Base, phrases: Sequence[tuple[str, str]], config: PeftConfig, seed: int, out: Path
) -> tuple[str, ...]:
    """Make the first adapter and write its folder, completely or not at all. Returns the labels of the head's rows.

    Labels first appear in ``phrases`` in the order of the head's rows; a language model has none. ``seed`` draws LoRA's
    A matrices, or the tokens as which virtual tokens begin. Raises ConfigError: ``out`` holds something, or there is
    one label."""
    labels, generator = tuple(dict.fromkeys(label for label, _ in phrases)), torch.Generator().manual_seed(seed)
    with new_folder(out) as stage:
        if labels:
            model = classifier.build(base, len(labels), config)
            numbered = [(phrase, labels.index(label)) for label, phrase in phrases]
            tokens = classifier.tokenizer(base, model)
            classifier.load(model, classifier.seed_adapter(model, tokens, numbered, len(labels), generator))
        else:
            model = causal.build(base, config)
            causal.require_private(model)
            causal.load(model, causal.initial(model, generator))
        model.save_pretrained(str(stage), save_embedding_layers=False)
        (stage / "README.md").unlink(missing_ok=True)  # peft's, with nothing filled in
        if labels:
            (stage / LABELS).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    return labels
