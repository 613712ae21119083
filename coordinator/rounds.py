"""The rounds of a federation: drive the protocol core over a wire, step the adapter, commit each round whole.

The core decides what is legal and the optimizer what is next; here is the order of things, and who was lost where. A
device that answers badly, late or not at all is lost for the round and asked again in the next one.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

import numpy as np

from adapters import files
from adapters.layout import Layout
from adapters.manifest import Manifest
from aggregation import serverside
from aggregation.certificates import Root
from aggregation.entropy import SystemEntropy
from aggregation.errors import EdgeAdaptError, ProtocolError
from aggregation.receipts import receipts
from aggregation.serverside import Confirming, Established, Offering, RoundAborted, RoundResult, Sharing, Unmasking
from aggregation.steps import ADAPTER, PROOF, REVOKED, Step
from coordinator import optimizer
from coordinator.home import CoordinatorHome
from coordinator.maskworkers import MaskWorkers
from coordinator.registry import RoundRecord, Version
from coordinator.transcript import Recorder
from coordinator.wire import Wire

log = logging.getLogger("edgeadapt.coordinator")
S = TypeVar("S")


@dataclass(slots=True)
class Fleet:
    """The devices that a session was made with: device → Flower node, and who is lost where in the round under way.

    What is asked and answered goes into the session's transcript.
    """

    wire: Wire
    nodes: Mapping[str, int]
    recorder: Recorder
    lost: dict[str, str] = field(default_factory=dict)

    def gather(
        self,
        state: S,
        accept: Callable[[S, str, bytes], S],
        step: Step,
        bodies: Mapping[str, bytes],
        *,
        group: str,
        beside: Mapping[str, Mapping[str, bytes]] | None = None,
    ) -> S:
        """Ask each device of ``bodies`` and let the state ``accept`` each answer as it comes."""
        devices = {self.nodes[device]: device for device in bodies}
        asked = {self.nodes[device]: body for device, body in bodies.items()}
        extra = {self.nodes[device]: fields for device, fields in (beside or {}).items()}
        self.recorder.sent(step, bodies)
        for reply in self.wire.ask(step, asked, group, extra):
            device = devices[reply.node]
            try:
                if reply.body is None:
                    raise ProtocolError(reply.reason)
                state = accept(state, device, reply.body)
                self.recorder.received(step, device, reply.body)
                log.debug("%s answered %s", device, step.value, extra={"answered": step.value})
            except ProtocolError as error:
                self.lost[device] = step.value
                log.info("%s lost at %s: %s", device, step.value, error)
        return state


def federate(home: CoordinatorHome, wire: Wire) -> Iterator[RoundRecord]:
    """Run the rounds that are still to do, yielding each one's record once it is committed.

    Raises:
        EdgeAdaptError: A session could not be made in ``settings.attempts`` tries, or the registry failed.
    """
    fleet: Fleet | None = None
    session: Established | None = None
    done = len(home.registry.rounds())
    try:
        for number in range(done + 1, home.settings.rounds + 1):
            begin = time.perf_counter()
            if fleet is None or session is None or session.rounds_left == 0:
                left = home.settings.rounds - number + 1
                rounds = min(left, home.settings.aggregation.session_rounds)
                fleet, session = _establish(home, wire, rounds, f"session-{number}")
            record, session = _round(home, fleet, session, number, begin)
            yield record
    finally:
        home.transcripts.finish()


def _establish(home: CoordinatorHome, wire: Wire, rounds: int, group: str) -> tuple[Fleet, Established]:
    reason = ""
    for attempt in range(1, home.settings.attempts + 1):
        outcome = _session(home, wire, rounds, f"{group}-{attempt}")
        if not isinstance(outcome, RoundAborted):
            return outcome
        reason = outcome.detail
        log.warning("session not made, attempt %d of %d: %s", attempt, home.settings.attempts, reason)
    raise EdgeAdaptError(f"no session after {home.settings.attempts} attempts: {reason}")


def _session(home: CoordinatorHome, wire: Wire, rounds: int, group: str) -> tuple[Fleet, Established] | RoundAborted:
    """Steps 1–4 of the protocol."""
    version = _latest(home)
    root = home.trusted(datetime.now(UTC))
    certificates, nodes, seen = _roll_call(root, wire, group)
    least = home.settings.aggregation.minimum_devices
    if len(nodes) < least:
        return RoundAborted(serverside.AbortReason.TOO_FEW, f"{len(nodes)} devices answered, {least} are needed", None)
    layout = Layout.of(home.registry.tensors(version.manifest.version))
    spec = home.settings.aggregation.spec(len(nodes), layout, version.manifest.base_digest, rounds)
    offering, offer = serverside.open_session(home.key, root, spec, certificates, SystemEntropy(), datetime.now(UTC))
    fleet = Fleet(wire, nodes, home.transcripts.begin(offering.offer, root.revoked))
    offers = dict.fromkeys(nodes, offer)
    revoked = {REVOKED: root.revoked.der} if root.revoked else {}
    beside = _beside(home.transcripts.passages(fleet.recorder, seen), revoked)
    sharing = fleet.gather(offering, Offering.on_advert, Step.OFFER, offers, group=group, beside=beside).close()
    if isinstance(sharing, RoundAborted):
        return sharing
    state, roster = sharing
    rosters = {device: roster for device in nodes if device not in fleet.lost}
    session = fleet.gather(state, Sharing.on_shares, Step.ROSTER, rosters, group=group).close()
    if isinstance(session, RoundAborted):
        return session
    fleet.recorder.checkpoint()
    log.info("session of %d devices for %d rounds", len(nodes) - len(fleet.lost), rounds)
    return fleet, session


def _roll_call(root: Root, wire: Wire, group: str) -> tuple[dict[str, bytes], dict[str, int], dict[str, bytes]]:
    """Ask every node who it is; keep those with a certificate of the authority's, one node a device.

    Returns:
        Device → certificate, device → node, and device → the offer that it says it joined last.
    """
    certificates: dict[str, bytes] = {}
    nodes: dict[str, int] = {}
    seen: dict[str, bytes] = {}
    for reply in wire.ask(Step.HELLO, dict.fromkeys(wire.nodes(), b""), group):
        try:
            device, _ = root.verify(reply.body or b"", datetime.now(UTC))
        except EdgeAdaptError as error:
            log.info("node %d is not taken: %s", reply.node, reply.reason or error)
            continue
        if device not in nodes:
            certificates[device], nodes[device], seen[device] = reply.body or b"", reply.node, reply.seen
    return certificates, nodes, seen


def _beside(proofs: Mapping[str, bytes], shared: Mapping[str, bytes]) -> dict[str, dict[str, bytes]]:
    """Device → fields beside its message: its own proof, and what all get alike."""
    return {device: {PROOF: proof, **shared} for device, proof in proofs.items()}


def _round(
    home: CoordinatorHome, fleet: Fleet, session: Established, number: int, begin: float
) -> tuple[RoundRecord, Established | None]:
    """Steps 5–9: one round from plan to committed record, whatever becomes of it."""
    version = _latest(home)
    fleet.lost.clear()
    with MaskWorkers(home.settings.aggregation.mask_processes - 1) as workers:  # they start while the devices train
        outcome = _protocol(home, fleet, session, version, number, workers)
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
    return _commit(home, fleet.recorder, version, record, result), after


def _protocol(
    home: CoordinatorHome, fleet: Fleet, session: Established, version: Version, number: int, workers: MaskWorkers
) -> tuple[Established, RoundResult] | RoundAborted:
    manifest, group = version.manifest, str(number)
    task = home.settings.training.task(manifest, home.settings.seed)
    planned = session.plan(
        adapter_version=manifest.version, adapter_digest=manifest.sha256, training=task.encode(), cohort=None
    )
    if isinstance(planned, RoundAborted):
        return planned
    state, plans = planned
    fleet.recorder.begin(state.plan)
    beside = _beside(receipts(fleet.recorder.log, plans), {ADAPTER: home.registry.blob(manifest.version)})
    masked = fleet.gather(
        state, serverside.Collecting.on_masked_input, Step.PLAN, plans, group=group, beside=beside
    ).close()
    if isinstance(masked, RoundAborted):
        return masked
    confirming, bodies = masked
    if isinstance(confirming, Confirming):
        confirmed = fleet.gather(confirming, Confirming.on_signature, Step.SURVIVORS, bodies, group=group).close()
        if isinstance(confirmed, RoundAborted):
            return confirmed
        confirming, bodies = confirmed
    opened = fleet.gather(confirming, Unmasking.on_unmask, Step.UNMASK, bodies, group=group).close(workers.apply)
    return opened if isinstance(opened, RoundAborted) else _weighed(*opened)


def _weighed(session: Established, result: RoundResult) -> tuple[Established, RoundResult] | RoundAborted:
    """The round, unless a device lied: an honest survivor weighs one example or more, and the sum is divided by all."""
    weight = float(result.values["weight"][0])
    if weight >= len(result.survivors):
        return session, result
    detail = f"{len(result.survivors)} survivors cannot have a weight of {weight:.0f} examples"
    return RoundAborted(serverside.AbortReason.OUT_OF_RANGE, detail, session)


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
    home: CoordinatorHome, recorder: Recorder, version: Version, record: RoundRecord, result: RoundResult | None
) -> RoundRecord:
    if result is None:
        home.registry.record_round(record)
        return record
    layout = Layout.of(home.registry.tensors(version.manifest.version))
    rule = home.settings.server.rule()
    state = optimizer.restore(rule, home.registry.optimizer_state(), layout.size)
    adapter = layout.flatten(home.registry.tensors(version.manifest.version))
    mean = (result.values["delta"] / record.metrics["examples"]).astype(np.float32)
    state, adapter = optimizer.step(rule, state, adapter, mean)
    blob = files.encode(layout.unflatten(adapter))
    parent = version.manifest
    manifest = Manifest(
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
    home.registry.commit_round(record, manifest, blob, optimizer.to_tensors(state), home.key)
    return record


def _latest(home: CoordinatorHome) -> Version:
    version = home.registry.latest()
    if version is None:
        raise EdgeAdaptError("the registry is empty: publish a seed adapter as version 0 first")
    return version
