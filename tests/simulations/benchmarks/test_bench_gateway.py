"""The benchmark of the gateway runs, with every device connected and every answer there."""

import json

from click.testing import CliRunner

import edgeadapt
from simulations.benchmarks.gateway import measure


def test_the_quick_run_reaches_every_device_and_prints_its_figures() -> None:
    done = CliRunner().invoke(edgeadapt.cli, ["bench", "gateway", "--quick", "--json"])
    found = json.loads(done.stdout)
    load = measure.QUICK
    assert found["connected"] == load.devices
    assert [(found[name]["asked"], found[name]["errors"]) for name in ("check_in", "pull")] == [
        (load.check_ins, 0),
        (load.pulls, 0),
    ]
    assert [*found["round"]] == ["plan", "survivors", "unmask", "all"]
    assert all(each["min_ms"] > 0 for each in found["round"].values())
    assert found["check_in"]["p50_ms"] <= found["check_in"]["p99_ms"] <= found["check_in"]["last_ms"]
    shown = measure.table(found)
    assert f"{load.devices} of {load.devices} devices connected" in shown
