"""Whether a text gets the same answer alone and in a mixed batch, measured on the exported graph as devices run it.

Most encoders compute every row for itself. In some, padding or the other rows leak in (a convolution over padding, a
Fourier transform or blocks over the whole length, one activation scale for a whole batch), and some layers read inputs
whose first dimension is not the rows. None of this shows in a configuration, so it is measured.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from aggregation.errors import ConfigError
from edgeadapt.bases.classifiergraph import LABELS, ClassifierGraph, open_session
from edgeadapt.formats.bundle import MODEL
from edgeadapt.formats.graphinputs import GIVEN, LORA_A, LORA_B, OFFSET, PROMPT, REPLACED, SCALES
from edgeadapt.formats.layout import Floats, Tensors

RANK, ROWS = 4, 3  # rank and virtual tokens of the adapters that are tried; texts, and labels
LONGEST = 1024  # tokens
TOLERANCE = 2e-3  # difference of a logit, relative to the largest: rounding in int8 stays below a tenth of it
MAX_REASON = 200  # characters of ONNX Runtime's message


def open_base(folder: Path, slots: Collection[str]) -> ort.InferenceSession:
    return open_session((folder / MODEL).read_bytes(), folder, slots)


def independent_rows(folder: Path, slots: Mapping[str, tuple[str, ...]], ids: Sequence[int], longest: int) -> bool:
    """Check whether three texts get the same logits alone and in a mixed batch, each with an adapter of its own.

    ``ids``: the tokens of a text, which the texts repeat; ``longest``: tokens of the longest text that the base reads.
    Raises ConfigError: the graph does not run, or gives an answer that is not finite.
    """
    session = open_base(folder, slots)
    longest = min(longest, LONGEST) - (RANK if PROMPT in slots else 0)
    lengths = sorted({min(3, longest), max(1, longest // 3), longest})
    texts = [list(np.resize(ids, length)) for length in (lengths * ROWS)[:ROWS]]
    adapters = [_random(slots, seed) for seed in range(ROWS)]
    graph = ClassifierGraph(session, slots, True)
    try:
        alone = [graph.logits(text, graph.feeds(one)) for text, one in zip(texts, adapters, strict=True)]
    except Exception as error:  # onnxruntime raises classes without a common base
        reason = " ".join(str(error).split())[:MAX_REASON]
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
        lora = name.endswith((LORA_A, LORA_B))
        own = lora or LABELS in dimensions or name == PROMPT or name.endswith((*SCALES, OFFSET))
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
