"""The rounds of a federation: drive the protocol core over a transport, step the adapter, commit each round.

``aggregation.server`` decides which step is legal, ``coordinator.optimizer`` what the next adapter is. This file holds
the order of the steps. A device that answers wrongly, late or not at all drops out of the round and is asked again in
the next one.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from adapters import files
from adapters.cores import cores
from adapters.layout import Tensors
from adapters.manifest import VersionManifest
from adapters.roundrecord import RoundRecord
from adapters.task import metrics_of, require_reach, weighted_mean
from aggregation import server
from aggregation.errors import DataError
from aggregation.pki import Root
from aggregation.pki.identity import IdentityKey
from aggregation.server import Collecting, Confirming, Established, RoundAborted, RoundResult, Unmasking
from aggregation.steps import ADAPTER, Step
from aggregation.transcript import receipts
from coordinator import optimizer
from coordinator.registry import Head, Registry, StoredAdapter, state_digest
from coordinator.session import Cohort, attachments, establish
from coordinator.settings import FederationSettings
from coordinator.transcripts import Transcripts
from coordinator.transport import Transport

log = logging.getLogger("edgeadapt.coordinator")


def federate(
    transport: Transport,
    registry: Registry,
    *,
    key: IdentityKey,
    read_root: Callable[[datetime], Root],
    settings: FederationSettings,
    transcripts: Transcripts,
) -> Iterator[RoundRecord]:
    """Run the rounds that are still to do, and yield the record of each one once it is committed.

    Args:
        transport: Reaches the devices.
        registry: Holds the adapter; its records say which rounds are done.
        key: The coordinator's signing key.
        read_root: Now → the authority with its newest revocation list, read again for each session.
        settings: Of the federation.
        transcripts: Where each session's log is written.

    Raises:
        EdgeAdaptError: The registry is empty or failed, or no session could be made in ``settings.attempts`` attempts.
        TrustError: The registry or a log was altered, or they contradict each other.
    """
    cohort: Cohort | None = None
    session: Established | None = None
    repeat: tuple[str, ...] = ()  # survivors of the last sum from the newest adapter, if there was one
    among: tuple[str, ...] = ()  # whom the next round is planned for; empty: everyone
    transcripts.finish()  # before a device is asked: what a kill left is repaired, and other damage refused
    try:
        for number in range(len(registry.rounds()) + 1, settings.rounds + 1):
            begin = time.perf_counter()
            adapter = registry.newest_adapter()
            if cohort is None or session is None or session.is_over(datetime.now(UTC)):
                rounds = min(settings.rounds - number + 1, settings.aggregation.session_rounds)
                cohort, session = establish(
                    transport,
                    adapter,
                    rounds,
                    f"session-{number}",
                    key=key,
                    read_root=read_root,
                    settings=settings,
                    transcripts=transcripts,
                )
            cohort.dropped.clear()
            task = settings.training.task(adapter.manifest).encode()
            outcome = _aggregate(cohort, session, adapter, task, number, among)
            session = outcome.session if isinstance(outcome, RoundAborted) else outcome[0]
            if isinstance(outcome, RoundAborted):
                repeat = outcome.unmasked or repeat
                among = repeat if outcome.unmasked or not among else ()  # in turn, if that fails as well
                log.warning("round %d aborted: %s", number, outcome.detail)
                record = _record(cohort, registry.head(), outcome, None, time.perf_counter() - begin)
                registry.record_round(record, key)
            else:
                repeat = among = ()
                made = _step(registry, cohort, adapter, outcome, number, settings)
                record = _record(cohort, registry.head(), outcome[1], made, time.perf_counter() - begin)
                registry.commit_round(record, made.manifest, made.blob, made.state, key)
            cohort.recorder.end(record)  # after the registry: a start after a kill writes it from the record
            yield record
    finally:
        transcripts.finish()


def _aggregate(
    cohort: Cohort, session: Established, adapter: StoredAdapter, task: bytes, number: int, among: tuple[str, ...]
) -> tuple[Established, RoundResult] | RoundAborted:
    """Steps 5–8 of the protocol: from the plan to the sum of the survivors, and the session after it.

    ``among``: plan for these devices, if all of them are in the session; empty: for everyone.
    """
    manifest, group = adapter.manifest, str(number)
    planned = session.plan(
        adapter_version=manifest.version,
        adapter_digest=manifest.sha256,
        training=task,
        cohort=among if among and set(among) <= set(session.devices) else None,
        at=datetime.now(UTC),
    )
    if isinstance(planned, RoundAborted):
        return planned
    state, plans = planned
    cohort.recorder.begin(state.plan)
    extra = attachments(receipts(cohort.recorder.log, plans), {ADAPTER: adapter.blob})
    collected = cohort.exchange(state, Collecting.add, Step.PLAN, plans, group, extra, state.check).close()
    if isinstance(collected, RoundAborted):
        return collected
    confirming, bodies = collected
    if isinstance(confirming, Confirming):
        confirmed = cohort.exchange(
            confirming, Confirming.on_consistency_signature, Step.SURVIVORS, bodies, group
        ).close()
        if isinstance(confirmed, RoundAborted):
            return confirmed
        confirming, bodies = confirmed
    unmasked = cohort.exchange(confirming, Unmasking.on_unmask_response, Step.UNMASK, bodies, group).close(cores())
    return unmasked if isinstance(unmasked, RoundAborted) else within_reach(*unmasked)


def within_reach(session: Established, result: RoundResult) -> tuple[Established, RoundResult] | RoundAborted:
    """Abort a round whose sum honest survivors cannot have (``require_reach``).

    A survivor may have weight 0: a device whose examples cannot be used answers as every other one.
    """
    try:
        require_reach(session.session.spec, result.values, len(result.survivors))
    except DataError as error:
        return RoundAborted(server.AbortReason.OUT_OF_RANGE, str(error), session, unmasked=result.survivors)
    return session, result


@dataclass(frozen=True, slots=True)
class _NextAdapter:
    """What the server's step made of a sum: the next adapter, and the optimizer's state after it."""

    manifest: VersionManifest
    blob: bytes
    state: Tensors


def _step(
    registry: Registry,
    cohort: Cohort,
    adapter: StoredAdapter,
    outcome: tuple[Established, RoundResult],
    number: int,
    settings: FederationSettings,
) -> _NextAdapter:
    """From the sum to the next adapter."""
    layout, parent, plan = adapter.layout, adapter.manifest, cohort.recorder.log.plan
    session, result = outcome
    rule, task = settings.server.rule(), settings.training.task(parent)
    state = optimizer.restore(rule, registry.optimizer_state(), layout.size)
    mean = weighted_mean(session.session.spec, task, result.values, len(result.survivors))
    state, vector = optimizer.step(rule, state, layout.flatten(adapter.tensors), mean)
    blob = files.encode(layout.unflatten(vector))
    manifest = replace(
        parent,
        version=parent.version + 1,
        sha256=files.sha256(blob),
        size=len(blob),
        parent=parent.sha256,
        round=number,
        plan=plan.hex() if plan else None,
        rule=optimizer.to_rule(rule),
        survivors=result.survivors,
        metrics=metrics_of(result.values),
    )
    return _NextAdapter(manifest, blob, optimizer.to_tensors(state))


def _record(
    cohort: Cohort, head: Head, ended: RoundResult | RoundAborted, made: _NextAdapter | None, seconds: float
) -> RoundRecord:
    """The record of the round under way, whose ending the log does not have yet."""
    log, last, carried = cohort.recorder.synced(), head.round, cohort.transport.take_carried()
    abort, result = (ended, None) if isinstance(ended, RoundAborted) else (None, ended)
    unchanged = last.optimizer if last else None
    return RoundRecord(
        round=last.round + 1 if last else 1,
        previous=head.digest,
        offer=log.offer.hex(),
        plan=log.plan.hex() if log.plan else None,
        entries=log.tree.size,
        root=log.tree.root().hex(),
        survivors=result.survivors if result else (),
        dropped=dict(cohort.dropped),
        reason=abort.reason.value if abort else None,
        aborted=abort.detail if abort else None,
        sum=result.digest.hex() if result else None,
        version=made.manifest.version if made else None,
        adapter=made.manifest.sha256 if made else None,
        optimizer=state_digest(made.state) if made else unchanged,
        bytes_up=carried.up,
        bytes_down=carried.down,
        seconds=seconds,
        metrics=made.manifest.metrics if made else {},
    )
