"""The bill of materials of a version: valid by CycloneDX's own schema, with the digests of the signed manifests."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from aggregation.errors import ConfigError
from edgeadapt.releases.lineage import Lineage
from tests.edgeadapt.releases.conftest import Vendor
from tests.edgeadapt.releases.test_lineage import called
from tests.support import refused


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
