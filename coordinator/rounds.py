"""The rounds of a federation: drive the protocol core over a wire, step the adapter, commit each round whole.

The core decides what is legal and the optimizer what is next; here is the order of things, and who was lost where. A
device that answers badly, late or not at all is lost for the round and asked again in the next one.
"""

import logging
import time
from collections.abc import Iterator

import numpy as np

from adapters import files
from adapters.cores import cores
from adapters.layout import Layout
from adapters.manifest import VersionManifest
from aggregation import server
from aggregation.server import Confirming, Established, RoundAborted, RoundResult, Unmasking
from aggregation.steps import ADAPTER, Step
from aggregation.transcript import receipts
from coordinator import optimizer
from coordinator.recorder import Recorder
from coordinator.registry.roundrecord import RoundRecord
from coordinator.registry.versions import Version
from coordinator.session import Fleet, beside, establish
from coordinator.statedir import CoordinatorStateDir
from coordinator.wire import Wire

log = logging.getLogger("edgeadapt.coordinator")


def federate(state_dir: CoordinatorStateDir, wire: Wire) -> Iterator[RoundRecord]:
    """Run the rounds that are still to do, yielding each one's record once it is committed.

    Raises:
        EdgeAdaptError: Another run uses the home, a session could not be made in ``settings.attempts`` tries, or the
            registry failed.
    """
    with state_dir.locked():
        try:
            yield from _rounds(state_dir, wire)
        finally:
            state_dir.transcripts.finish()


def _rounds(state_dir: CoordinatorStateDir, wire: Wire) -> Iterator[RoundRecord]:
    fleet: Fleet | None = None
    session: Established | None = None
    done = len(state_dir.registry.rounds())
    for number in range(done + 1, state_dir.settings.rounds + 1):
        begin = time.perf_counter()
        if fleet is None or session is None or session.rounds_left == 0:
            left = state_dir.settings.rounds - number + 1
            rounds = min(left, state_dir.settings.aggregation.session_rounds)
            fleet, session = establish(state_dir, wire, rounds, f"session-{number}")
        record, session = _round(state_dir, fleet, session, number, begin)
        yield record


def _round(
    state_dir: CoordinatorStateDir, fleet: Fleet, session: Established, number: int, begin: float
) -> tuple[RoundRecord, Established | None]:
    """Steps 5–9: one round from plan to committed record, whatever becomes of it."""
    version = state_dir.latest()
    fleet.lost.clear()
    outcome = _protocol(state_dir, fleet, session, version, number)
    after: Established | None
    result: RoundResult | None
    if isinstance(outcome, RoundAborted):
        after, result, aborted = outcome.session, None, outcome.detail
        fleet.recorder.abort(outcome.reason)
        log.warning("round %d aborted: %s", number, aborted)
    else:
        (after, result), aborted = outcome, None
    traffic = fleet.wire.take_traffic()
    record = RoundRecord(
        round=number,
        survivors=result.survivors if result else (),
        dropped=dict(fleet.lost),
        aborted=aborted,
        bytes_up=traffic.up,
        bytes_down=traffic.down,
        seconds=time.perf_counter() - begin,
        metrics=_metrics(result) if result else {},
        version=version.manifest.version + 1 if result else None,
    )
    return _commit(state_dir, fleet.recorder, version, record, result), after


def _protocol(
    state_dir: CoordinatorStateDir, fleet: Fleet, session: Established, version: Version, number: int
) -> tuple[Established, RoundResult] | RoundAborted:
    manifest, group = version.manifest, str(number)
    task = state_dir.settings.training.task(manifest, state_dir.settings.seed)
    planned = session.plan(
        adapter_version=manifest.version, adapter_digest=manifest.sha256, training=task.encode(), cohort=None
    )
    if isinstance(planned, RoundAborted):
        return planned
    state, plans = planned
    fleet.recorder.begin(state.plan)
    extra = beside(receipts(fleet.recorder.log, plans), {ADAPTER: state_dir.registry.blob(manifest.version)})
    masked = fleet.gather(state, server.Collecting.on_masked_input, Step.PLAN, plans, group=group, beside=extra).close()
    if isinstance(masked, RoundAborted):
        return masked
    confirming, bodies = masked
    if isinstance(confirming, Confirming):
        confirmed = fleet.gather(
            confirming, Confirming.on_consistency_signature, Step.SURVIVORS, bodies, group=group
        ).close()
        if isinstance(confirmed, RoundAborted):
            return confirmed
        confirming, bodies = confirmed
    opened = fleet.gather(confirming, Unmasking.on_unmask_response, Step.UNMASK, bodies, group=group).close(cores())
    return opened if isinstance(opened, RoundAborted) else _weighed(*opened)


def _weighed(session: Established, result: RoundResult) -> tuple[Established, RoundResult] | RoundAborted:
    """The round, unless a device lied: an honest survivor weighs one example or more, and the sum is divided by all."""
    weight = float(result.values["weight"][0])
    if weight >= len(result.survivors):
        return session, result
    detail = f"{len(result.survivors)} survivors cannot have a weight of {weight:.0f} examples"
    return RoundAborted(server.AbortReason.OUT_OF_RANGE, detail, session)


def _metrics(result: RoundResult) -> dict[str, float]:
    """Means over the survivors of the sums that came out of the mask."""
    total = {name: float(values[0]) for name, values in result.values.items() if values.size == 1}
    held_out = float(np.rint(total["held_out"]))
    metrics = {"examples": float(np.rint(total["weight"])), "training_seconds": max(total["seconds"], 0.0)}
    if held_out >= 1:
        metrics["accuracy"] = float(np.rint(total["correct"])) / held_out
        metrics["loss"] = max(total["loss"], 0.0) / held_out
    return metrics


def _commit(
    state_dir: CoordinatorStateDir,
    recorder: Recorder,
    version: Version,
    record: RoundRecord,
    result: RoundResult | None,
) -> RoundRecord:
    if result is None:
        state_dir.registry.record_round(record)
        return record
    layout = Layout.of(state_dir.registry.tensors(version.manifest.version))
    rule = state_dir.settings.server.rule()
    state = optimizer.restore(rule, state_dir.registry.optimizer_state(), layout.size)
    adapter = layout.flatten(state_dir.registry.tensors(version.manifest.version))
    mean = (result.values["delta"] / record.metrics["examples"]).astype(np.float32)
    state, adapter = optimizer.step(rule, state, adapter, mean)
    blob = files.encode(layout.unflatten(adapter))
    parent = version.manifest
    manifest = VersionManifest(
        version=parent.version + 1,
        sha256=files.sha256(blob),
        size=len(blob),
        base_digest=parent.base_digest,
        layout_digest=parent.layout_digest,
        parent=parent.sha256,
        round=record.round,
        survivors=record.survivors,
        metrics=record.metrics,
        method=parent.method,
        labels=parent.labels,
    )
    recorder.result(result, manifest.version, manifest.sha256)  # before the commit: no version without its log
    state_dir.registry.commit_round(record, manifest, blob, optimizer.to_tensors(state), state_dir.key)
    return record
