"""GGUF files, field by field, so that any of them can be wrong."""

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

Value = tuple[str, Any]  # a type of ``TYPES`` and a value; of an array, the type of its items and a list
TYPES = {"u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "text": 8, "u64": 10, "i64": 11}
TYPES |= {"f64": 12}
FORMS = {"u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "f32": "f", "bool": "?", "u64": "Q"}
FORMS |= {"i64": "q", "f64": "d"}
ARRAY, F32 = 9, 0
WORDS = ["<end>", "Ġ", "h", "e", "l", "he", "ll"]
MERGES = ["h e", "l l"]
WIDTH, HEADS, PAIRS, INNER = 8, 4, 2, 16


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def one(kind: str, value: Any) -> bytes:
    return text(value) if kind == "text" else struct.pack(f"<{FORMS[kind]}", value)


def value_of(kind: str, value: Any) -> bytes:
    """A setting's type and value. ``kind`` "raw": the bytes themselves."""
    if kind == "raw":
        return bytes(value)
    if isinstance(value, list):
        items = b"".join(one(kind, item) for item in value)
        return struct.pack("<IIQ", ARRAY, TYPES[kind], len(value)) + items
    return struct.pack("<I", TYPES[kind]) + one(kind, value)


def settings() -> dict[str, Value]:
    return {
        "general.architecture": ("text", "llama"),
        "llama.context_length": ("u32", 64),
        "llama.embedding_length": ("u32", WIDTH),
        "llama.feed_forward_length": ("u32", INNER),
        "llama.block_count": ("u32", 1),
        "llama.attention.head_count": ("u32", HEADS),
        "llama.attention.head_count_kv": ("u32", PAIRS),
        "llama.attention.layer_norm_rms_epsilon": ("f32", 1e-5),
        "tokenizer.ggml.model": ("text", "gpt2"),
        "tokenizer.ggml.tokens": ("text", WORDS),
        "tokenizer.ggml.token_type": ("i32", [3] + [1] * (len(WORDS) - 1)),
        "tokenizer.ggml.merges": ("text", MERGES),
        "tokenizer.ggml.eos_token_id": ("u32", 0),
    }


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a tiny Llama, in the order that NumPy has."""
    keys = WIDTH // HEADS * PAIRS
    layer: dict[str, tuple[int, ...]] = {
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (keys, WIDTH),
        "attn_v": (keys, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "attn_norm": (WIDTH,),
        "ffn_norm": (WIDTH,),
        "ffn_gate": (INNER, WIDTH),
        "ffn_up": (INNER, WIDTH),
        "ffn_down": (WIDTH, INNER),
    }
    named = {f"blk.0.{part}.weight": shape for part, shape in layer.items()}
    return named | {"token_embd.weight": (len(WORDS), WIDTH), "output_norm.weight": (WIDTH,)}


def tensor(name: str, shape: tuple[int, ...], start: int, kind: int = F32) -> bytes:
    """A row of the list of tensors."""
    head = text(name) + struct.pack("<I", len(shape))
    return head + struct.pack(f"<{len(shape)}QIQ", *shape[::-1], kind, start % 2**64)


def file(found: Mapping[str, Value], rows: list[bytes], data: bytes, **changes: Any) -> bytes:
    """A file of these settings and rows. ``changes``: ``magic``, ``version``, ``tensors`` and ``keys``, the counts."""
    head = changes.get("magic", b"GGUF") + struct.pack("<I", changes.get("version", 3))
    head += struct.pack("<QQ", changes.get("tensors", len(rows)), changes.get("keys", len(found)))
    head += b"".join(text(name) + value_of(*value) for name, value in found.items()) + b"".join(rows)
    return head + bytes(-len(head) % 32) + data


def model(
    settings_: Mapping[str, Value | None] | None = None, shapes_: Mapping[str, Any] | None = None, **changes: Any
) -> bytes:
    """A tiny Llama with other settings and tensors; None drops one."""
    found = {name: value for name, value in (settings() | dict(settings_ or {})).items() if value is not None}
    named = {name: shape for name, shape in (shapes() | dict(shapes_ or {})).items() if shape is not None}
    rows, at = [], 0
    for name, shape in named.items():
        rows.append(tensor(name, shape, at))
        at += 4 * int(np.prod(shape, dtype=object))
    rng = np.random.default_rng(0)
    data = rng.standard_normal(min(at, 2**16) // 4).astype("<f4").tobytes()
    return file(found, rows, data, **changes)
