"""Traces: what a coordinator's rounds send to a real receiver, and that nothing depends on it."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from aggregation.errors import ConfigError, EdgeAdaptError
from coordinator.statedir import CoordinatorStateDir
from edgeadapt import traces
from edgeadapt.traces import PROTOCOL, PROTOCOLS
from tests.support import FleetOf
from tests.support.gateway import attending, free_port, gateway
from tests.support.otlp import attributes, receiving

ROOT = Path(__file__).parents[2]
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
GATEWAY = "edgeadapt.gateway.v1/"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


def test_rounds_over_the_gateway_are_one_trace_a_session_and_no_span_names_a_device(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = app_fleet_of(3, rounds=2)
    with receiving() as receiver:
        monkeypatch.setenv(ENDPOINT, receiver.url)
        with (
            traces.exporting("edgeadapt-test"),
            gateway(fleet) as grid,
            attending(grid.gateway.port, [*fleet.nodes.values()]),
        ):
            grid.await_devices(3)
            records = fleet.federate(grid)
    assert [record.version for record in records] == [1, 2]
    assert set(receiver.paths) == {"/v1/traces"}
    assert receiver.services() == {"edgeadapt-test"}

    spans = receiver.spans()
    by_id = {span.span_id: span for span in spans}
    assert all(span.end_time_unix_nano >= span.start_time_unix_nano for span in spans)
    pairs = Counter((by_id[span.parent_span_id].name if span.parent_span_id else "", span.name) for span in spans)
    steps = {("establish", name): 1 for name in ("checkin", "offer", "roster")}
    steps |= {("round", name): 2 for name in ("plan", "survivors", "unmask", "sum", "combine", "commit")}
    own = {pair: count for pair, count in pairs.items() if not pair[1].startswith(GATEWAY)}
    assert own == {("", "session"): 1, ("session", "establish"): 1, ("session", "round"): 2, **steps}
    assert pairs["plan", f"{GATEWAY}answer"] == 6  # a call of each device in each round, as a part of the step
    assert pairs["", f"{GATEWAY}attend"] == 3
    (session,) = (span for span in spans if span.name == "session")
    assert {span.trace_id for span in spans if not span.name.endswith("attend")} == {session.trace_id}

    (first, _) = (attributes(span) for span in spans if span.name == "round")
    assert first["edgeadapt.survivors"] == 3
    assert first["edgeadapt.dropouts"] == 0
    assert first["edgeadapt.version"] == 1
    plan = next(attributes(span) for span in spans if span.name == "plan")
    assert plan == {"edgeadapt.asked": 3, "edgeadapt.answered": 3}
    require_nameless(receiver.bodies, fleet)


def require_nameless(bodies: list[bytes], fleet: Any) -> None:
    """Neither the names of devices, nor their nodes or addresses, are in what was sent, in any encoding of a span."""
    sent = b"".join(bodies)
    for node, folder in fleet.nodes.items():
        assert Path(folder).name.encode() not in sent
        assert node < 1000 or str(node).encode() not in sent
    assert b"127.0.0.1" not in sent
    assert b"device-" not in sent


def test_what_went_wrong_is_in_the_spans_by_its_kind_without_its_text(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = app_fleet_of(3, rounds=1)
    device = Path(next(iter(fleet.nodes.values()))).name
    with receiving() as receiver:
        monkeypatch.setenv(ENDPOINT, receiver.url)
        with traces.exporting("edgeadapt-test"), pytest.raises(EdgeAdaptError), traces.span("round"):
            raise EdgeAdaptError(f"no update of {device}", about="peer")
    (span,) = receiver.spans()
    assert attributes(span) == {"error.type": "EdgeAdaptError"}
    assert (span.status.code, span.status.message, len(span.events)) == (2, "", 0)
    require_nameless(receiver.bodies, fleet)


def test_rounds_go_on_without_a_receiver_and_one_line_says_so(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = app_fleet_of(3, rounds=2)
    monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    records = fleet.federate(fleet.grid())
    assert [record.version for record in records] == [1, 2]
    assert [line for line in caplog.messages if "traces" in line] == [
        "traces cannot be sent, and are dropped: look at OTEL_EXPORTER_OTLP_ENDPOINT and the receiver there"
    ]


def test_without_a_receiver_nothing_of_opentelemetry_is_imported(app_fleet_of: FleetOf) -> None:
    fleet = app_fleet_of(3, rounds=1)
    program = """
import json, sys
from pathlib import Path
import coordinator.app, coordinator.gateway.grid, edgeadapt.cli.promotion
from edgeadapt import traces
with traces.exporting("edgeadapt-test"), traces.span("round", devices=3) as span:
    span.set(version=1)
print(json.dumps(sorted(name for name in sys.modules if name.startswith("opentelemetry"))))
"""
    environment = {**os.environ, "OTEL_SDK_DISABLED": "true", ENDPOINT: "http://127.0.0.1:9"}
    for extra in ({}, environment):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=extra or None, capture_output=True, text=True, check=True
        )
        assert json.loads(done.stdout) == []
    assert CoordinatorStateDir.open(fleet.out / "coordinator").has_rounds_left


@pytest.mark.parametrize(
    "variables",
    [
        {ENDPOINT: "collector.example:4318"},
        {ENDPOINT: "https://user:password@collector.example"},
        {ENDPOINT: "https://[collector"},
        {ENDPOINT: "https://collector.example", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        {ENDPOINT: "https://collector.example", **dict(zip(PROTOCOLS, ("grpc", PROTOCOL), strict=True))},
        {ENDPOINT: "https://collector.example", "OTEL_TRACES_EXPORTER": "zipkin"},
        {ENDPOINT: "https://collector.example", "OTEL_BSP_MAX_QUEUE_SIZE": "0"},
    ],
)
def test_variables_that_cannot_be_used_are_refused_in_one_line(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as refused, traces.exporting("edgeadapt-test"):
        pass
    assert "\n" not in str(refused.value)
    assert "password@" not in str(refused.value)


def test_without_the_extra_one_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "https://collector.example")
    monkeypatch.setitem(sys.modules, "edgeadapt.traceexport", None)
    with pytest.raises(ConfigError, match=r"edgeadapt\[traces\]"), traces.exporting("edgeadapt-test"):
        pass
