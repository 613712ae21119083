"""`python -m benchmarks secagg` at a tiny size: its JSON, table, picture, and what its two sides time."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from flwr.common import bytes_to_ndarray

from benchmarks.__main__ import bench
from benchmarks.secagg import compare, ours, peer
from benchmarks.secagg.compare import QUICK, dropouts, memory
from benchmarks.timing import Call, interleaved
from edgeadapt.formats.cores import cores


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    picture = tmp_path_factory.mktemp("bench") / "sweep.png"
    result = CliRunner().invoke(bench, ["secagg", "--quick", "--json", "--repeats", "1", "--out", str(picture)])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), picture


def test_the_json_has_every_figure_of_both_sides_and_the_sweeps_are_drawn(ran: tuple[dict[str, Any], Path]) -> None:
    found, picture = ran
    assert set(found["server"]) == {"0", "0.1", "0.3"}
    for pair in (found["client"], found["upload"], found["shares"], *found["server"].values()):
        assert pair["ratio"] == pytest.approx(pair["peer_ms"] / pair["ours_ms"])
        low, high = pair["ours"]["quartiles_ms"]
        assert pair["ours"]["min_ms"] <= low <= pair["ours_ms"] <= high <= pair["ours"]["max_ms"]
    assert 0 < found["bytes"]["ours"] < 1.02 * found["bytes"]["peer"]
    assert 0 < found["mask_fraction_of_limit"] <= found["mask_fraction_of_ctr_mode"] * 1.000001
    assert found["threads"] == cores()
    for pair in (found["client"], found["upload"], *found["server"].values()):
        one_core = pair["ours_on_one_core"]
        assert pair["one_core_ratio"] == pytest.approx(pair["peer_ms"] / one_core["ms"])
        assert pair["cpu_ratio"] == pytest.approx(pair["peer"]["cpu_ms"] / one_core["cpu_ms"])
    for line in (found["sweep"]["devices"], found["sweep"]["elements"]):
        assert set(line["growth"]) == {"shares", "client", "server"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "20 devices, 2000 elements, 10 neighbors." in compare.table(found)
    assert 0 < found["large"]["server_receive_s"] < found["large"]["server_s"]
    assert 2 < found["memory"]["client_vectors"] <= found["memory"]["both_vectors"]


def test_memory_does_not_grow_with_the_uploads_that_come() -> None:
    work = dataclasses.replace(QUICK, elements=300_000)
    peak = memory(work, lambda what: None)
    assert peak["client_vectors"] < 3 + 2**22 / (2 * work.elements)
    assert peak["both_vectors"] < peak["client_vectors"] + 1.1 < peak["uploads"]  # the server adds its sum only


def test_the_timed_vector_of_the_peer_is_the_one_that_its_client_sends() -> None:
    theirs, values = peer.make(12, 4, 4), np.random.default_rng(1).uniform(-1, 1, 500)
    sent = bytes_to_ndarray(theirs.upload(0, values)).astype(np.int64)
    difference = (theirs.masked(0, values)[1] - sent) % peer.MODULUS
    assert set(difference.tolist()) <= {0, 1, peer.MODULUS - 1}  # both round at random


def test_the_timed_vector_of_ours_is_the_one_that_a_device_sends() -> None:
    fleet = ours.make(12, 4, 4, 500)
    begun, name = fleet.begin(), next(iter(fleet.devices))
    values = {"delta": np.random.default_rng(1).uniform(-1, 1, 500)}
    body = fleet.upload(fleet.planned(name, begun.plan), values, np.random.default_rng(2))
    masked = fleet.masked(fleet.planned(name, begun.plan), values, np.random.default_rng(2))
    assert body.startswith(masked.tobytes())


def test_the_timed_round_gives_the_right_sum() -> None:
    fleet = ours.make(20, 10, 7, 100)
    begun, rng = fleet.begin(), np.random.default_rng(1)
    values = {name: {"delta": rng.uniform(-1, 1, 100)} for name in fleet.devices}
    bodies = {name: fleet.upload(fleet.planned(name, begun.plan), values[name], rng) for name in fleet.devices}
    absent = dropouts(fleet.order, 0.3)
    assert len(absent) == 6
    result = ours.unmask(ours.Uploads(fleet, begun, bodies).without(absent).until_unmask())
    plain = np.sum([values[name]["delta"] for name in result.survivors], axis=0)
    assert result.dropped == tuple(sorted(absent))
    step = fleet.session.spec.vector.step(fleet.session.spec.vector.segment("delta"))
    assert np.abs(result.values["delta"] - plain).max() < step * len(result.survivors)


# What timings mean


def test_calls_are_timed_alternately() -> None:
    seen: list[str] = []
    ran = interleaved(Call(seen.append, lambda: "ours", 3), Call(seen.append, lambda: "peer", 1))
    assert seen == ["ours", "peer", "ours", "ours"]
    assert [len(timing.wall) for timing in ran] == [3, 1]
