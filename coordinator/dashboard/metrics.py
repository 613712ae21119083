"""The fleet's numbers as Prometheus reads them (text exposition format 0.0.4)."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest

PREFIX = "edgeadapt_"


class _View:
    def __init__(self, view: dict[str, Any]) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        yield from families(self._view)


def exposition(view: dict[str, Any]) -> bytes:
    """Format a view (``Viewer.look``)."""
    registry = CollectorRegistry()
    registry.register(_View(view))
    return generate_latest(registry)


def families(view: dict[str, Any]) -> Iterator[Metric]:
    aborted = view["rounds_aborted"]
    ended = {"sum": view["rounds_done"] - aborted, "abort": aborted}
    yield _counter("rounds", "Rounds that ended, by how they did.", "outcome", ended)
    yield _gauge("rounds_wanted", "Rounds after which the federation ends.", view["rounds_wanted"])
    yield _gauge("running", "1 while a run uses the state directory.", int(view["running"]))
    if (lease := view["lease"]) is not None:
        yield _gauge("lease_epoch", "How often a coordinator of this registry began to lead.", lease["epoch"])
        leads = int(lease["own"] and lease["in_force"])
        yield _gauge("leads", "1 while the coordinator of this state directory leads.", leads)
    ends = {name: each["until"] for name, each in view["expiries"].items() if each["until"]}
    times = {name: datetime.fromisoformat(until).timestamp() for name, until in ends.items()}
    yield _gauge("expiry_timestamp_seconds", "When a certificate or revocation list ends.", times, "file")
    if view["version"] is not None:
        yield _gauge("version", "The newest version in the registry.", view["version"])
    yield _counter("device_rounds", "Rounds of all devices together.", None, {"": view["device_rounds"]})
    yield _counter("dropouts", "Devices that dropped out of a round, by step.", "step", view["dropouts_by_step"])
    sizes = {"up": view["bytes_up"], "down": view["bytes_down"]}
    yield _counter("bytes", "Bytes of the rounds, from devices (up) and to them (down).", "direction", sizes)
    yield _counter("round_seconds", "Wall time of all rounds.", None, {"": view["seconds"]})
    yield _gauge("metric", "Means over the survivors of the last round, from its sum.", view["metrics"], "name")
    if view["epsilon"] is not None:
        yield _gauge("epsilon", "What all sums so far may have revealed of a device.", view["epsilon"])
    if view["epsilon_limit"] is not None:
        yield _gauge("epsilon_limit", "The epsilon at which the federation ends.", view["epsilon_limit"])
    services = view["services"]
    up = {each["name"]: int(each["state"] == "ready") for each in services}
    yield _gauge("service_ready", "1 while a service does its work.", up, "service")
    restarts = {each["name"]: each["restarts"] for each in services}
    yield _counter("service_restarts", "Restarts of a service since 'up' began.", "service", restarts)
    if (session := view["session"]) is not None:
        yield _gauge("session_devices", "Devices of the newest session.", session["devices"])
        answered = {session["step"]["name"]: session["step"]["answered"]} if session["step"] else {}
        yield _gauge("step_answers", "Answers to the step that is under way.", answered, "step")
    if (gateway := view["gateway"]) is not None:
        yield _gauge("gateway_devices", "Devices that are connected to the gateway.", gateway["devices"])
        yield _gauge("gateway_requests", "Requests without an answer yet.", gateway["requests"])
        yield _gauge("gateway_versions", "Connected devices by version.", gateway["versions"], "version")
        yield _counter("gateway_check_ins", "Check-ins by outcome.", "outcome", gateway["check_ins"])
    releases = {name: one["release"] if one else 0 for name, one in view["channels"].items()}
    yield _gauge("channel_release", "The current release of a channel; 0: none.", releases, "channel")
    shares = {name: one["share"] for name, one in view["channels"].items() if one}
    yield _gauge("channel_share", "Percent of devices that the current release is for.", shares, "channel")
    staged = {name: one for name, one in view["channels"].items() if one and one["previous"] is not None}
    ready = {name: int(one["prepared"] is not None) for name, one in staged.items()}
    yield _gauge("channel_rollback_prepared", "1 if a rollout can be rolled back by itself.", ready, "channel")
    judged = {name: one["evaluation"] for name, one in view["channels"].items() if one and one["evaluation"]}
    worse = {name: int(found["worse"]) for name, found in judged.items()}
    yield _gauge("channel_worse", "1 if the last evaluation found the newest release worse.", worse, "channel")
    if view["problem"] is not None or view["channels"]:
        yield _gauge("channels_verified", "1 while the log of the channels passes its audit.", int(not view["problem"]))


def _gauge(name: str, text: str, value: Any, label: str | None = None) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=[label] if label else [])
    for key, number in (value if label else {"": value}).items():
        family.add_metric([key] if label else [], number)
    return family


def _counter(name: str, text: str, label: str | None, values: dict[str, float]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=[label] if label else [])
    for key, number in values.items():
        family.add_metric([key] if label else [], number)
    return family
