"""A bundle is replaced atomically, and keeps every adapter that still fits its base."""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import LlamaConfig

from aggregation.errors import ConfigError, DataError, TrustError
from aggregation.pki.identity import IdentityKey
from edgeadapt.bases.base import Base
from edgeadapt.formats.bundle import POLICY, Bundle
from edgeadapt.formats.files import sha256
from edgeadapt.formats.graphinputs import check_slots, to_inputs
from edgeadapt.formats.layout import Layout
from edgeadapt.formats.manifest import AdapterManifest, BaseManifest, Format
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.policy import Policy
from edgeadapt.methods.classifier import build, tensors
from edgeadapt.methods.peft.inputs import AdapterInputs
from export.bundle.adapter import completed, decode, encode
from export.bundle.base import usual_task, wanted
from export.bundle.sources import Origin
from export.bundle.write import add_adapter, copy_bundle, write_bundle
from export.onnx.exported import ExportedBase
from export.onnx.targets import Slots
from export.parity.compare import OnnxRunner
from tests.support import refused
from tests.support.models import Source, adapter_inputs


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_bundle_has_a_base_and_its_adapters_each_with_a_signed_manifest(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    files = contents(bundle)
    assert sorted(files) == [
        "adapters/global.json",
        "adapters/global.onnx_adapter",
        "base/manifest.json",
        "base/model.onnx",
        "base/model.onnx.data",
        "base/tokenizer.json",
        "base/web.onnx",
    ]
    assert BaseManifest.accept(files["base/manifest.json"], [vendor.public]) == exported.manifest
    manifest = AdapterManifest.accept(files["adapters/global.json"], [vendor.public])
    assert manifest.sha256 == sha256(files["adapters/global.onnx_adapter"])
    assert manifest.size == len(files["adapters/global.onnx_adapter"])
    assert manifest.layout_digest == Layout.of(source().tensors).digest
    assert (manifest.rank, manifest.format, manifest.version) == (4, "int8", 3)


def test_equal_inputs_give_an_equal_bundle(
    tmp_path: Path, bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    write_bundle(tmp_path / "again", exported, [source()], key=vendor)
    assert contents(tmp_path / "again") == contents(bundle)


def test_a_household_adds_its_private_adapter_signed_by_its_own_key(
    bundle: Path, model: PeftModel, source: Source, household: IdentityKey
) -> None:
    before = contents(bundle)
    add_adapter(bundle, adapter_inputs(model), source("anna", seed=1, parent="a" * 64), key=household)
    after = contents(bundle)
    assert {name: after[name] for name in before} == before
    assert AdapterManifest.accept(after["adapters/anna.json"], [household.public]).parent == "a" * 64


def test_adapters_added_at_the_same_moment_are_all_kept(
    bundle: Path, exported: ExportedBase, source: Source, household: IdentityKey
) -> None:
    names = [f"n{number}" for number in range(8)]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: add_adapter(bundle, exported.adapter_inputs, source(name), key=household), names))
    assert {f"adapters/{name}.json" for name in names} <= contents(bundle).keys()


def test_an_update_of_the_global_adapter_keeps_the_private_ones(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey, household: IdentityKey
) -> None:
    add_adapter(bundle, exported.adapter_inputs, source("anna", seed=1, parent="a" * 64), key=household)
    private, old = contents(bundle)["adapters/anna.onnx_adapter"], contents(bundle)["adapters/global.onnx_adapter"]
    write_bundle(bundle, exported, [source(seed=2, version=4)], key=vendor)
    assert contents(bundle)["adapters/anna.onnx_adapter"] == private
    assert contents(bundle)["adapters/global.onnx_adapter"] != old


def test_another_export_of_the_base_keeps_the_policy_of_the_adapters(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey, household: IdentityKey
) -> None:
    policy = Policy(denied="Not here.")
    add_adapter(bundle, exported.adapter_inputs, replace(source(version=4), policy=policy), key=vendor)
    write_bundle(bundle, exported, [], key=vendor)
    opened = Bundle(bundle, (vendor.public,))
    base = opened.base()
    assert base.policy == policy
    assert opened.adapter("global", base.manifest).manifest.policy == base.manifest.files[POLICY]
    before = contents(bundle)
    with refused(TrustError, "keyid"):
        write_bundle(bundle, exported, [], key=household)
    assert contents(bundle) == before


def test_a_base_with_other_slots_does_not_replace_one_that_has_adapters(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    before = contents(bundle)
    slots = exported.manifest.slots | {"encoder.key.lora_A.weight": ("32", "rank_9")}
    other = replace(exported, manifest=replace(exported.manifest, slots=slots))
    with refused(ConfigError, "slots"):
        write_bundle(bundle, other, [], key=vendor)
    assert contents(bundle) == before
    for name in ("global.json", "global.onnx_adapter"):
        (bundle / "adapters" / name).unlink()
    write_bundle(bundle, other, [], key=vendor)


def test_adapters_of_another_base_are_not_kept(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    other = replace(exported.manifest, base_digest="b" * 64)
    write_bundle(bundle, replace(exported, manifest=other), [source("new")], key=vendor)
    assert not (bundle / "adapters" / "global.json").exists()


@pytest.mark.parametrize("failing", [1, 3, 5])
def test_a_disk_that_fills_up_at_any_file_leaves_the_old_bundle(
    bundle: Path,
    exported: ExportedBase,
    source: Source,
    vendor: IdentityKey,
    monkeypatch: pytest.MonkeyPatch,
    failing: int,
) -> None:
    before, write, calls = contents(bundle), Path.write_bytes, iter(range(1, 100))

    def full(path: Path, data: bytes) -> int:
        if bundle.parent in path.parents and next(calls) == failing:
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write does, which has no name
        return write(path, data)

    def copied(old: Path, new: Path) -> None:
        if next(calls) == failing:
            write(new, old.read_bytes()[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(old), None, str(new))  # as shutil's
        copyfile(old, new)

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr("export.bundle.write.copyfile", copied)
    with pytest.raises(OSError, match=rf"No space left.*{bundle}/"):
        write_bundle(bundle, exported, [source(seed=2, version=4)], key=vendor)
    assert contents(bundle) == before
    assert sorted(p.name for p in bundle.parent.iterdir()) == [".bundle.lock", "bundle", "trust.pem"]


def test_a_folder_that_is_not_a_bundle_is_not_replaced(
    tmp_path: Path, exported: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with refused(ConfigError, tmp_path.name):
        write_bundle(tmp_path, exported, [source()], key=vendor)
    assert (tmp_path / "letters.txt").read_text() == "dear"


def test_a_bundle_with_a_damaged_base_manifest_is_left_unchanged(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    (bundle / "base" / "manifest.json").write_bytes(b'{"payload": "e30="}')
    before = contents(bundle)
    with refused(DataError, "manifest.json"):
        write_bundle(bundle, exported, [source()], key=vendor)
    assert contents(bundle) == before


def test_a_name_that_leaves_the_folder_is_refused(
    bundle: Path, exported: ExportedBase, source: Source, household: IdentityKey
) -> None:
    with refused(ConfigError, "name", value="../anna"):
        add_adapter(bundle, exported.adapter_inputs, source("../anna"), key=household)


def test_labels_that_do_not_match_the_head_are_refused(
    bundle: Path, exported: ExportedBase, source: Source, household: IdentityKey
) -> None:
    with refused(DataError, "labels", value=3):
        add_adapter(bundle, exported.adapter_inputs, replace(source("anna"), labels=("a", "b", "c")), key=household)


@pytest.mark.parametrize("label", ["a", " ", "\x1b[31m", "d" * 257], ids=["twice", "blank", "control", "long"])
def test_labels_that_devices_refuse_are_not_signed(
    bundle: Path, exported: ExportedBase, source: Source, household: IdentityKey, label: str
) -> None:
    before = contents(bundle)
    with refused(DataError, "labels"):
        add_adapter(
            bundle, exported.adapter_inputs, replace(source("anna"), labels=("a", "b", "c", label)), key=household
        )
    assert contents(bundle) == before


def test_the_files_of_the_old_bundle_are_not_written_through_hard_links(
    bundle: Path, exported: ExportedBase, source: Source, household: IdentityKey
) -> None:
    kept = bundle.parent / "kept"
    os.link(bundle / "adapters" / "global.onnx_adapter", kept)
    before = kept.read_bytes()
    add_adapter(bundle, exported.adapter_inputs, source("global", seed=9), key=household)
    assert kept.read_bytes() == before
    envelope = json.loads((bundle / "adapters" / "global.json").read_bytes())
    assert envelope["signatures"][0]["keyid"] == household.public.key_id


def test_a_copy_is_equal_and_changes_independently(
    bundle: Path, exported: ExportedBase, source: Source, household: IdentityKey
) -> None:
    before, state_dir = contents(bundle), bundle.parent / "home" / "bundle"
    copy_bundle(bundle, state_dir)
    assert contents(state_dir) == before
    add_adapter(state_dir, exported.adapter_inputs, source("global", seed=9), key=household)
    assert contents(state_dir) != before
    assert contents(bundle) == before


def test_a_head_of_one_row_is_refused(
    bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey
) -> None:
    before, one = contents(bundle), source("one")
    head = {name: value[:1] if "classifier" in name else value for name, value in one.tensors.items()}
    with refused(DataError, "head"):
        add_adapter(bundle, exported.adapter_inputs, replace(one, tensors=head, labels=one.labels[:1]), key=vendor)
    assert contents(bundle) == before


# Adapter files


@pytest.mark.parametrize(("form", "tolerance"), [("fp32", 0.0), ("fp16", 2**-10), ("int8", 1 / 127), ("int4", 1 / 7)])
def test_a_file_holds_the_tensors_to_the_precision_of_its_format(
    model: PeftModel, exported: ExportedBase, form: Format, tolerance: float
) -> None:
    blob, values = encode(tensors(model), exported.adapter_inputs, form), tensors(model)
    assert encode(dict(reversed(values.items())), exported.adapter_inputs, form) == blob
    found = decode(blob, form)
    for name, value in to_inputs(tensors(model), exported.adapter_inputs.scaling).items():
        assert np.abs(found[name] - value).max() <= tolerance * np.abs(value).max()


def test_a_missing_and_an_unknown_tensor_are_refused(model: PeftModel, exported: ExportedBase) -> None:
    values = tensors(model)
    first = next(iter(values))
    with refused(DataError, first.removeprefix("base_model.model.")):
        encode({name: value for name, value in values.items() if name != first}, exported.adapter_inputs)
    with refused(DataError, "extra"):
        encode(values | {"extra": np.ones(1, np.float32)}, exported.adapter_inputs)


def test_nan_is_not_exported(model: PeftModel, exported: ExportedBase) -> None:
    values = tensors(model)
    first = next(iter(values))
    values[first][0, 0] = np.nan
    with refused(DataError, first.removeprefix("base_model.model.")):
        encode(values, exported.adapter_inputs)


@pytest.mark.parametrize("form", ["fp32", "int4"])
def test_layers_that_an_adapter_does_not_adapt_get_an_empty_pair(
    model: PeftModel, exported: ExportedBase, form: Format
) -> None:
    method = PeftConfig("LORA", 4, 8, ("query",))
    values = {name: value for name, value in tensors(model).items() if ".value." not in name}
    full, found = completed(values, AdapterInputs.of_tensors(method, values), exported.manifest.slots)
    inputs = decode(encode(full, found, form), form)
    assert check_slots(inputs, exported.manifest.slots)["labels"] == 4
    assert {value.size for name, value in inputs.items() if ".value." in name} == {0}
    loaded = tensors(model) | {
        name: np.zeros_like(value) for name, value in tensors(model).items() if ".value." in name
    }
    expected, answer = (
        OnnxRunner.open(exported.folder, exported.manifest).classify(["lock the door"], x)
        for x in (decode(encode(loaded, exported.adapter_inputs, form), form), inputs)
    )
    np.testing.assert_allclose(answer, expected, atol=1e-6)


# The task of a base


@pytest.mark.parametrize(
    ("architectures", "task"),
    [
        (["LlamaForCausalLM"], "text-generation"),
        (["GPT2LMHeadModel"], "text-generation"),
        (["BertModel"], "text-classification"),
        (["BertForMaskedLM"], "text-classification"),
        (None, "text-classification"),
    ],
)
def test_a_base_states_its_usual_task(tmp_path: Path, architectures: Any, task: str) -> None:
    assert usual_task(_stating(tmp_path, architectures)) == task


@pytest.mark.parametrize("architectures", [["BertForTokenClassification"], ["T5ForConditionalGeneration"]])
def test_a_task_that_devices_do_not_run_is_refused(tmp_path: Path, architectures: list[str]) -> None:
    with refused(ConfigError, "architectures", value=architectures[0]):
        usual_task(_stating(tmp_path, architectures))


def test_an_adapter_of_the_last_layer_alone_gets_a_base_that_trains_from_states(tiny_base: Base) -> None:
    config = PeftConfig.lora(2, 4, ("layer.1.output.dense",))
    made = tensors(build(tiny_base, 2, config))
    origin = Origin(config, ("a", "b"), 1, "c" * 64, None, None, "text-classification", made)
    assert wanted(tiny_base, origin).slots.first == 1
    assert wanted(tiny_base, origin, slots=Slots(("query",))).slots.first == 0


def _stating(folder: Path, architectures: Any) -> Base:
    save_file({f"layer.{number}": torch.zeros(1) for number in range(40)}, folder / "model.safetensors")
    config = LlamaConfig(num_hidden_layers=2).to_dict() | {"architectures": architectures}
    (folder / "config.json").write_text(json.dumps(config))
    return Base(folder, "0" * 64)
