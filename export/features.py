"""Bases whose embeddings are centered, or also say which tokens a text has. Each result has a digest of its own.

The embeddings of many encoders lie in a narrow cone: of multilingual-e5-small, two phrases have a cosine of .83 on
average. Then all rows of a head see nearly the same input, which acts as a second bias of each label, and devices that
hold few of the labels pull the global adapter towards theirs. So the mean over some texts is subtracted, from the bias
of the encoder's last layer norm, so that nothing else has to know of it.

Lexical features (``edgeadapt.methods.classifier``) tell apart texts whose words differ where an encoder that was not
trained on their language takes them for alike."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn

from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import IDENTITY_FILES, LEXICAL, LONGEST, MOST_LEXICAL, Base, find_base
from edgeadapt.bases.classifiergraph import MAX_TOKENS
from edgeadapt.bases.markedwords import MARKED, MARKS
from edgeadapt.bases.mediaencoder import Shift
from edgeadapt.bases.pictures import PictureReader
from edgeadapt.bases.readers import media_of
from edgeadapt.formats.bundle import TOKENIZER
from edgeadapt.formats.storage import link_or_copy, new_folder, read
from edgeadapt.methods.classifier import in_batches, pooled
from export.onnx.dequantize import copy_others
from export.onnx.slotted import has_own_head

CONFIG = IDENTITY_FILES[0]
CLOSE = 1e-3  # share of the mean's length: float32 over a few hundred additions
CHECKED = 8  # texts whose means are asked again


def centered(base: Base, texts: Sequence[str], out: Path) -> Base:
    """Write the encoder whose mean over each text's tokens is zero on average over ``texts`` to a new or empty folder.
    Raises ConfigError: the encoder does not end in a layer norm with a bias, as BERT's does, nor in a ``Shift``."""
    if not texts:
        raise ConfigError("name texts to center on", about="texts")
    with new_folder(out) as stage, torch.inference_mode():
        model, tokenizer = pretrained.encoder(base), pretrained.tokenizer(base)
        before = _means(model, tokenizer, texts)
        mean = before.mean(0)
        ends = (nn.LayerNorm, Shift)
        norms = [module for module in model.modules() if isinstance(module, ends) and module.bias is not None]
        if norms and norms[-1].bias.shape == mean.shape:
            norms[-1].bias.sub_(mean)
        moved = before[:CHECKED] - _means(model, tokenizer, texts[:CHECKED])
        if not (moved - mean).norm(dim=1).max() <= CLOSE * mean.norm():
            raise ConfigError(
                "this base cannot be centered, as it does not end in a layer norm with a bias: use it as it is",
                about="base",
            )
        model.save_pretrained(stage)
        copy_others(base, stage)
    return find_base(str(out))


def with_lexical_features(base: Base, size: int, out: Path) -> Base:
    """Write the encoder with lexical features, ``size`` numbers of each text, to a new or empty folder. They are stated
    in ``config.json``; special tokens do not count. Raises ConfigError: the size is not a multiple of 8 up to
    ``MOST_LEXICAL``, or the base has lexical features, or classifies by a head of its own."""
    if size % 8 or not 0 < size <= MOST_LEXICAL:
        reason = f"{size} lexical features: the number is a multiple of 8, up to {MOST_LEXICAL}"
        raise ConfigError(reason, about="--size")
    if has_own_head(base):
        reason = "this base has a classification head of its own, which reads no lexical features: take an encoder"
        raise ConfigError(reason, about="base")
    config = json.loads(read(base.folder / CONFIG, LONGEST[CONFIG]))
    if LEXICAL in config:
        raise ConfigError("this base has lexical features: take the base that it was made from", about=LEXICAL)
    tokenizer = pretrained.tokenizer(base)
    special = [number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    stated = {"size": size, "skipped": sorted({*special, *tokenizer.encode("").ids})}
    with new_folder(out) as stage:
        for file in base.folder.iterdir():
            if file.is_file():
                shutil.copyfile(file, stage / file.name)
        (stage / CONFIG).write_text(json.dumps(config | {LEXICAL: stated}, indent=1, sort_keys=True) + "\n")
    return find_base(str(out))


def with_marked_words(base: Base, out: Path) -> Base:
    """Write the encoder whose tokenizer knows the marks of a word (``edgeadapt.bases.markedwords``) to a new or empty
    folder. Raises ConfigError: it has marks or lexical features, reads files, or classifies by a head of its own."""
    if media_of(base.folder) or has_own_head(base):
        raise ConfigError("words are marked for an encoder of texts without a head: take one", about="base")
    config = json.loads(read(base.folder / CONFIG, LONGEST[CONFIG]))
    if key := next((key for key in (MARKED, LEXICAL) if key in config), ""):
        raise ConfigError(f"this base has {key}: take the base that it was made from", about=key)
    tokenizer = pretrained.tokenizer(base)
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    stated = [tokenizer.token_to_id(mark) for mark in MARKS]
    with new_folder(out) as stage:
        for file in base.folder.iterdir():
            if file.is_file() and file.name not in (CONFIG, TOKENIZER):
                link_or_copy(file, stage / file.name)
        tokenizer.save(str(stage / TOKENIZER))
        (stage / CONFIG).write_text(json.dumps(config | {MARKED: stated}, indent=1, sort_keys=True) + "\n")
    return find_base(str(out))


def with_pixels(base: Base, side: int, out: Path) -> Base:
    """Write the base of pictures that sees ``side`` times ``side`` pixels to a new or empty folder. A convolutional
    network may see fewer than those with which it was trained, in less time. Raises ConfigError: the base does not read
    pictures, or not of this size."""
    if media_of(base.folder) is not PictureReader:
        raise ConfigError("this base reads texts, and --pixels is for one of pictures", about="--pixels")
    sized = replace(pretrained.tokenizer(base), height=side, width=side)
    with new_folder(out) as stage:
        for file in base.folder.iterdir():
            if file.is_file() and file.name != TOKENIZER:
                link_or_copy(file, stage / file.name)
        (stage / TOKENIZER).write_text(sized.to_str(), encoding="utf-8")
        pretrained.encoder(Base(stage, ""))
    return find_base(str(out))


def _means(model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.no_padding()
    rows = [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]
    return in_batches(lambda ids, mask: pooled(model, ids, mask), rows)
