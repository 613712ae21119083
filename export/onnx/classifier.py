"""A frozen classifier or encoder, exported once for every adapter of its layers."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from onnx import ModelProto, checker
from tokenizers import Tokenizer
from torch import nn

from aggregation.errors import ConfigError, one_line
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base
from edgeadapt.bases.classifiergraph import LABELS, ClassifierGraph
from edgeadapt.bases.media import MediaReader
from edgeadapt.formats.bundle import LOWER, MODEL, TOKENIZER, TRAINING, UPPER
from edgeadapt.formats.graphinputs import GIVEN, OFFSET, PROMPT, RANKED, REPLACED, SCALES, UP_BIAS
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.formats.manifest import BaseManifest
from edgeadapt.formats.storage import WorkFolder
from export.onnx import graph, headers
from export.onnx.calibrate import SHORT_TEXT, TEXT, TOKENS
from export.onnx.dequantize import as_stored
from export.onnx.exported import MAX_RANK, ExportedBase, Profile, metadata, written
from export.onnx.gradients import check_gradients
from export.onnx.peftmodel import SlottedModel, with_inputs
from export.onnx.quantize import quantize
from export.onnx.tasks import check_classifies, check_reads_embeddings, readable_length
from export.onnx.training import answering_parts, training_graphs


def export_classifier(
    slotted: SlottedModel,
    base: Base,
    profile: Profile,
    max_rank: int = MAX_RANK,
    where: Path | None = None,
    *,
    training: bool | None = False,
) -> ExportedBase:
    """Export a base in a few seconds, with slots for the adapters of any task. ``training``: with a training graph;
    None: if it can have one. Raises ConfigError: the model has block-sparse attention or cannot be exported; its graph
    does not run; nothing limits the length of a text; or it cannot have the training graph that it shall have."""
    if getattr(pretrained.configuration(base), "attention_type", None) == "block_sparse":
        # transformers reads short texts, and whatever follows them, with full attention: which answer is right depends.
        raise ConfigError(
            "block-sparse attention cannot be exported: set attention_type to original_full in config.json, and train "
            "adapters with it",
            about="attention_type",
        )
    tokenizer = pretrained.tokenizer(base)
    if isinstance(tokenizer, MediaReader):
        shortest = longest = tokenizer.size
        ids = tokenizer.drawn().tolist()
        check_classifies(slotted.model, ids)
    else:
        tokenizer.no_padding()  # a device does not need padding
        check_classifies(slotted.model, tokenizer.encode(SHORT_TEXT).ids)
        if slotted.inputs.virtual:
            check_reads_embeddings(slotted.model, tokenizer.encode(SHORT_TEXT).ids)
        shortest, longest = 1, _limit(base, tokenizer, slotted.model)
        tokenizer.enable_truncation(longest)
        ids = tokenizer.encode(TEXT).ids[:TOKENS]
    plain = graph.trace(slotted)
    traced = quantize(plain, profile, ids)
    checker.check_model(traced)
    untrainable, stored, graphs = "", slotted, dict[str, ModelProto]()
    if training is not False:
        try:
            graphs = training_graphs(plain, slotted, traced, profile, ids)
            stored = as_stored(slotted, profile, traced)
        except ConfigError as error:
            untrainable = _unless(training, error)
    elif slotted.cut:
        with suppress(ConfigError):  # then it answers with the whole graph
            graphs = answering_parts(plain, traced)
    slots = graph.slots(traced)
    runtime, opset = headers.requirements(traced)
    work, about = WorkFolder(where), metadata(base, "text-classification", profile, runtime)
    difference: float | None = None
    digests = headers.split(traced, slots, about, work.path, others=graphs) | written(
        work.path, {TOKENIZER: str(tokenizer.to_str()).encode()}
    )
    if TRAINING in graphs:
        opset = max(opset, headers.requirements(graphs[TRAINING])[1])
        try:
            difference = check_gradients(work.path, with_inputs(stored), slots, ids, (shortest, longest))
        except ConfigError as error:
            untrainable = _unless(training, error)
            for name in graphs:
                del digests[name]
                (work.path / name).unlink()
    manifest = BaseManifest(
        base_digest=base.digest,
        task="text-classification",
        profile=profile.value,
        files=digests,
        slots=slots,
        max_rank=max_rank,
        independent_rows=independent_rows(work.path, digests, slots, ids, (shortest, longest)),
        onnxruntime=runtime,
        opset=opset,
        merged=dict(base.merged),
    )
    return ExportedBase(manifest, slotted.inputs, work, untrainable, difference)


def _unless(demanded: bool | None, error: ConfigError) -> str:
    if demanded:
        raise error
    return str(error)


def _limit(base: Base, tokenizer: Tokenizer, model: nn.Module) -> int:
    config = pretrained.configuration(base)
    positions = getattr(config, "max_position_embeddings", None)  # transformers maps each family's own name to it
    limits = [n for n in (positions, (tokenizer.truncation or {}).get("max_length")) if n and n > 0]
    if not limits:
        raise ConfigError(
            f"neither config.json nor tokenizer.json in {base.folder} limits the length of a text; state "
            "max_position_embeddings in config.json",
            about="max_position_embeddings",
        )
    tokenizer.no_truncation()
    ids = tokenizer.encode(TEXT).ids
    # Padding may have no position of its own; families that number positions take 0 or 1 for it whatever they state.
    counted = [token for token in ids if token not in (0, 1, config.pad_token_id)]
    return readable_length(model, counted or ids, min(limits))


RANK, ROWS = 4, 3  # rank and virtual tokens of the adapters that are tried; texts, and labels
LONGEST = 1024  # tokens
TOLERANCE = 2e-3  # difference of a logit, relative to the largest: rounding in int8 stays below a tenth of it


def open_base(
    folder: Path, files: Collection[str], slots: Mapping[str, tuple[str, ...]], independent_rows: bool
) -> ClassifierGraph:
    graphs = {name: (folder / name).read_bytes() for name in (MODEL, LOWER, UPPER) if name in files}
    return ClassifierGraph.open(graphs, folder, slots, independent_rows)


def independent_rows(
    folder: Path,
    files: Collection[str],
    slots: Mapping[str, tuple[str, ...]],
    ids: Sequence[int],
    most: tuple[int, int],
) -> bool:
    """Check whether three texts get the same logits alone and in a mixed batch, each with an adapter of its own.

    In some encoders, padding or the other rows leak in (a convolution over padding, a Fourier transform or blocks over
    the whole length, one activation scale for a whole batch), and some layers read inputs whose first dimension is not
    the rows. None of this shows in a configuration, so it is measured.

    ``ids``: the tokens of a text, which the texts repeat; ``most``: tokens of the shortest and of the longest text that
    the base reads.
    Raises ConfigError: the graph does not run, or gives an answer that is not finite."""
    longest = max(most[0], min(most[1], LONGEST) - (RANK if PROMPT in slots else 0))
    lengths = sorted({max(most[0], length) for length in (min(3, longest), longest // 3, longest)})
    texts = [list(np.resize(ids, length)) for length in (lengths * ROWS)[:ROWS]]
    adapters = [_random(slots, seed) for seed in range(ROWS)]
    graph = open_base(folder, files, slots, True)
    try:
        alone = [graph.logits(text, graph.feeds(one)) for text, one in zip(texts, adapters, strict=True)]
    except Exception as error:  # onnxruntime raises classes without a common base
        reason = one_line(error)
        raise ConfigError(
            f"the exported graph does not run: {reason}; use another base", about="onnxruntime"
        ) from error
    if not np.isfinite(alone).all():
        raise ConfigError("the exported graph gives an answer that is not finite; use another base", about="logits")
    try:
        mixed = graph.mixed(texts, adapters)
    except Exception:
        return False
    return bool(np.allclose(mixed, alone, rtol=0, atol=TOLERANCE * float(np.abs(alone).max())))


def _random(slots: Mapping[str, tuple[str, ...]], seed: int) -> Tensors:
    """Draw an adapter whose updates are about as large as what a layer reads; ``seed`` draws what rows do not share."""
    rng, common = np.random.default_rng(seed), np.random.default_rng(ROWS)
    result = {}
    for name, dimensions in slots.items():
        lora = name.endswith(RANKED)
        own = lora or LABELS in dimensions or name == PROMPT or name.endswith((*SCALES, OFFSET, *UP_BIAS))
        shape = [_size(text) for text in dimensions]
        drawn: Floats = (rng if own else common).standard_normal(shape).astype(np.float32)
        # (in, rank) for A, (rank, out) for B, (out, in) for other weights: keeps the variance of what a layer reads.
        width = shape[0] if lora else shape[-1]
        result[name] = drawn / np.float32(np.sqrt(width))
        if name.endswith((*SCALES, REPLACED)):
            result[name] += 1
    return result


def _size(dimension: str) -> int:
    if dimension.isdigit():
        return int(dimension)
    return ROWS if dimension == LABELS else 1 if dimension.startswith(GIVEN) else RANK
