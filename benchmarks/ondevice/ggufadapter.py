"""A LoRA adapter in the format of llama.cpp, so that the peer runs the same adapter.

No device uses this format. The names are those of llama.cpp's ``convert_lora_to_gguf.py``.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from aggregation.errors import DataError
from edgeadapt.formats.graphinputs import LORA_A, LORA_B, input_name
from edgeadapt.formats.layout import Floats

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
    """Write an adapter of a Llama-like model, with peft's names and shapes, to ``path``. Raises DataError: a tensor
    belongs to a layer for which llama.cpp has no name."""
    rotary = {"attn_q": heads, "attn_k": kv_heads}
    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, value in tensors.items():
        block, module, part = _parts(input_name(name))
        if part == "lora_b" and module in rotary:
            value = rotary_order(value, rotary[module])
        writer.add_tensor(f"blk.{block}.{module}.weight.{part}", np.ascontiguousarray(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rotary_order(rows: Floats, heads: int) -> Floats:
    """Reorder the rows of a query or key projection from transformers' rotary layout to llama.cpp's.

    Transformers rotates row i of a head with row i of its second half, llama.cpp rotates adjacent rows. llama.cpp's
    converter permutes the rows of W in this way, so those of LoRA's B follow.

    >>> rotary_order(np.arange(8.0), 2).tolist()
    [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _parts(name: str) -> tuple[str, str, str]:
    for ending, part in ((LORA_A, "lora_a"), (LORA_B, "lora_b")):
        layer = LAYER.fullmatch(name.removesuffix(ending))
        if name.endswith(ending) and layer and layer[2] in MODULES:
            return layer[1], MODULES[layer[2]], part
    text = f"llama.cpp's adapters cannot change the layer of tensor {name!r}; train other target modules"
    raise DataError(text, about="tensors")
