"""`python -m benchmarks simulation`: the engines run the same fleet, and the table says what was measured."""

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from aggregation.errors import ConfigError
from benchmarks.simulation import compare
from benchmarks.simulation.contender import tree
from simulations.engine import flowerengine


def side(rate: float, cpu: float, memory: float) -> dict[str, Any]:
    values = {"clients_per_second": rate, "cpu_ms": cpu, "memory": memory}
    return {key: {"median": value, "min": value / 2, "max": value * 2} for key, value in values.items()}


def test_the_table_has_medians_spread_ratio_and_goal() -> None:
    row = {"clients": 30, "rounds": 5, "goal": 20.0, "ratio": 40.0, "cpu_ratio": 30.0, "memory_share": 0.25}
    row |= {"ours": side(120.0, 2.0, 5e8), "masked": side(30.0, 8.0, 5e8), "flower": side(3.0, 60.0, 2e9)}
    text = compare.table({"rows": {"no training": row}, "repeats": 3})
    assert "no training, 30 clients" in text
    for cell in ("120 (60–240)", "30 (15–60)", "3 (1.5–6)", "40.0", "30.0", "≥ 20", "500 (250–1,000)", "0.25"):
        assert cell in text


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
