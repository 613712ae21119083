"""Whatever is wrong with the files of a base ends in one line; nothing of it runs, and nothing is made up."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from aggregation.errors import ConfigError
from edgeadapt.bases.base import Base, find_base
from edgeadapt.bases.pretrained import WEIGHTS, load, tokenizer
from tests.support import refused


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
    assert reason in str(caught.value.value)
    return caught.value.value


@pytest.mark.parametrize(
    ("changes", "about", "reason"),
    [
        ({"hidden_size": "big"}, "base", "hidden_size"),
        ({"hidden_size": 2**40}, "base", "overflow"),
        ({"num_hidden_layers": 10**7}, "config.json", "(10000000, 39, "),
        ({"max_position_embeddings": 2**40}, "config.json", f", {2**40})"),
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
    assert len(refuses(folder, WEIGHTS, "query")) == 2


def test_a_layer_more_than_there_are_weights_for_is_refused(folder: Path) -> None:
    configure(folder, num_hidden_layers=3)
    missing = refuses(folder, WEIGHTS)
    assert len(missing) == 16
    assert missing[0].startswith("encoder.layer.2")


def test_a_base_without_a_pooler_answers_as_with_one(folder: Path, tiny_base: Base) -> None:
    without(folder, "pooler")
    ids = torch.tensor([[2, 5, 9, 3]])
    bare, whole = (load(base, AutoModel) for base in (find_base(str(folder)), tiny_base))
    with torch.no_grad():
        assert torch.equal(bare(ids)[0], whole(ids)[0])
