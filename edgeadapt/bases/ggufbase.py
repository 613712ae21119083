"""A GGUF file as a base folder: configuration, weights in float32 and tokenizer, as transformers reads them.

For the architectures that share Llama's layers (Llama, Qwen 2, Qwen 3). Quantized blocks become floats without further
loss, so the folder and the file are the same model. A tensor or a setting that this module does not know is refused by
name: ignoring it would only show as worse answers. Settings, tokenizer and the shapes of all tensors are checked before
a tensor is read. docs/decisions/0018-own-readers.md compares with transformers' loader.

The format is llama.cpp's, versions 2 and 3, with the least significant byte first:

    "GGUF"  version u32  tensors u64  settings u64
    setting:  key text, type u32, value; a text is its length u64 and UTF-8; an array is type u32, count u64, values
    tensor:   name text, dimensions u32, each u64, the fastest first; type u32; offset u64 in the tensors' data
    padding to ``general.alignment``, then the tensors' data

Each count and size is compared with the bytes that are left before anything is allocated for it, and tensors share no
bytes. So a file costs memory and time in proportion to its size. An array of arrays is refused: no model has one."""

import json
import math
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

import click
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from aggregation.errors import ConfigError, DataError
from edgeadapt.bases.readers import Reader
from edgeadapt.formats.layout import Floats

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_HEADER = 2**25  # bytes of settings and the list of tensors; vocabularies of 262,000 tokens take 15 million
MAX_KEYS, MAX_TENSORS, MAX_ITEMS, MAX_DIMENSIONS = 2**12, 2**16, 2**20, 4
ALIGNMENT = "general.alignment"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
SHORTEST_KEY, SHORTEST_TENSOR = 13, 32  # bytes
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
LAYER_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_PARTS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LEAST = 9  # tensors of a layer
LARGEST = 2**24  # size in the settings; a table of positions is as long, whatever the tensors hold
QWEN2_WORDS = (  # the pattern of Qwen 2's own tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens in llama.cpp's vocabulary


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Says where a tensor is. ``shape``: as NumPy has it, the fastest dimension last."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int  # in the file
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class GgufFile:
    settings: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    data: NDArray[np.uint8] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read settings and the list of tensors. Raises DataError if they are not sound, or larger than a limit."""
        try:
            data = np.memmap(path, np.uint8, "r")
            reader = _HeaderReader(data.data[:MAX_HEADER])
            settings, tensors = _header(reader)
            begin = -(-reader.at // (step := _alignment(settings))) * step
            return cls(settings, _placed(tensors, begin, len(data)), data)
        except (ValueError, OverflowError, OSError) as error:
            raise DataError(f"{path} is not a sound GGUF file: {error}", about=path.name) from error

    def floats(self, tensor: GgufTensor) -> Floats:
        rows = self.data[tensor.start : tensor.start + tensor.size].reshape(*tensor.shape[:-1], -1)
        return np.ascontiguousarray(dequantize(rows, tensor.kind), np.float32)


class _HeaderReader:
    """Reads a header from front to back. Nothing is read beyond its end."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def left(self, count: int, each: int, most: int, what: str) -> int:
        if count > most or count * each > len(self.data) - self.at:
            raise ValueError(f"{count} {what} cannot follow byte {self.at}")
        return count

    def take(self, size: int) -> memoryview:
        self.left(size, 1, size, "bytes")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> Any:
        (value,) = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))
        return value

    def text(self) -> str:
        return str(self.take(self.number("Q")), "utf-8")

    def value(self) -> Any:
        kind = self.number("I")
        if kind == ARRAY:
            return self._values(self.number("I"), self.number("Q"))
        return self._one(kind)()

    def _values(self, kind: int, count: int) -> list[Any]:
        if kind == ARRAY:
            raise ValueError(f"an array of arrays at byte {self.at}")
        read = self._one(kind)
        self.left(count, 8 if kind == TEXT else struct.calcsize(f"<{SCALARS[kind]}"), MAX_ITEMS, "items of an array")
        return [read() for _ in range(count)]

    def _one(self, kind: int) -> Callable[[], Any]:
        if kind == TEXT:
            return self.text
        if kind not in SCALARS:
            raise ValueError(f"a value of the unknown type {kind} at byte {self.at}")
        return lambda: self.number(SCALARS[kind])


def _header(reader: _HeaderReader) -> tuple[dict[str, Any], list[GgufTensor]]:
    if reader.take(4) != MAGIC or reader.number("I") not in VERSIONS:
        raise ValueError(f"it does not begin with {MAGIC.decode()} and the version 2 or 3")
    count, keys = reader.number("Q"), reader.number("Q")
    settings: dict[str, Any] = {}
    for _ in range(reader.left(keys, SHORTEST_KEY, MAX_KEYS, "settings")):
        if (key := reader.text()) in settings:
            raise ValueError(f"it has {key[:80]!r} twice")
        settings[key] = reader.value()
    return settings, [_tensor(reader) for _ in range(reader.left(count, SHORTEST_TENSOR, MAX_TENSORS, "tensors"))]


def _tensor(reader: _HeaderReader) -> GgufTensor:
    name, dimensions = reader.text(), reader.number("I")
    shape = tuple(reader.number("Q") for _ in range(reader.left(dimensions, 8, MAX_DIMENSIONS, "dimensions")))[::-1]
    kind, start = reader.number("I"), reader.number("Q")
    if not shape or not all(shape):
        raise ValueError(f"tensor {name[:80]!r} has no values: its shape is {shape}")
    if not _is_readable(quantization := GGMLQuantizationType(kind)):
        raise ValueError(f"tensor {name[:80]!r} is of the type {quantization.name}, which cannot be read")
    block, size = GGML_QUANT_SIZES[quantization]
    if shape[-1] % block:
        raise ValueError(f"tensor {name[:80]!r} has rows of {shape[-1]} values, in blocks of {block}")
    return GgufTensor(name, shape, quantization, start, math.prod(shape) // block * size)


def _placed(tensors: list[GgufTensor], begin: int, end: int) -> tuple[GgufTensor, ...]:
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("two tensors have one name")
    at = begin
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        if begin + tensor.start < at or begin + tensor.start + tensor.size > end:
            raise ValueError(f"tensor {tensor.name[:80]!r} is in the bytes of another, or ends outside of the file")
        at = begin + tensor.start + tensor.size
    return tuple(GgufTensor(t.name, t.shape, t.kind, begin + t.start, t.size) for t in tensors)


def _alignment(settings: dict[str, Any]) -> int:
    alignment = settings.get(ALIGNMENT, 32)
    if not isinstance(alignment, int) or not 0 < alignment <= MAX_HEADER or alignment & (alignment - 1):
        raise ValueError(f"{ALIGNMENT} is {str(alignment)[:80]}, not a power of two")
    return alignment


@cache
def _is_readable(kind: GGMLQuantizationType) -> bool:
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (KeyError, NotImplementedError):
        return False
    return True


def convert(file: Path, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors``, ``tokenizer.json`` and their companions into the empty ``folder``.

    Equal files give equal folders, as long as the tokenizers library writes the same JSON. Raises DataError: ``file``
    is not a sound GGUF file; ConfigError: its architecture, a setting, a tensor or its tokenizer is not one that can be
    converted."""
    opened = GgufFile.open(file)
    config = _config(opened.settings, len(opened.tensors))
    tokenizer, companion = _tokenizer(opened.settings), _tokenizer_config(opened.settings)
    names = _names(opened, config)
    config["tie_word_embeddings"] = "lm_head.weight" not in names.values()
    label = f"Converting {file.name} for the cache; this happens once"
    with click.progressbar(opened.tensors, label=label, file=sys.stderr) as tensors:
        weights = {names[tensor.name]: _ordered(tensor.name, opened.floats(tensor), config) for tensor in tensors}
    special = {name: value for name, value in config.items() if name.endswith("_token_id")}
    write_base(folder, weights, tokenizer, config=config, generation_config=special, tokenizer_config=companion)


def write_base(folder: Path, weights: Mapping[str, Floats], tokenizer: Reader, **tables: dict[str, Any]) -> None:
    save_file(dict(sorted(weights.items())), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    for name, table in tables.items():
        text = json.dumps(table, indent=1, sort_keys=True) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def _config(settings: Mapping[str, Any], tensors: int) -> dict[str, Any]:
    kind = settings.get("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        reason = f"a GGUF file of architecture {_shown(kind)} cannot be converted, only {', '.join(ARCHITECTURES)}"
        raise ConfigError(reason, about="general.architecture")
    if scaled := [name for name in settings if name.startswith(f"{kind}.rope.scaling.")]:
        raise ConfigError(f"the GGUF file sets {scaled[0]}, which cannot be converted", about=scaled[0])
    width, heads = (_size(settings, f"{kind}.{name}") for name in ("embedding_length", "attention.head_count"))
    pairs = _size(settings, f"{kind}.attention.head_count_kv", default=heads)
    head = _size(settings, f"{kind}.attention.key_length", default=width // heads)
    if heads % pairs or head % 2:
        text = f"{heads} heads of {head} numbers on {pairs} heads of keys, as in the GGUF file, make no model"
        raise DataError(text, about=f"{kind}.attention.head_count")
    epsilon = _real(settings, f"{kind}.attention.layer_norm_rms_epsilon")
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "dtype": "float32",
        "hidden_size": width,
        "intermediate_size": _size(settings, f"{kind}.feed_forward_length"),
        "num_hidden_layers": _size(settings, f"{kind}.block_count", tensors // LEAST),
        "num_attention_heads": heads,
        "num_key_value_heads": pairs,
        "head_dim": head,
        "max_position_embeddings": _size(settings, f"{kind}.context_length"),
        # Written as a float32: 1e-5 would otherwise read 9.999999747378752e-06.
        "rms_norm_eps": float(str(np.float32(epsilon))),
        "rope_theta": _real(settings, f"{kind}.rope.freq_base", 10000.0),
        "vocab_size": len(_words(settings)),
        **{
            f"{name.replace('padding', 'pad')}_token_id": number
            for name in ("bos", "eos", "padding")
            if (number := _token(settings, name)) is not None
        },
    }


def _size(settings: Mapping[str, Any], name: str, most: int = LARGEST, default: int | None = None) -> int:
    value = settings.get(name, default)
    if value is None:
        raise ConfigError(f"the GGUF file has no {name}", about=name)
    if type(value) is not int or not 0 < value <= most:
        raise DataError(f"{name} is {_shown(value)} in the GGUF file, not a number from 1 to {most}", about=name)
    return value


def _real(settings: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = settings.get(name, default)
    if value is None:
        raise ConfigError(f"the GGUF file has no {name}", about=name)
    if type(value) is not float or not 0 < value < math.inf:
        raise DataError(f"{name} is {_shown(value)} in the GGUF file, not a number above 0", about=name)
    return value


def _token(settings: Mapping[str, Any], kind: str) -> int | None:
    name = f"tokenizer.ggml.{kind}_token_id"
    number, count = settings.get(name), len(_words(settings))
    if number is not None and (type(number) is not int or not 0 <= number < count):
        raise DataError(f"{name} is {_shown(number)} in the GGUF file, which has {count} tokens", about=name)
    return number


def _words(settings: Mapping[str, Any]) -> list[str]:
    return _texts(settings, "tokenizer.ggml.tokens")


def _texts(settings: Mapping[str, Any], name: str) -> list[str]:
    texts = settings.get(name)
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], str):
        raise DataError(f"{name} in the GGUF file is not a list of texts", about=name)
    return texts


def _shown(value: object) -> str:
    return repr(value)[:80]


def _names(file: GgufFile, config: Mapping[str, Any]) -> dict[str, str]:
    expected = dict(_expected(config))
    for tensor in file.tensors:
        if tensor.name not in expected:
            text = f"the GGUF file has a tensor {tensor.name[:80]!r}, which cannot be converted"
            raise ConfigError(text, about=tensor.name)
        _, shape = expected[tensor.name]
        if tensor.shape != shape:
            text = f"tensor {tensor.name} of the GGUF file has the shape {tensor.shape}, and its settings give {shape}"
            raise DataError(text, about=tensor.name)
    names = {tensor.name: expected[tensor.name][0] for tensor in file.tensors}
    if lacking := [name for name in expected if name not in names and name != "output.weight"]:
        raise DataError(f"the GGUF file has no tensor {lacking[0]}", about=lacking[0])
    return names


def _expected(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Yield each tensor of the model: its name in the file, its name in the folder and its shape."""
    kind, width, inner = (config[name] for name in ("model_type", "hidden_size", "intermediate_size"))
    head, words = config["head_dim"], config["vocab_size"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    weights = {
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (width, queries),
        "attn_norm": (width,),
        "ffn_norm": (width,),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    weights |= {"attn_q_norm": (head,), "attn_k_norm": (head,)} if kind == "qwen3" else {}
    biases = {"attn_q": (queries,), "attn_k": (keys,), "attn_v": (keys,)} if kind == "qwen2" else {}
    layer = [(part, "weight", shape) for part, shape in weights.items()]
    layer += [(part, "bias", shape) for part, shape in biases.items()]
    for number in range(config["num_hidden_layers"]):
        for part, what, shape in layer:
            yield f"blk.{number}.{part}.{what}", (f"model.layers.{number}.{LAYER_PARTS[part]}.{what}", shape)
    for part, shape in {"token_embd": (words, width), "output_norm": (width,), "output": (words, width)}.items():
        yield f"{part}.weight", (f"{OTHER_PARTS[part]}.weight", shape)


def _ordered(name: str, value: Floats, config: Mapping[str, Any]) -> Floats:
    if config["model_type"] == "llama" and ".attn_q." in name:
        return _halves(value, config["num_attention_heads"])
    if config["model_type"] == "llama" and ".attn_k." in name:
        return _halves(value, config["num_key_value_heads"])
    return value


def _halves(value: Floats, heads: int) -> Floats:
    """Reorder each head's rows from llama.cpp's adjacent rotary pairs to the halves that transformers expects."""
    return np.ascontiguousarray(value.reshape(heads, -1, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape))


def _tokenizer(settings: Mapping[str, Any]) -> Tokenizer:
    words, model = _words(settings), settings.get("tokenizer.ggml.model")
    if model != "gpt2":
        reason = f"a GGUF file with a tokenizer of kind {_shown(model)} cannot be converted, only 'gpt2'"
        raise ConfigError(reason, about="tokenizer.ggml.model")
    vocabulary = {word: number for number, word in enumerate(words)}
    if len(vocabulary) < len(words):
        raise DataError("two tokens of the GGUF file are equal", about="tokenizer.ggml.tokens")
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(settings, vocabulary)))
    tokenizer.pre_tokenizer = _splitter(settings.get("tokenizer.ggml.pre", "gpt-2"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    kinds = settings.get("tokenizer.ggml.token_type", [1] * len(words))
    if not isinstance(kinds, list) or len(kinds) != len(words):
        raise DataError("the GGUF file has not one type for each token", about="tokenizer.ggml.token_type")
    added = [(word, kind) for word, kind in zip(words, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)]
    special = [AddedToken(word, special=True, normalized=False) for word, k in added if k == CONTROL]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word, k in added if k == USER_DEFINED])
    return tokenizer


def _merges(settings: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    pairs = []
    for pair in _texts(settings, name := "tokenizer.ggml.merges"):
        left, space, right = pair.partition(" ")
        if not space or not {left, right, left + right} <= vocabulary.keys():
            raise DataError(f"the merge {_shown(pair)} of the GGUF file is not of tokens that it has", about=name)
        pairs.append((left, right))
    return pairs


def _splitter(kind: str) -> pre_tokenizers.PreTokenizer:
    if kind == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if kind == "qwen2":
        words = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
        return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    reason = f"a GGUF file that cuts words as {_shown(kind)} cannot be converted, only gpt-2, smollm and qwen2"
    raise ConfigError(reason, about="tokenizer.ggml.pre")


def _tokenizer_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    words = _words(settings)
    kinds = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: _token(settings, kind) for name, kind in kinds.items()}
    result: dict[str, Any] = {name: words[number] for name, number in ids.items() if number is not None}
    if template := settings.get("tokenizer.chat_template"):
        if not isinstance(template, str):
            raise DataError("the chat template of the GGUF file is not a text", about="tokenizer.chat_template")
        result["chat_template"] = template
    return result | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": settings[f"{settings['general.architecture']}.context_length"],
    }
