"""The benchmark runs, at a size that says nothing about speed, and its JSON has the keys that it promises."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from flwr.common import bytes_to_ndarray
from rich.console import Console

from adapters.cores import cores
from edgeadapt import cli
from simulations.benchmarks import progress as bench_progress
from simulations.benchmarks.secagg import compare, ours, peer, report
from simulations.benchmarks.secagg.compare import QUICK
from simulations.benchmarks.secagg.sweep import _fitted, large, memory, steps, sweep
from simulations.benchmarks.timing import Call, Timing, in_turns, measure

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
    for pair in (found["client"], found["upload"], found["shares"], *found["server"].values()):
        assert pair["ratio"] == pytest.approx(pair["peer_ms"] / pair["ours_ms"])
        assert pair["ours"]["ms"] == pair["ours_ms"]
        low, high = pair["ours"]["quartiles_ms"]
        assert pair["ours"]["least_ms"] <= low <= pair["ours_ms"] <= high <= pair["ours"]["most_ms"]
    assert 0 < found["bytes"]["ours"] < 1.02 * found["bytes"]["peer"]
    assert 0 < found["mask_fraction_of_limit"] <= found["mask_fraction_of_ctr_mode"] * 1.000001


def test_what_every_core_does_is_kept_apart_from_what_one_does(ran: tuple[dict[str, Any], Path]) -> None:
    found, _ = ran
    assert found["threads"] == cores()
    for pair in (found["client"], found["upload"], *found["server"].values()):
        alone = pair["ours_on_one_core"]
        assert pair["one_core_ratio"] == pytest.approx(pair["peer_ms"] / alone["ms"])
        assert pair["cpu_ratio"] == pytest.approx(pair["peer"]["cpu_ms"] / alone["cpu_ms"])
        assert alone["ms"] != pair["ours_ms"]


def test_the_sweeps_are_fitted_and_drawn(ran: tuple[dict[str, Any], Path]) -> None:
    found, picture = ran
    assert set(found["sweep"]) == {"devices", "elements"}
    for line in found["sweep"].values():
        assert set(line["growth"]) == {"shares", "client", "server"}
    assert picture.read_bytes().startswith(PNG)


def test_the_large_round_and_the_memory_are_measured(ran: tuple[dict[str, Any], Path]) -> None:
    found, _ = ran
    assert 0 < found["large"]["server_receive_s"] < found["large"]["server_s"]
    assert found["large"]["devices"] == 30
    assert 2 < found["memory"]["client_vectors"] <= found["memory"]["both_vectors"]


def test_memory_does_not_grow_with_the_uploads_that_come() -> None:
    size = dataclasses.replace(QUICK, elements=300_000)
    taken = memory(size, lambda what: None)
    assert taken["client_vectors"] < 3 + 2**22 / (4 * size.elements)
    assert taken["both_vectors"] < taken["client_vectors"] + 1.1 < taken["uploads"]  # the server's sum is the one more


def test_a_power_law_is_found() -> None:
    line = _fitted((1, 10, 100), [{"server": 3.0 * x**1.5} for x in (1, 10, 100)])
    assert line["growth"]["server"] == pytest.approx(1.5)


def test_the_table_has_a_row_for_each_comparison_and_names_what_helped(ran: tuple[dict[str, Any], Path]) -> None:
    lines = report.table(ran[0]).splitlines()
    assert [line[:22].rstrip() for line in lines[1:4]] == [
        "client: shares",
        "client: encode + mask",
        "client: whole upload",
    ]
    assert sum(line.startswith("server:") for line in lines) == 6
    assert sum("one core" in line for line in lines[:-10]) == 5
    assert f"Ours masks with {cores()} thread{'s' * (cores() > 1)}; in the rows of one core, with one." in lines


def test_a_folder_that_is_not_there_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "compare", lambda *_: pytest.fail("measured"))
    result = CliRunner().invoke(cli, ["bench", "secagg", "--quick", "--out", str(tmp_path / "missing" / "x.png")])
    assert result.exit_code != 0
    assert "choose another --out" in str(result.exception) + result.output


def test_ctrl_c_ends_it_without_a_word_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "_serve", interrupt)
    picture = tmp_path / "x.png"
    result = CliRunner().invoke(cli, ["bench", "secagg", "--quick", "--out", str(picture)])
    assert result.exit_code == 1
    assert result.output.strip() == "Aborted!"
    assert not picture.exists()


def test_a_bar_is_shown_on_a_terminal_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for terminal in (True, False):
        screen = io.StringIO()
        monkeypatch.setattr(screen, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(bench_progress, "Console", lambda stderr, screen=screen: Console(file=screen, width=100))
        with bench_progress.progress(2) as note:
            note("setting up")
            note("masks")
        shown[terminal] = screen.getvalue()
    assert "masks" in shown[True]
    assert "1/2" in shown[True]  # the second is under way
    assert shown[False] == ""


def test_each_step_is_announced_so_that_the_bar_ends_where_the_run_does() -> None:
    told: list[str] = []
    size = dataclasses.replace(QUICK, repeats=1)
    compare.compare(size, told.append)
    assert len(told) == compare.STEPS
    told.clear()
    for part in (large, memory, sweep):
        part(size, told.append)
    assert len(told) == steps(size)


def test_what_is_timed_of_the_peer_is_what_its_client_sends() -> None:
    theirs, values = peer.make(12, 4, 4), np.random.default_rng(1).uniform(-1, 1, 500)
    sent = bytes_to_ndarray(theirs.upload(0, values)).astype(np.int64)
    apart = (theirs.masked(0, values)[1] - sent) % peer.MODULUS
    assert set(apart.tolist()) <= {0, 1, peer.MODULUS - 1}  # both round at random


def test_what_is_timed_of_ours_is_what_a_device_sends() -> None:
    fleet = ours.make(12, 4, 4, 500)
    begun, name = fleet.begin(), next(iter(fleet.devices))
    values = {"delta": np.random.default_rng(1).uniform(-1, 1, 500)}
    body = fleet.upload(fleet.planned(name, begun.plan), values, np.random.default_rng(2))
    masked = fleet.masked(fleet.planned(name, begun.plan), values, np.random.default_rng(2))
    assert body.startswith(masked.tobytes())


def test_a_picture_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    from aggregation.errors import DataError
    from simulations.benchmarks.secagg.report import draw

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


def test_calls_are_timed_in_turns() -> None:
    seen: list[str] = []
    ran = in_turns(Call(seen.append, lambda: "ours", 3), Call(seen.append, lambda: "peer", 1))
    assert seen == ["ours", "peer", "ours", "ours"]
    assert [len(timing.wall) for timing in ran] == [3, 1]


def test_quartiles_are_those_of_the_repeats() -> None:
    assert Timing((4.0, 1.0, 3.0, 2.0, 5.0), (0.0,) * 5).quartiles == (2.0, 4.0)
    assert Timing((7.0,), (0.0,)).quartiles == (7.0, 7.0)
    assert (Timing((1.0, 2.0), (3.0, 4.0)) + Timing((10.0, 20.0), (0.0, 1.0))).wall == (11.0, 22.0)
