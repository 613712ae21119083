"""A LoRA adapter as llama.cpp reads it, so that the peer runs the very adapter that we run.

Nothing on a device uses this form. The names are those of llama.cpp's ``convert_lora_to_gguf.py``.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from adapters.layout import Floats
from adapters.ondevice import LORA_A, LORA_B, graph_name
from aggregation.errors import DataError

ARCHITECTURE = "llama"
LAYER = re.compile(r"model\.layers\.(\d+)\.(\w+\.\w+)")
MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, tensors: Mapping[str, Floats], *, alpha: float, heads: int, kv_heads: int) -> None:
    """Write an adapter for a Llama-like model.

    Args:
        path: The file, which is replaced.
        tensors: Under peft's names and in its shapes: A ``(rank, in)``, B ``(out, rank)``.
        alpha: LoRA's; the reader scales by ``alpha / rank``.
        heads: Of the queries.
        kv_heads: Of the keys.

    Raises:
        DataError: A tensor is of no layer that the peer has a name for.
    """
    turned = {"attn_q": heads, "attn_k": kv_heads}
    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, value in tensors.items():
        block, module, part = _parts(graph_name(name))
        if part == "lora_b" and module in turned:
            value = rotary_order(value, turned[module])
        writer.add_tensor(f"blk.{block}.{module}.weight.{part}", np.ascontiguousarray(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rotary_order(rows: Floats, heads: int) -> Floats:
    """Reorder the rows of a query or key projection from transformers' rotary layout to llama.cpp's.

    The former rotates the two halves of a head against each other, the latter neighbouring pairs; llama.cpp's converter
    moves the rows of W so, and what is added to ``W x`` has to follow.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _parts(name: str) -> tuple[str, str, str]:
    part = {LORA_A: "lora_a", LORA_B: "lora_b"}
    for ending, short in part.items():
        found = LAYER.fullmatch(name.removesuffix(ending))
        if name.endswith(ending) and found and found[2] in MODULES:
            return found[1], MODULES[found[2]], short
    raise DataError(f"tensor {name!r} is of no layer that llama.cpp's adapters can change")
