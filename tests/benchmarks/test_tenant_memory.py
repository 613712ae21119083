"""Another tenant takes the memory of its adapter, and a second process shares the base."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from aggregation.pki.identity import IdentityKey
from benchmarks.ondevice import memory
from client.inference.library import Library
from export.bundle.write import write_bundle
from export.onnx.exported import ExportedBase
from tests.support import models

globals().update(models.FIXTURES)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc/PID/smaps_rollup")


@pytest.fixture
def int8_bundle(tmp_path: Path, exported_int8: ExportedBase, source: Any, vendor: IdentityKey) -> Path:
    write_bundle(tmp_path / "bundle", exported_int8, [source()], key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    return tmp_path / "bundle"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8_bundle", "lm_bundle"])
def test_a_tenant_takes_about_the_memory_of_its_adapter(request: pytest.FixtureRequest, kind: str) -> None:
    found: Any = json.loads(json.dumps(memory.measure(request.getfixturevalue(kind), counts=(1, 100))))
    assert list(found["tenants"]) == ["1", "100"]
    assert len(found["processes"]) == 2
    # Besides the tensors, of some kilobytes, there are their names, shapes and the signed manifest.
    assert 0.8 * found["adapter_bytes"] < found["bytes_per_tenant"] < found["adapter_bytes"] + 40_000
    for pages in (*found["tenants"].values(), *found["processes"]):
        assert 0 < pages["private"] <= pages["pss"] <= pages["rss"]
        assert pages["rss"] == pytest.approx(pages["shared"] + pages["private"], rel=0.05)
    for pages in found["mapped"] if kind == "int8_bundle" else ():  # its embeddings, which are not copied
        assert pages["rss"] == pages["shared"] > 0  # both processes look the same pages up


def test_the_temporary_bundle_is_removed(bundle: Path, tmp_path: Path) -> None:
    with memory.with_tenants(Library.open(bundle, None), "global", 3) as copy:
        library = Library.open(copy, None)
        assert library.names() == ["tenant-0", "tenant-1", "tenant-2"]
        assert {library.trust.adapter(n, library.base).manifest.rank for n in library.names()} == {4}
    assert not copy.exists()
