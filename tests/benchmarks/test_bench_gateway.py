"""The benchmark of the gateway runs, with every device connected and every answer there."""

import asyncio
import json
import socket
from datetime import UTC, datetime, timedelta

from click.testing import CliRunner

from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority
from benchmarks.__main__ import bench
from benchmarks.gateway import measure
from benchmarks.gateway.clients import Device, arrive


def test_the_quick_run_reaches_every_device_and_prints_its_figures() -> None:
    done = CliRunner().invoke(bench, ["gateway", "--quick", "--json"])
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


def test_a_check_in_that_nobody_answers_is_no_admitted_one() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    now = datetime.now(UTC)
    authority = Authority.create("fleet", SystemEntropy(), now - timedelta(days=1), now + timedelta(days=9))
    found = asyncio.run(arrive(port, authority.root, 100.0, 0.1, [Device.of("device-1", authority)]))
    assert (found["milliseconds"], found["errors"]) == ([], {"UNAVAILABLE": 10})


def test_every_check_in_at_a_rate_is_admitted_and_the_cores_are_counted() -> None:
    done = CliRunner().invoke(bench, ["gateway", "--quick", "--check-ins", "600", "--json"])
    found = json.loads(done.stdout)
    assert (found["admitted"], found["errors"]) == (20, {})
    assert 0 < found["p50_ms"] <= found["p99_ms"] <= found["last_ms"]
    assert found["gateway_cores"] > 0
    assert found["device_cores"] > 0
    assert "600 check-ins a minute" in measure.arrivals_table(found)
