"""What the measurement of tenants says holds: one more costs its adapter, and a second process shares the base."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from aggregation.errors import ConfigError
from simulations.benchmarks.ondevice import memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sums of pages are Linux's")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bundle", "lm_bundle"])
def test_a_tenant_costs_about_its_adapter(request: pytest.FixtureRequest, kind: str) -> None:
    found: Any = json.loads(json.dumps(memory.measure(request.getfixturevalue(kind), counts=(1, 100))))
    assert list(found["tenants"]) == ["1", "100"]
    assert len(found["processes"]) == 2
    # Beside the tensors of some kilobytes there are their names, shapes and the signed sidecar.
    assert 0.8 * found["adapter_bytes"] < found["bytes_per_tenant"] < found["adapter_bytes"] + 40_000
    for pages in (*found["tenants"].values(), *found["processes"]):
        assert 0 < pages["private"] <= pages["pss"] <= pages["rss"]
        assert pages["rss"] == pytest.approx(pages["shared"] + pages["private"], rel=0.05)


def test_a_system_that_cannot_tell_says_so() -> None:
    with pytest.raises(ConfigError, match="on Linux only"):
        memory.Pages.of(2**31 - 1)


def test_the_bundle_that_is_measured_is_gone_afterwards(bundle: Path, tmp_path: Path) -> None:
    from client.inference.library import Library

    with memory._multiplied(Library.open(bundle, None), "global", 3) as copy:
        library = Library.open(copy, None)
        assert library.names() == ["tenant-0", "tenant-1", "tenant-2"]
        assert {library.trust.adapter(copy, library.base, n).sidecar.rank for n in library.names()} == {4}
    assert not copy.exists()
