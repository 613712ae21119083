"""A frozen classifier or encoder, exported once for every adapter of its layers."""

from pathlib import Path

from onnx import checker
from peft import PeftModel
from tokenizers import Tokenizer
from torch import nn

from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base
from edgeadapt.formats.bundle import TOKENIZER, TRAINING
from edgeadapt.formats.workfolder import WorkFolder
from export.onnx import graph, headers, rows
from export.onnx.calibrate import SHORT_TEXT, TEXT, TOKENS
from export.onnx.dequantize import as_stored
from export.onnx.exported import MAX_RANK, ExportedBase, Profile, metadata, written
from export.onnx.gradients import check_gradients
from export.onnx.peftmodel import SlottedModel, with_inputs
from export.onnx.quantize import quantize
from export.onnx.tasks import check_classifies, check_reads_embeddings, readable_length
from export.onnx.training import training_graph


def export_classifier(
    model: PeftModel | SlottedModel,
    base: Base,
    profile: Profile,
    max_rank: int = MAX_RANK,
    where: Path | None = None,
    *,
    training: bool | None = False,
) -> ExportedBase:
    """Export the base of ``model`` in a few seconds; no tensor of its adapter gets into the result.

    The adapter of ``model`` names the layers that get slots. ``training``: with a training graph; None: if it can have
    one.

    Raises ConfigError: the model has block-sparse attention or cannot be exported; its graph does not run; nothing
    limits the length of a text; or it cannot have the training graph that it shall have.
    """
    if getattr(pretrained.configuration(base), "attention_type", None) == "block_sparse":
        # transformers reads short texts, and whatever follows them, with full attention: which answer is right depends.
        raise ConfigError(
            "block-sparse attention cannot be exported: set attention_type to original_full in config.json, and train "
            "adapters with it",
            about="attention_type",
        )
    tokenizer = pretrained.tokenizer(base)
    tokenizer.no_padding()  # a device does not need padding
    slotted = SlottedModel.of(model) if isinstance(model, PeftModel) else model
    check_classifies(slotted.model, tokenizer.encode(SHORT_TEXT).ids)
    if slotted.inputs.virtual:
        check_reads_embeddings(slotted.model, tokenizer.encode(SHORT_TEXT).ids)
    longest = _limit(base, tokenizer, slotted.model)
    tokenizer.enable_truncation(longest)
    ids = tokenizer.encode(TEXT).ids[:TOKENS]
    plain = graph.trace(slotted)
    traced = quantize(plain, profile, ids)
    checker.check_model(traced)
    untrainable, backward, stored = "", None, slotted
    if training is not False:
        try:
            backward = training_graph(plain, slotted, traced, profile)
            stored = as_stored(slotted, profile, traced)
        except ConfigError as error:
            untrainable = _unless(training, error)
    slots = graph.slots(traced)
    runtime, opset = headers.requirements(traced)
    work, about = WorkFolder(where), metadata(base, "text-classification", profile, runtime)
    difference: float | None = None
    digests = headers.split(traced, slots, about, work.path, training=backward) | written(
        work.path, {TOKENIZER: str(tokenizer.to_str()).encode()}
    )
    if backward is not None:
        opset = max(opset, headers.requirements(backward)[1])
        try:
            difference = check_gradients(work.path, with_inputs(stored), slots, ids, longest)
        except ConfigError as error:
            untrainable = _unless(training, error)
            del digests[TRAINING]
            (work.path / TRAINING).unlink()
    return ExportedBase(
        base_digest=base.digest,
        task="text-classification",
        profile=profile,
        adapter_inputs=slotted.inputs,
        slots=slots,
        max_rank=max_rank,
        onnxruntime=runtime,
        opset=opset,
        work=work,
        digests=digests,
        independent_rows=rows.independent_rows(work.path, slots, ids, longest),
        merged=base.merged,
        untrainable=untrainable,
        gradients=difference,
    )


def _unless(demanded: bool | None, error: ConfigError) -> str:
    """Explain why there is no training graph, unless one is demanded."""
    if demanded:
        raise error
    return str(error)


def _limit(base: Base, tokenizer: Tokenizer, model: nn.Module) -> int:
    """Count the tokens of the longest text that the model reads."""
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
