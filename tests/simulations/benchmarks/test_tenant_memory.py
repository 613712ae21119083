"""Another tenant takes the memory of its adapter, and a second process shares the base."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from aggregation.errors import ConfigError
from client.inference.library import Library
from simulations.benchmarks.ondevice import memory
from tests.support import models, refused

globals().update(models.FIXTURES)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc/PID/smaps_rollup")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bundle", "lm_bundle"])
def test_a_tenant_takes_about_the_memory_of_its_adapter(request: pytest.FixtureRequest, kind: str) -> None:
    found: Any = json.loads(json.dumps(memory.measure(request.getfixturevalue(kind), counts=(1, 100))))
    assert list(found["tenants"]) == ["1", "100"]
    assert len(found["processes"]) == 2
    # Besides the tensors, of some kilobytes, there are their names, shapes and the signed manifest.
    assert 0.8 * found["adapter_bytes"] < found["bytes_per_tenant"] < found["adapter_bytes"] + 40_000
    for pages in (*found["tenants"].values(), *found["processes"]):
        assert 0 < pages["private"] <= pages["pss"] <= pages["rss"]
        assert pages["rss"] == pytest.approx(pages["shared"] + pages["private"], rel=0.05)


def test_without_smaps_rollup_memory_is_not_measured() -> None:
    with refused(ConfigError, "smaps_rollup"):
        memory.Pages.of(2**31 - 1)


def test_the_temporary_bundle_is_removed(bundle: Path, tmp_path: Path) -> None:
    with memory.with_tenants(Library.open(bundle, None), "global", 3) as copy:
        library = Library.open(copy, None)
        assert library.names() == ["tenant-0", "tenant-1", "tenant-2"]
        assert {library.trust.adapter(n, library.base).manifest.rank for n in library.names()} == {4}
    assert not copy.exists()
