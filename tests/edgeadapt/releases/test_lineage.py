"""What `edgeadapt release` says of versions, and what it refuses to say of altered ones."""

import json
import shutil
import sqlite3
import sys
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from sqlalchemy import create_engine, select, text

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError
from aggregation.pki.identity import IdentityKey
from coordinator.registry import database
from edgeadapt.bases.base import Base
from edgeadapt.formats.graphinputs import LORA_A, LORA_B
from edgeadapt.formats.registryfiles import DATABASE, REGISTRY, RegistrySettings
from edgeadapt.formats.registrystores import postgresql_url
from edgeadapt.formats.storage import PRIVATE
from edgeadapt.program import cli
from edgeadapt.releases.history import audit_repository
from edgeadapt.releases.lineage import Lineage, TensorChange, difference
from edgeadapt.releases.rollback import roll_back
from tests.docs.conftest import ROOT, Reader, blocks_of
from tests.edgeadapt.releases.conftest import CARD, Vendor, version_of
from tests.edgeadapt.releases.test_gates import Place
from tests.support import refused


def called(*words: object) -> str:
    done = CliRunner().invoke(cli, ["release", *map(str, words)])
    if isinstance(done.exception, EdgeAdaptError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def as_json(*words: object) -> Any:
    return json.loads(called(*words, "--json"))


def test_the_list_has_each_version_with_its_round_and_its_channel(vendor_place: Vendor) -> None:
    vendor_place.repository.protect("stable", on=False)
    vendor_place.publish(1)
    vendor_place.repository.promote("canary", 1, "stable", ())
    vendor_place.publish(2)
    state_dir, releases = vendor_place.state_dir, vendor_place.repository.folder
    found = as_json("versions", state_dir, "--releases", releases)["versions"]
    assert [each["version"] for each in found] == [0, 1, 2]
    assert [each["parent"] for each in found] == [None, found[0]["sha256"], found[1]["sha256"]]
    places = [[(p["channel"], p["release"], p["current"]) for p in each["releases"]] for each in found]
    assert places == [[], [("canary", 1, False), ("stable", 1, True)], [("canary", 2, True)]]
    lines = called("versions", state_dir, "--releases", releases).splitlines()
    assert " ".join(lines[2].split()) == "1 1 2 0.600 1.000 epsilon 2.00 for delta 1e-06 stable 1"
    assert as_json("versions", state_dir)["versions"][1]["releases"] is None


def test_a_version_is_found_in_a_release_that_a_rollback_signed_again(vendor_place: Vendor) -> None:
    vendor_place.repository.protect("stable", on=False)
    vendor_place.publish(1, "stable")
    vendor_place.publish(2, "stable")
    roll_back(vendor_place.repository, "stable", 1, vendor_place.key)
    found = as_json("versions", vendor_place.state_dir, 1, "--releases", vendor_place.repository.folder)
    places = [(each["release"], each["version"], each["current"]) for each in found["releases"]]
    assert places == [(1, 2, False), (3, 4, True)]
    assert [each["card"] for each in found["releases"]] == [CARD.model_dump(mode="json")] * 2
    words = ("versions", vendor_place.state_dir, 1, "--releases", vendor_place.repository.folder)
    assert called(*words).count(f"\n             {CARD}\n") == 2


def test_both_releases_of_a_rollout_are_on_offer(vendor_place: Vendor) -> None:
    vendor_place.repository.protect("stable", on=False)
    vendor_place.publish(1, "stable")
    vendor_place.publish(2)
    vendor_place.repository.promote("canary", 1, "stable", (), share=10)
    found = as_json("versions", vendor_place.state_dir, "--releases", vendor_place.repository.folder)["versions"]
    places = [[(p["channel"], p["release"], p["current"]) for p in each["releases"]] for each in found]
    assert places == [[], [("stable", 1, True)], [("canary", 1, True), ("stable", 2, True)]]


def test_the_commands_say_the_same_of_a_registry_in_postgresql(vendor_place: Vendor, postgresql: str) -> None:
    folder = vendor_place.state_dir
    words = [("versions", folder), ("versions", folder, 2), ("versions", folder, 0, 2)]
    before = [as_json(*each) for each in words]
    components = json.loads(called("versions", folder, 2, "--sbom"))["components"]
    local, remote = create_engine(f"sqlite:///{folder / DATABASE}"), database.connect(postgresql_url(postgresql))
    with local.connect() as source, remote.begin() as target:
        for table in (database.versions, database.rounds):
            target.execute(table.insert(), [dict(row._mapping) for row in source.execute(select(table))])
    (folder / DATABASE).unlink()
    (folder / REGISTRY).write_text(RegistrySettings(database=postgresql).to_toml())
    assert [as_json(*each) for each in words] == before
    assert json.loads(called("versions", folder, 2, "--sbom"))["components"] == components
    with remote.begin() as target:
        target.execute(text("DELETE FROM edgeadapt_rounds WHERE round = 1"))
    with refused(TrustError, "record"):
        called("versions", folder)


def test_show_names_the_signer_and_what_made_a_version(vendor_place: Vendor) -> None:
    found = as_json("versions", vendor_place.state_dir, 2)
    assert found["signed_by"] == vendor_place.coordinator.public.key_id
    assert found["rule"] == {"name": "FedAvg", "numbers": {"learning_rate": 1.0}}
    assert (found["survivors"], found["dropped"], found["privacy"]["epsilon"]) == (["anna", "ben"], {"cora": "plan"}, 4)
    text = called("versions", vendor_place.state_dir, 2)
    assert f"parent       {found['parent']}" in text
    assert "rule         FedAvg (learning_rate 1)" in text
    assert "none: it is the first" in called("versions", vendor_place.state_dir, 0)


def test_a_reviewer_may_name_the_coordinators_key(vendor_place: Vendor, tmp_path: Path) -> None:
    (vendor_place.state_dir / "coordinator.pem").unlink()
    with refused(ConfigError, "coordinator.pem"):
        called("versions", vendor_place.state_dir)
    pinned, own = tmp_path / "coordinator.pem", vendor_place.coordinator.public.to_pem()
    pinned.write_bytes(own)
    assert len(as_json("versions", vendor_place.state_dir, "--trust", pinned)["versions"]) == 3
    pinned.write_bytes(own + vendor_place.key.public.to_pem())
    with refused(DataError, "--trust"):  # a coordinator has one key
        called("versions", vendor_place.state_dir, "--trust", pinned)
    pinned.write_bytes(IdentityKey.generate(SystemEntropy()).public.to_pem())
    with refused(TrustError, "manifest"):
        called("versions", vendor_place.state_dir, "--trust", pinned)


def test_what_does_not_exist_is_named(vendor_place: Vendor, tmp_path: Path) -> None:
    for words in (("versions", vendor_place.state_dir, 7), ("versions", vendor_place.state_dir, 0, 7)):
        with refused(ConfigError, "version"):
            called(*words)
    with refused(ConfigError, "registry.db"):
        called("versions", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no repository of channels"):
        called("versions", vendor_place.state_dir, "--releases", tmp_path)


def _execute(state_dir: Path, statement: str) -> None:
    with closing(sqlite3.connect(state_dir / "registry.db")) as database:
        database.execute(statement)
        database.commit()


@pytest.mark.parametrize(
    ("kept", "error", "about"), [("version < 0", DataError, "registry"), ("version <> 1", TrustError, "version")]
)
def test_a_registry_that_lacks_versions_is_named(
    vendor_place: Vendor, kept: str, error: type[EdgeAdaptError], about: str
) -> None:
    _execute(vendor_place.state_dir, f"DELETE FROM edgeadapt_versions WHERE NOT {kept}")  # noqa: S608
    with refused(error, about):
        called("versions", vendor_place.state_dir)


def test_a_version_that_the_coordinators_key_signed_outside_of_a_round(
    vendor_place: Vendor, tiny_base: Any, model: Any
) -> None:
    """Who has the key alone, and no transcript of a round, cannot slip a version in."""
    manifest, _ = version_of(2, vendor_place.values[0], tiny_base, None)
    signed = manifest.sign(vendor_place.coordinator)
    with closing(sqlite3.connect(vendor_place.state_dir / "registry.db")) as database:
        values = (manifest.sha256, signed)
        database.execute("UPDATE edgeadapt_versions SET sha256 = ?, manifest = ? WHERE version = 2", values)
        database.commit()
    with refused(TrustError, "record"):
        called("versions", vendor_place.state_dir)


def test_a_record_of_a_round_that_was_removed(vendor_place: Vendor) -> None:
    _execute(vendor_place.state_dir, "DELETE FROM edgeadapt_rounds WHERE round = 2")
    with refused(TrustError, "record"):
        called("versions", vendor_place.state_dir, 0)


def test_diff_compares_tensors_labels_metrics_and_privacy(vendor_place: Vendor) -> None:
    found = as_json("versions", vendor_place.state_dir, 1, 2)
    names = {each["name"] for each in found["tensors"]}
    assert names == set(vendor_place.values[0])
    for each in found["tensors"]:
        old, new = vendor_place.values[1][each["name"]], vendor_place.values[2][each["name"]]
        assert each["before"] == pytest.approx(np.linalg.norm(old), rel=1e-5)
        assert each["change"] == pytest.approx(np.linalg.norm(new - old), rel=1e-5)
        cosine = float((old * new).sum() / np.linalg.norm(old) / np.linalg.norm(new))
        assert each["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert found["metrics"]["accuracy"] == pytest.approx([0.6, 0.7])
    assert [each["epsilon"] for each in found["privacy"]] == [2, 4]
    assert (found["labels_added"], found["labels_removed"], found["labels_moved"]) == ([], [], False)
    text = called("versions", vendor_place.state_dir, 1, 2)
    assert "accuracy: 0.6 to 0.7" in text
    assert "update B A of a layer" in text


def test_a_version_does_not_differ_from_itself(vendor_place: Vendor) -> None:
    found = as_json("versions", vendor_place.state_dir, 2, 2)
    assert {each["change"] for each in (*found["tensors"], *found["updates"])} == {0}
    assert found["total"]["cosine"] == pytest.approx(1)


def test_the_same_update_from_other_factors_is_no_change(vendor_place: Vendor) -> None:
    lineage = Lineage.read(vendor_place.state_dir, None, None)
    manifest, before = lineage.version(1).manifest, lineage.registry.tensors(lineage.version(1).manifest)
    factors = {LORA_A: 2.0, LORA_B: 0.5}
    after = {
        name: value * np.float32(next((f for end, f in factors.items() if name.endswith(end)), 1.0))
        for name, value in before.items()
    }
    found = difference(manifest, manifest, before, after)
    assert found.updates
    assert max(each.change for each in found.updates) == pytest.approx(0, abs=1e-5)
    assert max(each.change for each in found.tensors) > 1


def test_other_layouts_and_labels_are_named(vendor_place: Vendor) -> None:
    lineage = Lineage.read(vendor_place.state_dir, None, None)
    old = lineage.version(1).manifest
    new = replace(old, labels=("Timer", "Light", "Blinds"), base_digest="0" * 64)
    a = {"x": np.ones((2, 2), np.float32), "y": np.ones(3, np.float32)}
    b = {"x": np.ones((2, 3), np.float32), "z": np.ones(3, np.float32)}
    found = difference(old, new, a, b)
    assert (found.added, found.removed, found.tensors, found.total) == (("x", "z"), ("x", "y"), (), None)
    assert (found.labels_added, found.labels_removed) == (("Blinds",), ("Lock", "Music"))
    assert not found.same_base
    assert difference(old, replace(old, labels=old.labels[::-1]), a, a).labels_moved


def test_a_zero_tensor_has_no_angle() -> None:
    zero = TensorChange.of("x", np.zeros(3, np.float32), np.ones(3, np.float32))
    assert (zero.cosine, zero.before) == (None, 0)


# The commands of docs/how-to/govern-adapters.md, as its reader would run them.
@pytest.mark.slow
def test_the_page_takes_a_version_from_a_round_to_a_channel_and_back(
    vendor_place: Vendor, tiny_base: Base, tmp_path: Path
) -> None:
    work, made = tmp_path / "work", Place(vendor_place, tmp_path)
    (work / "next").mkdir(parents=True)
    vendor_place.publish(1)
    shutil.copytree(vendor_place.bundle, work / "bundle")
    (made.folder / "trust.pem").write_bytes(vendor_place.key.public.to_pem())
    answers = made.answers(1)
    made.held_out(answers)
    shutil.copyfile(made.folder / "held-out.tsv", work / "held-out.tsv")
    rows = [line.split("\t") for line in (work / "held-out.tsv").read_text().splitlines()]
    (work / "canaries.tsv").write_text("\n".join(f"{label}\t{phrase}" for label, phrase, _ in rows[:3]))
    (work / "texts.txt").write_text("\n".join(phrase for _, phrase, _ in rows[:12]))
    (work / "trust.pem").write_bytes(vendor_place.key.public.to_pem())
    (work / "vendor.key").write_bytes(vendor_place.key.to_pem())
    (work / "vendor.key").chmod(PRIVATE)
    vendor_place.publish(1, version=3)
    shutil.copytree(vendor_place.bundle, work / "next" / "bundle")
    shutil.copytree(vendor_place.state_dir, work / "fleet")
    shutil.copytree(tiny_base.folder, work / "base")
    program = tmp_path / "bin" / "edgeadapt"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.support.traces "$@"\n')
    reader = Reader(work, program.parent)
    printed = [reader.run(block.commands) for block in blocks_of(ROOT / "docs" / "how-to" / "govern-adapters.md")]
    assert "canary 1" in printed[0]
    assert printed[3].count("passed  parity of global") == 2  # printed, and in the log
    assert (work / "peft-1" / "adapter_model.safetensors").is_file()
    assert "stable, release 3: global 4" in printed[4]
    kinds = [record.action.kind for record in audit_repository(work / "releases", None).records]
    assert kinds == ["init", "publish", "promote", "publish", "promote", "rollback"]


# The bill of materials of a version: valid by CycloneDX's own schema, with the digests of the signed manifests.
def is_valid(text: str) -> bool:
    from cyclonedx.schema import SchemaVersion  # takes seconds, of each worker
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


@pytest.fixture
def document(vendor_place: Vendor) -> dict[str, Any]:
    vendor_place.publish(2)
    text = called("versions", "--sbom", vendor_place.state_dir, 2, "--releases", vendor_place.repository.folder)
    assert is_valid(text)
    found: dict[str, Any] = json.loads(text)
    return found


def test_it_has_the_adapter_its_ancestors_and_its_base(document: dict[str, Any], vendor_place: Vendor) -> None:
    adapter = document["metadata"]["component"]
    manifests = [each.manifest for each in Lineage.read(vendor_place.state_dir, None, None).versions]
    assert adapter["hashes"] == [{"alg": "SHA-256", "content": manifests[2].sha256}]
    ancestors = {each["version"]: each["hashes"][0]["content"] for each in adapter["pedigree"]["ancestors"]}
    assert ancestors == {"0": manifests[0].sha256, "1": manifests[1].sha256}
    (base,) = [each for each in document["components"] if each["name"] == "base"]
    assert base["hashes"][0]["content"] == manifests[2].base_digest
    stated = {each["name"]: each["value"] for each in adapter["properties"]}
    assert stated["edgeadapt:signed-by"] == vendor_place.coordinator.public.key_id
    assert stated["edgeadapt:privacy"] == "epsilon 4.00 for delta 1e-06"


def test_it_has_the_file_of_a_release(document: dict[str, Any], vendor_place: Vendor) -> None:
    release = vendor_place.repository.release("canary")
    assert release is not None
    manifest = vendor_place.repository.manifest("canary", release, "global")
    (file,) = [each for each in document["components"] if each["type"] == "file"]
    assert (file["version"], file["hashes"][0]["content"]) == ("3", manifest.sha256)
    assert (file["supplier"]["name"], file["description"]) == (CARD.owner, CARD.purpose)
    assert file["licenses"] == [{"expression": CARD.license}]
    stated = {each["name"]: each["value"] for each in file["properties"]}
    assert stated == {"edgeadapt:data": CARD.data, "edgeadapt:languages": "de, en"}


def test_it_has_the_packages_of_the_bare_install_and_no_more(document: dict[str, Any]) -> None:
    packages = {each["name"]: each["version"] for each in document["components"] if each["type"] == "library"}
    for name in ("edgeadapt", "onnxruntime", "cryptography", "tuf", "pydantic-core"):
        assert packages[name] == version(name)
    assert not packages.keys() & {"torch", "flwr", "sqlalchemy"}


def test_it_is_written_to_a_file(vendor_place: Vendor, tmp_path: Path) -> None:
    out = tmp_path / "adapter.cdx.json"
    called("versions", "--sbom", vendor_place.state_dir, 0, "--out", out)
    assert json.loads(out.read_text())["bomFormat"] == "CycloneDX"


def test_of_a_version_that_does_not_exist(vendor_place: Vendor) -> None:
    with refused(ConfigError, "version"):
        called("versions", "--sbom", vendor_place.state_dir, 9)
