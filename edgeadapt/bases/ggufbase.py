"""A GGUF file as a base folder: configuration, weights in float32 and tokenizer, as transformers reads them.

For the architectures that share Llama's layers (Llama, Qwen 2, Qwen 3). Quantized blocks become floats without further
loss, so the folder and the file are the same model. A tensor or a setting that this module does not know is refused by
name: ignoring it would only show as worse answers. Settings, tokenizer and the shapes of all tensors are checked before
a tensor is read. docs/decisions/0018-own-readers.md compares with transformers' loader.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from aggregation.errors import ConfigError, DataError
from edgeadapt.bases.gguffile import GgufFile
from edgeadapt.formats.layout import Floats

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


def convert(file: Path, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors``, ``tokenizer.json`` and their companions into the empty ``folder``.

    Equal files give equal folders, as long as the tokenizers library writes the same JSON. Raises DataError: ``file``
    is not a sound GGUF file; ConfigError: its architecture, a setting, a tensor or its tokenizer is not one that can be
    converted.
    """
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


def write_base(folder: Path, weights: Mapping[str, Floats], tokenizer: Tokenizer, **tables: dict[str, Any]) -> None:
    """Write a base folder; ``tables`` become JSON files of these names."""
    save_file(dict(sorted(weights.items())), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    tokenizer.save(str(folder / "tokenizer.json"))
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
    """Return the number of a special token, None if the file names none."""
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
    """Map each tensor's name in the file to that in the folder: exactly those of the model, in their shapes."""
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
    """Read the pairs of tokens that become one, each of them a token."""
    pairs = []
    for pair in _texts(settings, name := "tokenizer.ggml.merges"):
        left, space, right = pair.partition(" ")
        if not space or not {left, right, left + right} <= vocabulary.keys():
            raise DataError(f"the merge {_shown(pair)} of the GGUF file is not of tokens that it has", about=name)
        pairs.append((left, right))
    return pairs


def _splitter(kind: str) -> pre_tokenizers.PreTokenizer:
    """Return how text is cut into words before the merges, by llama.cpp's name for it."""
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
