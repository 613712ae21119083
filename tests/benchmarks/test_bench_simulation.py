"""`python -m benchmarks simulation`: the engines run the same fleet, and the table says what was measured."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from aggregation.errors import ConfigError
from benchmarks.simulation import compare, flowerengine
from benchmarks.simulation.contender import tree


def test_a_tree_of_processes_has_all_descendants() -> None:
    outer = "import subprocess; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert {process.pid, child} <= set(tree(os.getpid()))
        assert set(tree(process.pid)) == {process.pid, child}
        os.kill(child, 9)


def test_without_ray_the_engine_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flowerengine, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"edgeadapt\[ray\]"):
        flowerengine.require_ray()


@pytest.mark.exhaustive
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_a_quick_run_measures_the_engines() -> None:
    (row,) = compare.compare(compare.QUICK, lambda step: None)["rows"].values()
    assert row["ratio"] > 1
    assert 0 < row["memory_share"] < 1
