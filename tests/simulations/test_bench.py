"""The benchmark runs, at a size that says nothing about speed, and its JSON has the keys that it promises."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgeadapt import cli
from simulations.bench import ours
from simulations.bench.timing import Timing, measure

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    picture = tmp_path_factory.mktemp("bench") / "sweep.png"
    result = CliRunner().invoke(cli, ["bench", "secagg", "--quick", "--json", "--repeats", "1", "--out", str(picture)])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), picture


def test_the_json_has_medians_ratios_and_bytes_of_both_sides(ran: tuple[dict[str, Any], Path]) -> None:
    found, _ = ran
    assert set(found["server"]) == {"0", "0.1", "0.3"}
    for pair in (found["client"], found["shares"], *found["server"].values()):
        assert pair["ratio"] == pytest.approx(pair["peer_ms"] / pair["ours_ms"])
    assert 0 < found["bytes"]["ours"] < 1.02 * found["bytes"]["peer"]
    assert found["mask_fraction_of_limit"] > 0


def test_the_sweeps_are_fitted_and_drawn(ran: tuple[dict[str, Any], Path]) -> None:
    found, picture = ran
    assert set(found["sweep"]) == {"devices", "elements"}
    for line in found["sweep"].values():
        assert set(line["growth"]) == {"deal", "client", "server"}
    assert picture.read_bytes().startswith(PNG)


def test_a_picture_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    from aggregation.errors import DataError
    from simulations.bench.report import draw

    line = {"at": [1, 2], "cpu_ms": {"client": [1.0, 2.0]}, "growth": {"client": 1.0}}
    with pytest.raises(DataError, match="choose another --out"):
        draw({"devices": line, "elements": line}, tmp_path / "missing" / "x.png")


def test_the_round_that_is_timed_gives_the_right_sum() -> None:
    fleet = ours.make(20, 10, 7, 100)
    begun, rng = fleet.begin(), np.random.default_rng(1)
    values = {name: {"delta": rng.uniform(-1, 1, 100)} for name in fleet.devices}
    bodies = {name: fleet.upload(fleet.planned(name, begun.plan), values[name], rng) for name in fleet.devices}
    gone = ours.lost(fleet, 0.3)
    assert len(gone) == 6
    result = ours.finish(ours.ask(ours.collect(fleet, bodies, begun, gone)))
    plain = np.sum([values[name]["delta"] for name in result.survivors], axis=0)
    assert result.dropped == tuple(sorted(gone))
    assert np.abs(result.values["delta"] - plain).max() < 1e-6


def test_a_timing_takes_a_fresh_input_each_time() -> None:
    given = iter(range(10))
    seen: list[int] = []
    timing = measure(seen.append, lambda: next(given), 3)
    assert seen == [0, 1, 2]
    assert len(timing.wall) == len(timing.cpu) == 3
    assert Timing((1.0, 9.0, 2.0), (1.0, 1.0, 1.0)).ms == 2.0
