"""``edgeadapt bundle`` writes bundles, adapters and PEFT folders; every refusal is one line and writes nothing."""

import errno
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError
from aggregation.pki.identity import IdentityKey
from client.inference.session import ClassificationSession
from coordinator.statedir import open_registry
from edgeadapt.bases.base import Base
from edgeadapt.formats import files
from edgeadapt.formats.bundle import PHRASES, Bundle
from edgeadapt.formats.keyfiles import read_key
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.manifest import AdapterManifest, Card, VersionManifest
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.storage import HIDDEN
from edgeadapt.methods.classifier import PhraseClassifier, load, tensors
from edgeadapt.program import TERMINATED
from export.addition import read_card
from export.bundle.write import write_bundle
from export.onnx.exported import ExportedBase
from tests.support import refused
from tests.support.bundles import flip
from tests.support.registry import commit
from tests.support.traces import ROOT

PEFT = ("convert", "--format", "peft")

LABELS = ("Light", "Lock", "Music", "Timer")
TEXTS = ("turn on the kitchen lights", "lock the door", "play music", "set a timer for ten minutes", "unlock")
METHOD = PeftConfig("LORA", 4, 8, ("query", "value"))


Done = Any  # see the fixture `export`
Run = Callable[..., Done]


def publish(state_dir: Path, base: Base, versions: list[Tensors], labels: tuple[str, ...] = LABELS) -> None:
    """A coordinator's state directory with these versions in its registry."""
    state_dir.mkdir()
    key = IdentityKey.generate(SystemEntropy())
    (state_dir / "signing.pem").write_bytes(key.to_pem())
    registry = open_registry(state_dir, key)
    parent = None
    for number, values in enumerate(versions):
        blob = files.encode(values)
        digest, layout = files.sha256(blob), Layout.of(values).digest
        manifest = VersionManifest(
            number, digest, len(blob), base.digest, layout, parent, number, None, None, None, (), {}, None, METHOD,
            labels,
        )  # fmt: skip
        commit(registry, manifest, blob, key)
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
    return ("add", "--registry", shop / "fleet", "--bundle", shop / "bundle", "--key", shop / "key.pem")


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def theirs(base: Base, folder: Path, **changes: Any) -> PeftModel:
    """A folder that peft saved, of a model with random values."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
    inner = PhraseClassifier(AutoModel.from_pretrained(base.folder), 4).eval()
    model = get_peft_model(inner, LoraConfig(**(settings | {"modules_to_save": ["classifier"]} | changes)))
    generator = np.random.default_rng(4)
    load(model, {n: generator.standard_normal(v.shape).astype(np.float32) for n, v in tensors(model).items()})
    model.save_pretrained(folder)
    return model.eval()


def test_a_key_is_private_and_its_public_half_is_in_the_same_folder(export: Run, tmp_path: Path) -> None:
    done = export("key", tmp_path / "vendor.pem", "--json")
    assert done.code == 0, done.err
    key = IdentityKey.from_pem((tmp_path / "vendor.pem").read_bytes())
    assert (tmp_path / "vendor.pub.pem").read_bytes() == key.public.to_pem()
    assert (tmp_path / "vendor.pem").stat().st_mode & 0o777 == 0o600
    assert done.json()["id"] == key.public.key_id
    assert key.raw.hex() not in done.out + done.err


def test_a_full_disk_leaves_no_peft_folder_and_the_line_names_the_file(
    export: Run, shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = everything(shop)
    monkeypatch.setattr(Path, "write_bytes", full)
    done = export(*PEFT, "--registry", shop / "fleet", "--out", shop / "out")
    assert (done.code, done.out) == (1, "")
    assert "adapter_config.json" in done.err
    assert len(done.err.splitlines()) == 1
    assert everything(shop) == before
    assert not list(shop.glob("*out*"))


def test_the_newest_version_of_a_registry_runs_on_a_device_and_opens_in_peft_again(
    export: Run, shop: Path, model: PeftModel, tiny_base: Base
) -> None:
    done = export(*add(shop), "--json")
    assert done.code == 0, done.err
    assert (done.json()["version"], done.json()["format"], done.json()["rank"]) == (2, "int8", 4)
    session = ClassificationSession.open(shop / "bundle")
    assert {answer.label for answer in session.classify(TEXTS, "global")} <= set(LABELS)
    assert export(*PEFT, "--bundle", shop / "bundle", "--out", shop / "from-bundle").code == 0
    assert export(*PEFT, "--registry", shop / "fleet", "--out", shop / "from-registry").code == 0
    ids = torch.tensor([[2, 5, 9, 3]])
    for folder, tolerance in (("from-registry", 1e-6), ("from-bundle", 0.5)):
        inner = PhraseClassifier(AutoModel.from_pretrained(tiny_base.folder), 4)
        reopened = PeftModel.from_pretrained(inner, shop / folder).eval()
        assert reopened.peft_config["default"].lora_alpha == 8
        with torch.no_grad():
            difference = reopened(ids, torch.ones_like(ids)) - model(ids, torch.ones_like(ids))
        assert difference.abs().max() < tolerance


def test_the_adapter_manifest_states_the_source_and_the_peft_config(export: Run, shop: Path) -> None:
    done = export(*add(shop), "--version", "1", "--json").json()
    key = IdentityKey.from_pem((shop / "key.pem").read_bytes())
    manifest = AdapterManifest.accept((shop / "bundle/adapters/global.json").read_bytes(), [key.public])
    assert manifest.peft_config == METHOD
    assert manifest.source == files.sha256((shop / f"fleet/blobs/{manifest.source}.safetensors").read_bytes())
    assert manifest.sha256 == files.sha256((shop / "bundle/adapters/global.onnx_adapter").read_bytes())
    assert (manifest.version, list(manifest.labels)) == (1, list(LABELS))
    assert done["layout_digest"] == manifest.layout_digest


CARD = """owner = "Zoë Ltd"
purpose = "Lights"
data = "Phrases of volunteers"
license = "LicenseRef-Ours OR Apache-2.0"
languages = ["de", "en-GB"]
"""


def test_a_card_is_signed_into_the_manifest_and_the_version_stays(export: Run, shop: Path) -> None:
    (shop / "card.toml").write_text(CARD)
    assert export(*add(shop), "--json").json()["card"] is None
    done = export(*add(shop), "--card", shop / "card.toml", "--json").json()
    assert done["card"] == tomllib.loads(CARD)
    key = IdentityKey.from_pem((shop / "key.pem").read_bytes())
    manifest = AdapterManifest.accept((shop / "bundle/adapters/global.json").read_bytes(), [key.public])
    assert manifest.card == Card.read(shop / "card.toml")
    assert (manifest.version, export(*add(shop), "--json").json()["version"]) == (2, 2)


@pytest.mark.parametrize(
    ("before", "after", "about"),
    [
        ("owner", 'ownr = "Zoë"\nowner', "ownr"),
        ('data = "Phrases of volunteers"\n', "", "data"),
        ("Zoë Ltd", "", "owner"),
        ("Zoë Ltd", "Zoë\\u001b[2J", "owner"),
        ("Lights", "x" * 501, "purpose"),
        ("Apache-2.0", "Apache 2", "license"),
        (" OR ", " OR (", "license"),
        ('["de", "en-GB"]', "[]", "languages"),
        ('["de", "en-GB"]', '"de"', "languages"),
        ("en-GB", "English, of course", "languages.1"),
        (CARD, "", "owner"),
        ("owner", "x" * 2**17, "card.toml"),
    ],
    ids=lambda text: text[:20],
)
def test_a_card_that_says_something_else_is_refused(
    export: Run, shop: Path, before: str, after: str, about: str
) -> None:
    (shop / "card.toml").write_text(CARD.replace(before, after))
    everything_before = everything(shop)
    export(*add(shop), "--card", shop / "card.toml").refused(2, about)
    assert everything(shop) == everything_before


def test_a_license_is_read_by_its_form_where_no_package_knows_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "card.toml").write_text(CARD.replace("Apache-2.0", "Unheard-of"))
    with refused(ConfigError, "license"):
        read_card(tmp_path / "card.toml")
    monkeypatch.setitem(sys.modules, "cyclonedx.spdx", None)
    assert read_card(tmp_path / "card.toml").license == "LicenseRef-Ours OR Unheard-of"


def test_a_peft_folder_becomes_an_adapter_with_the_given_labels(export: Run, shop: Path, tiny_base: Base) -> None:
    theirs(tiny_base, shop / "lora", rank_pattern={r"layer\.0.*query": 2}, target_modules=["query"])
    command = ("add", "--peft", shop / "lora", "--bundle", shop / "bundle", "--key", shop / "key.pem")
    export(*command).refused(5, "labels")
    done = export(*command, "--labels", shop / "labels", "--adapter", "mine", "--version", "7", "--json")
    assert done.code == 0, done.err
    assert (done.json()["name"], done.json()["version"], done.json()["rank"]) == ("mine", 7, 4)
    session = ClassificationSession.open(shop / "bundle")
    assert session.classify(TEXTS, "mine")[0].label in LABELS


def test_a_peft_folder_without_a_version_gets_the_next_one_if_its_content_is_new(
    export: Run, shop: Path, tiny_base: Base
) -> None:
    command = ("add", "--bundle", shop / "bundle", "--key", shop / "key.pem", "--labels", shop / "labels", "--json")
    for number, (query, expected) in enumerate(((2, 1), (2, 1), (3, 2), (2, 3))):
        theirs(tiny_base, shop / f"lora-{number}", rank_pattern={r"layer\.0.*query": query}, target_modules=["query"])
        done = export(*command, "--peft", shop / f"lora-{number}", "--adapter", "mine")
        assert done.code == 0, done.err
        assert done.json()["version"] == expected
        ClassificationSession.open(shop / "bundle").load("mine")  # the device accepts each
    changed = shop / "other-labels"
    changed.write_text("\n".join(reversed((shop / "labels").read_text().split())))
    done = export(*command, "--peft", shop / "lora-3", "--adapter", "mine", "--labels", changed)
    assert done.json()["version"] == 4


def test_a_version_older_than_the_bundles_is_refused(export: Run, shop: Path) -> None:
    assert export(*add(shop)).code == 0
    before = everything(shop / "bundle")
    export(*add(shop), "--version", "1").refused(5, "version")
    assert everything(shop / "bundle") == before


def test_parity_passes_for_an_fp32_adapter_and_exits_with_6_for_an_int4_one(
    export: Run, shop: Path, tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("check", "--bundle", shop / "bundle", "--base", tiny_base.folder, "--texts", shop / "texts")
    assert export(*add(shop), "--format", "fp32").code == 0
    done = export(*command, "--registry", shop / "fleet", "--json")
    assert done.code == 0, done.err
    found = done.json()
    assert (found["agreement"], found["count"], found["texts"], found["profile"]) == (1.0, *2 * [len(TEXTS)], "fp32")
    assert found["max_abs_diff"] < 1e-5
    assert found["loss"] is None
    assert found["passed"] is None
    assert "too few" in done.err
    (shop / "many").write_text("\n".join(f"{text} {number}" for text in TEXTS for number in range(20)))
    done = export(*command[:-1], shop / "many", "--registry", shop / "fleet", "--json")
    assert (done.code, done.json()["count"], done.json()["passed"], "too few to judge" in done.err) == (
        0,
        100,
        True,
        False,
    )
    assert export(*add(shop), "--format", "int4").code == 0
    done = export(*command, "--registry", shop / "fleet", "--json")
    # Four bits differ by more than the limits of an fp32 base allow in a single answer, which more cannot mend.
    assert done.code == 6
    assert '"passed": false' in done.out
    assert done.error.about == "parity"
    export(*command, "--registry", shop / "fleet", "--version", "0").refused(5, "source")


def test_a_base_is_exported_before_its_adapters(export: Run, shop: Path, tiny_base: Base) -> None:
    command = (
        "make",
        "--base",
        tiny_base.folder,
        "--bundle",
        shop / "new",
        "--key",
        shop / "key.pem",
        "--max-rank",
        "3",
    )
    done = export(*command, "--json")
    assert done.code == 0, done.err
    assert (done.json()["profile"], done.json()["max_rank"], done.json()["slots"]) == ("native-int8", 3, 10)
    into = ("add", "--registry", shop / "fleet", "--bundle", shop / "new", "--key", shop / "key.pem")
    export(*into).refused(5, "rank")
    assert not (shop / "new" / "adapters").exists()


def test_more_layers_than_the_base_has_are_refused(export: Run, shop: Path, tiny_base: Base) -> None:
    command = ("make", "--base", tiny_base.folder, "--bundle", shop / "new", "--key", shop / "key.pem")
    export(*command, "--layers", "3").refused(2, "--layers")
    assert not (shop / "new").exists()


def test_public_phrases_are_a_signed_file_of_the_base(export: Run, shop: Path, tiny_base: Base) -> None:
    (shop / "public.tsv").write_text("Light\tlights on\n\n Music \t play music \n")
    out, key = shop / "learns", shop / "key.pem"
    done = export("make", "--base", tiny_base.folder, "--phrases", shop / "public.tsv", "--bundle", out, "--key", key)
    assert done.code == 0, done.err
    base = Bundle(out, (read_key(key).public,)).base()
    assert base.read(PHRASES) == b"Light\tlights on\nMusic\tplay music\n"


# Refusals: one line with the error's exit code, and the bundle is unchanged.


@pytest.mark.parametrize(
    ("arguments", "code", "about"),
    [
        (["--adapter", "../evil"], 2, "name"),
        (["--version", "9"], 5, "version"),
        (["--peft", "lora"], 2, "--registry"),
        (["--labels", "labels"], 2, "--labels"),
        (["--registry", "nowhere"], 2, "registry.db"),
        (["--bundle", "fleet"], 2, "manifest.json"),
        (["--key", "nowhere.pem"], 2, "nowhere.pem"),
        (["--trust", "stranger.pem"], 4, "manifest"),
    ],
)
def test_an_adapter_that_cannot_be_exported_leaves_the_bundle_unchanged(
    export: Run, shop: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, about: str
) -> None:
    monkeypatch.chdir(shop)
    (shop / "stranger.pem").write_bytes(IdentityKey.generate(SystemEntropy()).public.to_pem())
    before = everything(shop / "bundle")
    export(*add(shop), *arguments).refused(code, about)
    assert everything(shop / "bundle") == before
    assert [path.name for path in shop.glob(".bundle*")] in ([], [".bundle.lock"])


def test_an_adapter_for_another_base_or_of_another_shape_is_refused(
    export: Run, shop: Path, tiny_base: Base, model: PeftModel
) -> None:
    before = everything(shop / "bundle")
    publish(shop / "other", replace(tiny_base, digest="f" * 64), [tensors(model)])
    export(*add(shop), "--registry", shop / "other").refused(2, "base_digest")
    wide = {n: np.pad(v, ((0, 0), (0, 1))) if "lora_A" in n else v for n, v in tensors(model).items()}
    publish(shop / "wide", tiny_base, [wide])
    export(*add(shop), "--registry", shop / "wide").refused(
        5, "encoder.encoder.layer.0.attention.self.query.lora_A.weight"
    )
    surplus = tensors(model) | {"base_model.model.extra.weight": np.ones((2, 2), np.float32)}
    publish(shop / "surplus", tiny_base, [surplus])
    export(*add(shop), "--registry", shop / "surplus").refused(5, "extra.weight")
    assert everything(shop / "bundle") == before


def test_damaged_and_missing_registry_blobs_are_refused(export: Run, shop: Path) -> None:
    blobs = list((shop / "fleet" / "blobs").iterdir())
    for blob in blobs:
        flip(blob, 1)
    export(*add(shop)).refused(4, "blob")
    for blob in blobs:
        blob.unlink()
    export(*add(shop)).refused(5, "blob")


def test_a_damaged_adapter_of_a_bundle_and_one_of_another_signer_are_not_written_for_peft(
    export: Run, shop: Path
) -> None:
    assert export(*add(shop)).code == 0
    file = shop / "bundle" / "adapters" / "global.onnx_adapter"
    flip(file, 1)
    peft = (*PEFT, "--bundle", shop / "bundle", "--out", shop / "out")
    export(*peft).refused(4, file.name)
    flip(file, 1)
    (shop / "trust.pem").write_bytes(IdentityKey.generate(SystemEntropy()).public.to_pem())
    export(*peft).refused(4, "keyid")
    assert not (shop / "out").exists()


def test_a_missing_adapter_no_source_and_two_sources_are_refused(export: Run, shop: Path) -> None:
    export(*PEFT, "--bundle", shop / "bundle", "--adapter", "nobody", "--out", shop / "out").refused(5, "nobody.json")
    export(*PEFT, "--out", shop / "out").refused(2, "--registry")
    both = (*PEFT, "--bundle", shop / "bundle", "--registry", shop / "fleet", "--out", shop / "out")
    export(*both).refused(2, "--registry")


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        (["--base", "no_such_package"], "base"),
        (["--profile", "native-int3"], "--profile"),
        (["--targets", ","], "--targets"),
        (["--bundle", "texts/new"], "texts"),
    ],
)
def test_a_base_that_cannot_be_exported_leaves_no_trace(
    export: Run, shop: Path, tiny_base: Base, monkeypatch: pytest.MonkeyPatch, arguments: list[str], about: str
) -> None:
    monkeypatch.chdir(shop)
    before = everything(shop)
    export("make", "--base", tiny_base.folder, "--bundle", "new", "--key", "key.pem", *arguments).refused(2, about)
    assert everything(shop) == before


def test_a_file_without_texts_is_refused(export: Run, shop: Path, tiny_base: Base) -> None:
    (shop / "bad").write_bytes(b"\n \n")
    command = ("check", "--bundle", shop / "bundle", "--base", tiny_base.folder, "--registry", shop / "fleet")
    export(*command, "--texts", shop / "bad").refused(5, "bad")
    export(*command, "--texts", shop / "nowhere").refused(2, "nowhere")


# An export that is ended


@pytest.mark.slow
def test_an_export_that_is_terminated_leaves_nothing_and_the_next_one_deletes_what_a_killed_one_left(
    export: Callable[..., Any], key: Path, tiny_base: Base, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    command = ("make", "--base", str(tiny_base.folder), "--bundle", str(out), "--key", str(key))

    def ended(by: signal.Signals) -> int:
        """The exit code of an export that gets a signal while it writes its files."""
        program = [sys.executable, "-m", "tests.support.traces", "bundle", *command]
        with subprocess.Popen(program, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
            while not list(tmp_path.glob(f"{HIDDEN}*/content/*")):
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.002)
            process.send_signal(by)
        return process.returncode

    before = set(tmp_path.iterdir())
    assert ended(signal.SIGTERM) == TERMINATED
    assert set(tmp_path.iterdir()) == before
    assert ended(signal.SIGKILL) == -signal.SIGKILL
    assert list(tmp_path.glob(f"{HIDDEN}*/content/*"))
    assert not out.exists()
    assert export(*command).code == 0
    assert list(tmp_path.glob(f"{HIDDEN}*")) == []
    assert out.is_dir()
