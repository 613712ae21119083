"""``edgeadapt export`` as a person runs it: what it writes, and that every refusal is one line and writes nothing."""

import errno
import os
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel

from adapters import files
from adapters.base import Base
from adapters.classifier import PhraseClassifier, load, tensors
from adapters.layout import Layout, Tensors
from adapters.manifest import AdapterManifest, VersionManifest
from adapters.peftconfig import PeftConfig
from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from client.inference.session import ClassificationSession
from coordinator.statedir import open_registry
from export.bundle.write import write_bundle
from export.onnx.exported import ExportedBase

LABELS = ("Light", "Lock", "Music", "Timer")
TEXTS = ("turn on the kitchen lights", "lock the door", "play music", "set a timer for ten minutes", "unlock")
METHOD = PeftConfig("LORA", 4, 8, ("query", "value"))


Done = Any  # see the fixture `export`
Run = Callable[..., Done]


def publish(state_dir: Path, base: Base, versions: list[Tensors], labels: tuple[str, ...] = LABELS) -> None:
    """A coordinator's home with these versions in its registry."""
    state_dir.mkdir()
    key = IdentityKey.generate(SystemEntropy())
    (state_dir / "signing.pem").write_bytes(key.to_pem())
    registry = open_registry(state_dir, key)
    parent = None
    for number, values in enumerate(versions):
        blob = files.encode(values)
        digest, layout = files.sha256(blob), Layout.of(values).digest
        manifest = VersionManifest(
            number, digest, len(blob), base.digest, layout, parent, number, (), {}, METHOD, labels
        )  # fmt: skip
        registry.publish(manifest, blob, key)
        parent = digest
    registry.close()


def altered(values: Tensors, factor: float) -> Tensors:
    return {name: value * np.float32(factor) for name, value in values.items()}


@pytest.fixture
def shop(tmp_path: Path, exported: ExportedBase, model: PeftModel, tiny_base: Base) -> Path:
    """A bundle without adapters, its key, pinned keys, a registry of three versions, and held-out texts."""
    key = IdentityKey.generate(SystemEntropy())
    (tmp_path / "key.pem").write_bytes(key.to_pem())
    (tmp_path / "trust.pem").write_bytes(key.public.to_pem())
    write_bundle(tmp_path / "bundle", exported, [], key=key)
    publish(tmp_path / "fleet", tiny_base, [altered(tensors(model), factor) for factor in (0.5, 0.8, 1.0)])
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    (tmp_path / "labels").write_text("\n".join(LABELS) + "\n")
    return tmp_path


def add(shop: Path) -> tuple[str | Path, ...]:
    return ("adapter", "--registry", shop / "fleet", "--bundle", shop / "bundle", "--key", shop / "key.pem")


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(done: Done, code: int, message: str) -> None:
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert len(done.err.splitlines()) == 1, done.err


def theirs(base: Base, folder: Path, **changes: Any) -> PeftModel:
    """A folder that peft saved, of a model with random values."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
    inner = PhraseClassifier(AutoModel.from_pretrained(base.folder), 32, 4).eval()
    model = get_peft_model(inner, LoraConfig(**(settings | {"modules_to_save": ["classifier"]} | changes)))
    generator = np.random.default_rng(4)
    load(model, {n: generator.standard_normal(v.shape).astype(np.float32) for n, v in tensors(model).items()})
    model.save_pretrained(folder)
    return model.eval()


def test_a_key_is_private_and_its_public_half_stands_beside_it(export: Run, tmp_path: Path) -> None:
    done = export("key", tmp_path / "vendor.pem", "--json")
    assert done.code == 0, done.err
    key = IdentityKey.from_pem((tmp_path / "vendor.pem").read_bytes())
    assert (tmp_path / "vendor.pub.pem").read_bytes() == key.public.to_pem()
    assert (tmp_path / "vendor.pem").stat().st_mode & 0o777 == 0o600
    assert done.json()["id"] == key.public.key_id
    assert key.raw.hex() not in done.out + done.err


@pytest.mark.parametrize("there", ["vendor.pem", "vendor.pub.pem"])
def test_a_key_is_never_replaced(export: Run, tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_bytes(b"old")
    refused(export("key", tmp_path / "vendor.pem"), 2, "keys are not replaced")
    assert everything(tmp_path) == {there: b"old"}


@pytest.mark.parametrize("full", ["vendor.pem", "vendor.pub.pem"])
def test_a_full_disk_leaves_no_half_of_a_key(
    export: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    def sync(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").resolve().name == full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write does, which has no name

    monkeypatch.setattr(os, "fsync", sync)
    refused(export("key", tmp_path / "vendor.pem"), 1, f"No space left on device: {tmp_path / full}")
    assert everything(tmp_path) == {}


def test_a_full_disk_is_named_and_leaves_no_folder_for_peft(
    export: Run, shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = everything(shop)
    monkeypatch.setattr(Path, "write_bytes", full)
    refused(export("peft", "--registry", shop / "fleet", "--out", shop / "out"), 1, "adapter_config.json")
    assert everything(shop) == before
    assert not list(shop.glob("*out*"))


def test_the_newest_version_of_a_registry_answers_on_a_device_and_peft_gets_it_back(
    export: Run, shop: Path, model: PeftModel, tiny_base: Base
) -> None:
    done = export(*add(shop), "--json")
    assert done.code == 0, done.err
    assert (done.json()["version"], done.json()["format"], done.json()["rank"]) == (2, "int8", 4)
    session = ClassificationSession.open(shop / "bundle")
    session.use("global")
    assert {answer.label for answer in session.classify(TEXTS)} <= set(LABELS)
    assert export("peft", "--bundle", shop / "bundle", "--out", shop / "from-bundle").code == 0
    assert export("peft", "--registry", shop / "fleet", "--out", shop / "from-registry").code == 0
    ids = torch.tensor([[2, 5, 9, 3]])
    for folder, tolerance in (("from-registry", 1e-6), ("from-bundle", 0.5)):
        inner = PhraseClassifier(AutoModel.from_pretrained(tiny_base.folder), 32, 4)
        reopened = PeftModel.from_pretrained(inner, shop / folder).eval()
        assert reopened.peft_config["default"].lora_alpha == 8
        with torch.no_grad():
            difference = reopened(ids, torch.ones_like(ids)) - model(ids, torch.ones_like(ids))
        assert difference.abs().max() < tolerance


@pytest.mark.parametrize("form", ["fp32", "fp16", "int8", "int4"])
def test_the_same_command_gives_the_same_bytes(export: Run, shop: Path, form: str) -> None:
    assert export(*add(shop), "--format", form).code == 0
    before = everything(shop / "bundle")
    assert export(*add(shop), "--format", form).code == 0
    assert everything(shop / "bundle") == before
    assert AdapterManifest.payload_type().encode() in before["adapters/global.json"]


def test_the_sidecar_says_where_the_adapter_comes_from_and_how_it_was_made(export: Run, shop: Path) -> None:
    done = export(*add(shop), "--version", "1", "--json").json()
    key = IdentityKey.from_pem((shop / "key.pem").read_bytes())
    sidecar = AdapterManifest.accept((shop / "bundle/adapters/global.json").read_bytes(), [key.public])
    assert sidecar.peft_config == METHOD
    assert sidecar.source == files.sha256((shop / f"fleet/blobs/{sidecar.source}.safetensors").read_bytes())
    assert sidecar.sha256 == files.sha256((shop / "bundle/adapters/global.onnx_adapter").read_bytes())
    assert (sidecar.version, list(sidecar.labels)) == (1, list(LABELS))
    assert done["layout_digest"] == sidecar.layout_digest


def test_a_peft_folder_becomes_an_adapter_with_the_labels_that_are_named(
    export: Run, shop: Path, tiny_base: Base
) -> None:
    theirs(tiny_base, shop / "lora", rank_pattern={r"layer\.0.*query": 2}, target_modules=["query"])
    command = ("adapter", "--peft", shop / "lora", "--bundle", shop / "bundle", "--key", shop / "key.pem")
    refused(export(*command), 5, "0 labels for 4 rows")
    done = export(*command, "--labels", shop / "labels", "--name", "mine", "--version", "7", "--json")
    assert done.code == 0, done.err
    assert (done.json()["name"], done.json()["version"], done.json()["rank"]) == ("mine", 7, 4)
    session = ClassificationSession.open(shop / "bundle")
    session.use("mine")
    assert session.classify(TEXTS)[0].label in LABELS


def test_an_older_version_than_the_bundles_is_refused(export: Run, shop: Path) -> None:
    assert export(*add(shop)).code == 0
    before = everything(shop / "bundle")
    refused(export(*add(shop), "--version", "1"), 5, "devices refuse the older 1")
    assert everything(shop / "bundle") == before


def test_parity_of_a_sound_pair_passes_and_of_a_wrong_one_exits_with_6(
    export: Run, shop: Path, tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("parity", "--bundle", shop / "bundle", "--base", tiny_base.folder, "--texts", shop / "texts")
    assert export(*add(shop), "--format", "fp32").code == 0
    done = export(*command, "--registry", shop / "fleet", "--json")
    assert done.code == 0, done.err
    found = done.json()
    assert (found["agreement"], found["count"], found["texts"], found["profile"]) == (1.0, *2 * [len(TEXTS)], "fp32")
    assert found["max_abs_diff"] < 1e-5
    assert found["loss"] is None
    assert export(*add(shop), "--format", "int4").code == 0
    done = export(*command, "--registry", shop / "fleet", "--json")
    # Four bits are further away than the limits of an fp32 base allow: the gate can fail.
    assert done.code == 6
    assert "too far from torch" in done.err
    refused(export(*command, "--registry", shop / "fleet", "--version", "0"), 5, "was exported from another file")


def test_a_base_is_exported_for_adapters_that_come_later(export: Run, shop: Path, tiny_base: Base) -> None:
    command = ("base", "--base", tiny_base.folder, "--out", shop / "new", "--key", shop / "key.pem", "--max-rank", "3")
    done = export(*command, "--json")
    assert done.code == 0, done.err
    assert (done.json()["profile"], done.json()["max_rank"], done.json()["slots"]) == ("native-int8", 3, 10)
    into = ("adapter", "--registry", shop / "fleet", "--bundle", shop / "new", "--key", shop / "key.pem")
    refused(export(*into), 5, "rank 4, the base takes at most 3")
    assert not (shop / "new" / "adapters").exists()


def test_the_help_has_examples(export: Run) -> None:
    for command in ("base", "adapter", "peft", "parity", "key"):
        done = export(command, "--help")
        assert done.code == 0
        assert f"edgeadapt export {command} " in done.out


# What is wrong with what is given: each is one line with its exit code, and the bundle stays as it was.


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--name", "../evil"], 2, "adapter name"),
        (["--version", "9"], 5, "no version 9"),
        (["--peft", "lora"], 2, "name one source"),
        (["--labels", "labels"], 2, "--labels is for a PEFT folder"),
        (["--registry", "nowhere"], 2, "not a coordinator's state directory"),
        (["--bundle", "nowhere"], 2, "is not a bundle"),
        (["--bundle", "fleet"], 2, "is not a bundle"),
        (["--key", "nowhere.pem"], 2, "edgeadapt export key"),
        (["--key", "trust.pem"], 4, "trust.pem: not an unencrypted private key"),
        (["--trust", "stranger.pem"], 4, "not a trusted key"),
        (["--trust", "texts"], 4, "not a list of public keys"),
    ],
)
def test_what_cannot_be_exported_leaves_the_bundle_alone(
    export: Run, shop: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(shop)
    (shop / "stranger.pem").write_bytes(IdentityKey.generate(SystemEntropy()).public.to_pem())
    before = everything(shop / "bundle")
    refused(export(*add(shop), *arguments), code, message)
    assert everything(shop / "bundle") == before
    assert [path.name for path in shop.glob(".bundle*")] in ([], [".bundle.lock"])


def test_an_adapter_for_another_base_or_of_another_shape_is_refused(
    export: Run, shop: Path, tiny_base: Base, model: PeftModel
) -> None:
    before = everything(shop / "bundle")
    publish(shop / "other", replace(tiny_base, digest="f" * 64), [tensors(model)])
    refused(export(*add(shop), "--registry", shop / "other"), 2, "made for the base ffffffffffff")
    wide = {n: np.pad(v, ((0, 0), (0, 1))) if "lora_A" in n else v for n, v in tensors(model).items()}
    publish(shop / "wide", tiny_base, [wide])
    refused(export(*add(shop), "--registry", shop / "wide"), 5, "its slot takes [32, ")
    surplus = tensors(model) | {"base_model.model.extra.weight": np.ones((2, 2), np.float32)}
    publish(shop / "surplus", tiny_base, [surplus])
    refused(export(*add(shop), "--registry", shop / "surplus"), 5, "'extra.weight'")
    assert everything(shop / "bundle") == before


@pytest.mark.parametrize("damage", ["flipped", "truncated", "trailing", "empty", "gone"])
def test_a_registry_blob_that_is_damaged_is_refused(export: Run, shop: Path, damage: str) -> None:
    newest = _manifest(shop).sha256
    blob = shop / "fleet" / "blobs" / f"{newest}.safetensors"
    raw = blob.read_bytes()
    changed = {"flipped": raw[:-9] + b"\x55" + raw[-8:], "truncated": raw[:-1], "trailing": raw + b"\0", "empty": b""}
    if damage == "gone":
        blob.unlink()
        refused(export(*add(shop)), 5, "is missing: restore it")
    else:
        blob.write_bytes(changed[damage])
        refused(export(*add(shop)), 4, "was altered")


def _manifest(shop: Path) -> VersionManifest:
    key = IdentityKey.from_pem((shop / "fleet" / "signing.pem").read_bytes())
    registry = open_registry(shop / "fleet", key)
    latest = registry.latest()
    assert latest is not None
    registry.close()
    return latest.manifest


def test_a_registry_that_is_no_database_or_of_another_format_is_refused(export: Run, shop: Path) -> None:
    database = shop / "fleet" / "registry.db"
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE edgeadapt_format SET format = 99")
    connection.close()
    refused(export(*add(shop)), 2, "another format")
    database.write_bytes(b"not a database at all" * 100)
    refused(export(*add(shop)), 5, "is not a registry or is damaged")


@pytest.mark.parametrize("damage", ["flipped", "truncated", "trailing", "empty", "gone", "other signer"])
def test_a_bundle_adapter_that_is_damaged_is_not_given_to_peft(export: Run, shop: Path, damage: str) -> None:
    assert export(*add(shop)).code == 0
    file = shop / "bundle" / "adapters" / "global.onnx_adapter"
    raw = file.read_bytes()
    file.unlink()
    changed = {"flipped": raw[:-9] + b"\x55" + raw[-8:], "truncated": raw[:-1], "trailing": raw + b"\0", "empty": b""}
    if damage == "other signer":
        file.write_bytes(raw)
        (shop / "trust.pem").write_bytes(IdentityKey.generate(SystemEntropy()).public.to_pem())
    elif damage != "gone":
        file.write_bytes(changed[damage])
    done = export("peft", "--bundle", shop / "bundle", "--out", shop / "out")
    messages = {"gone": (5, "is missing"), "other signer": (4, "not a trusted key")}
    refused(done, *messages.get(damage, (4, "is not the file that was signed")))
    assert not (shop / "out").exists()


def test_a_missing_sidecar_and_a_source_too_many_are_refused(export: Run, shop: Path) -> None:
    refused(
        export("peft", "--bundle", shop / "bundle", "--name", "nobody", "--out", shop / "out"),
        5,
        "has no adapter 'nobody'; it has: none",
    )
    refused(export("peft", "--out", shop / "out"), 2, "name one source")
    both = ("peft", "--bundle", shop / "bundle", "--registry", shop / "fleet", "--out", shop / "out")
    refused(export(*both), 2, "name one source")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "no_such_package"], "neither a folder nor an installed package"),
        (["--profile", "native-int3"], "there is no profile 'native-int3'; choose one of fp32"),
        (["--targets", "no_such_layer"], "no module named as in"),
        (["--targets", ","], "a target module"),
        (["--out", "texts"], "is not a bundle"),
        (["--out", "texts/new"], "is not a folder that can be written to"),
    ],
)
def test_a_base_that_cannot_be_exported_leaves_no_trace(
    export: Run, shop: Path, tiny_base: Base, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(shop)
    before = everything(shop)
    done = export("base", "--base", tiny_base.folder, "--out", "new", "--key", "key.pem", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err.splitlines()[-1]
    assert len(done.err.splitlines()) <= 2  # what takes long is announced
    assert everything(shop) == before


@pytest.mark.parametrize(("content", "message"), [(b"", "one text a line"), (b"\xff", "not UTF-8")])
def test_texts_that_are_none_are_refused(
    export: Run, shop: Path, tiny_base: Base, content: bytes, message: str
) -> None:
    (shop / "bad").write_bytes(content)
    command = ("parity", "--bundle", shop / "bundle", "--base", tiny_base.folder, "--registry", shop / "fleet")
    refused(export(*command, "--texts", shop / "bad"), 5, message)
    refused(export(*command, "--texts", shop / "nowhere"), 2, "there is no file")
