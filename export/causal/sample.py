"""Torch's logits for a short text, and whether a graph gives the same: every exported graph is compared before use. A
graph that leaves out a part of a configuration (a scaled rotary embedding, a window, a norm without weights) runs
without an error; only its logits show it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from aggregation.errors import ConfigError, one_line
from edgeadapt.formats.layout import Floats
from export.onnx.calibrate import TEXT, TOKENS
from export.onnx.exported import Report, counted
from export.onnx.graph import ANSWER
from export.onnx.segments import Segments
from export.onnx.tensorstore import TensorStore, size_of

CLOSE = 1e-3  # share of the largest logit; summing the same numbers in another order differs by 1e-5
ONE_BY_ONE = 4  # last tokens, which are read one by one with the cache of the tokens before


@dataclass(frozen=True, slots=True)
class Sample:
    ids: NDArray[np.int64]  # (1, tokens)
    logits: Floats  # (1, tokens, vocabulary)
    # Where rotary embeddings change with the length (longrope): the first position that has the others, and the logits
    # of the same tokens from there on, which a short text does not show.
    far: tuple[int, Floats] | None = None


def sample_logits(model: Any, tokenizer: Tokenizer) -> Sample:
    """Run a causal language model, in evaluation mode, in torch on the calibration text. Raises ConfigError: the model
    cannot read the tokenizer's tokens."""
    length = min(TOKENS, getattr(model.config, "max_position_embeddings", None) or TOKENS)
    ids = torch.tensor([tokenizer.encode(TEXT).ids[:length]], dtype=torch.int64)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    try:
        with torch.no_grad():
            logits, far = model(**text).logits.numpy(), _far(model, text)
    except (IndexError, RuntimeError) as error:
        raise ConfigError(
            f"the base cannot read a text of its own tokenizer: {one_line(error)}", about="tokenizer.json"
        ) from error
    return Sample(ids.numpy(), logits, far)


def matches(graph: onnx.ModelProto, sample: Sample, store: TensorStore, report: Report = lambda *_: None) -> bool:
    """Whether a graph runs and gives torch's logits, reading the text at once and through its KV cache. Guarantee: if
    true, no logit is off by more than ``CLOSE`` times the largest absolute logit of the sample."""
    try:
        runs = 1 + min(ONE_BY_ONE, sample.ids.shape[1] - 1)
        total = runs * size_of(graph) * (1 if sample.far is None else 2)
        segments = Segments(graph, store, counted(report, "comparing with torch", total))
        pairs = [(_logits(graph, segments, sample.ids), sample.logits)]
        if sample.far is not None:
            start, logits = sample.far
            pairs.append((_logits(graph, segments, sample.ids, start), logits))
    except Exception:  # onnxruntime raises several classes of its own, with no common base
        return False
    return all(np.abs(found - expected).max() <= CLOSE * np.abs(expected).max() for found, expected in pairs)


def _far(model: Any, text: dict[str, Any]) -> tuple[int, Floats] | None:
    if (start := _long_from(model.config)) is None:
        return None
    positions = torch.arange(start, start + text["input_ids"].shape[1])[None]
    logits: Floats = model(**text, position_ids=positions).logits.numpy()
    return start, logits


def _long_from(config: Any) -> int | None:
    """Find the first position that only long texts have, where rotary embeddings have other factors for these."""
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    for stated in (rope, *rope.values()):  # of all layers, or of each type of layers
        if isinstance(stated, dict) and stated.get("rope_type") == "longrope":
            return int(stated["original_max_position_embeddings"])
    return None


def _logits(graph: onnx.ModelProto, segments: Segments, ids: NDArray[np.int64], start: int = 0) -> Floats:
    inputs = {value.name: value.type.tensor_type.shape.dim for value in graph.graph.input}
    outputs = [value.name for value in graph.graph.output]
    # (rows, heads, past tokens, width)
    cache = {
        name: np.zeros((1, d[1].dim_value, 0, d[3].dim_value), np.float32)
        for name, d in inputs.items()
        if name.startswith("past")
    }
    length = ids.shape[1]
    ends, begin, answers = range(max(1, length - ONE_BY_ONE), length + 1), 0, []
    for end in ends:
        feeds = {"input_ids": ids[:, begin:end], "attention_mask": np.ones((1, end), np.int64), **cache}
        if "position_ids" in inputs or start:  # a graph that counts for itself cannot be shown a far position
            feeds["position_ids"] = np.arange(start + begin, start + end)[None]
        answer = segments.run(outputs, feeds)
        cache = {name: answer[name.replace("past_key_values", "present")] for name in cache}
        answers.append(answer[ANSWER])
        begin = end
    return np.concatenate(answers, axis=1)
