"""A GGUF file as a base folder: configuration, weights in float32 and tokenizer, as transformers reads them.

For the architectures that share Llama's layers (Llama, Qwen 2, Qwen 3). Quantized blocks become floats without further
loss, so the folder and the file are the same model. A tensor or a setting that this module does not know is refused by
name: ignoring it would only show as worse answers. docs/decisions/0018-own-gguf-reader.md compares with transformers'
loader.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from adapters.layout import Floats
from aggregation.errors import ConfigError, DataError

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
QWEN2_WORDS = (  # the pattern of Qwen 2's own tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens in llama.cpp's vocabulary


def convert(file: Path, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors``, ``tokenizer.json`` and their companions into ``folder``.

    Equal files give equal folders, as long as the tokenizers library writes the same JSON.

    Args:
        file: The GGUF file.
        folder: Exists and is empty.

    Raises:
        DataError: ``file`` is not a sound GGUF file.
        ConfigError: Its architecture, a setting, a tensor or its tokenizer is not one that can be converted.
    """
    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise DataError(f"{file} is not a sound GGUF file: {error}", about=file.name) from error
    config = _config(fields)
    label = f"Converting {file.name} for the cache; this happens once"
    with click.progressbar(reader.tensors, label=label, file=sys.stderr) as tensors:
        weights = dict(_weights(tensors, config))
    config["tie_word_embeddings"] = "lm_head.weight" not in weights
    save_file(dict(sorted(weights.items())), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    special = {name: value for name, value in config.items() if name.endswith("_token_id")}
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", special)
    _tokenizer(fields).save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", _tokenizer_config(fields))


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"a GGUF file of architecture {kind!r} cannot be converted, only {', '.join(ARCHITECTURES)}",
            about="general.architecture",
            value=kind,
        )
    if scaled := [name for name in fields if name.startswith(f"{kind}.rope.scaling.")]:
        raise ConfigError(f"the GGUF file sets {scaled[0]}, which cannot be converted", about=scaled[0])

    def setting(name: str) -> Any:
        if (value := fields.get(f"{kind}.{name}")) is None:
            raise ConfigError(f"the GGUF file has no {kind}.{name}", about=f"{kind}.{name}")
        return value

    heads, width = setting("attention.head_count"), setting("embedding_length")
    names = ("bos_token_id", "eos_token_id", "padding_token_id")
    special = {name: fields.get(f"tokenizer.ggml.{name}") for name in names}
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "dtype": "float32",
        "hidden_size": width,
        "intermediate_size": setting("feed_forward_length"),
        "num_hidden_layers": setting("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get(f"{kind}.attention.head_count_kv", heads),
        "head_dim": fields.get(f"{kind}.attention.key_length", width // heads),
        "max_position_embeddings": setting("context_length"),
        # Written as a float32: 1e-5 would otherwise read 9.999999747378752e-06.
        "rms_norm_eps": float(str(np.float32(setting("attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(fields.get(f"{kind}.rope.freq_base", 10000.0)),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        **{name.replace("padding", "pad"): value for name, value in special.items() if value is not None},
    }


def _weights(tensors: Iterable[ReaderTensor], config: dict[str, Any]) -> Iterator[tuple[str, Floats]]:
    for tensor in tensors:
        value = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        name = _name(tensor.name)
        if config["model_type"] == "llama" and ".attn_q." in tensor.name:
            value = _halves(value, config["num_attention_heads"])
        elif config["model_type"] == "llama" and ".attn_k." in tensor.name:
            value = _halves(value, config["num_key_value_heads"])
        yield name, value


def _name(name: str) -> str:
    if found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = found.groups()
        if part in LAYER_PARTS:
            return f"model.layers.{layer}.{LAYER_PARTS[part]}.{kind}"
    part, _, kind = name.partition(".")
    if part in OTHER_PARTS and kind == "weight":
        return f"{OTHER_PARTS[part]}.weight"
    raise ConfigError(f"the GGUF file has a tensor {name!r}, which cannot be converted", about=name)


def _halves(value: Floats, heads: int) -> Floats:
    """Rows of each head from llama.cpp's order, rotary pairs side by side, to the halves that transformers expects."""
    return np.ascontiguousarray(value.reshape(heads, -1, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape))


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    words, model = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise ConfigError(
            f"a GGUF file with a tokenizer of kind {model!r} cannot be converted, only 'gpt2'",
            about="tokenizer.ggml.model",
            value=model,
        )
    vocabulary = {word: number for number, word in enumerate(words)}
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = _splitter(fields.get("tokenizer.ggml.pre", "gpt-2"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    kinds = fields.get("tokenizer.ggml.token_type", [])
    added = [(word, kind) for word, kind in zip(words, kinds, strict=False) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word, k in added if k == CONTROL]
    )
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word, k in added if k == USER_DEFINED])
    return tokenizer


def _splitter(kind: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut into words before the merges, by llama.cpp's name for it."""
    if kind == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if kind == "qwen2":
        words = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
        return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise ConfigError(
        f"a GGUF file that cuts words as {kind!r} cannot be converted, only gpt-2, smollm and qwen2",
        about="tokenizer.ggml.pre",
        value=kind,
    )


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    words = fields["tokenizer.ggml.tokens"]
    kinds = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: fields.get(f"tokenizer.ggml.{kind}_token_id") for name, kind in kinds.items()}
    result = {name: words[number] for name, number in ids.items() if number is not None}
    if template := fields.get("tokenizer.chat_template"):
        result["chat_template"] = template
    length = fields[f"{fields['general.architecture']}.context_length"]
    return result | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": length,
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
