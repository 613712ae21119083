"""Have devices train from an adapter that is not the last one that the coordinator's log made.

What an update shows depends on the adapter it starts from, which a coordinator may make for that purpose: published by
hand, taken from an old version, or from the sum of a round that it logged as aborted. The devices run the real
ClientApp, the coordinator is the real ServerApp with another adapter in its hands. With a true log every device refuses
the plan; with a log that names the adapter falsely, every device refuses the receipt, or the next session. Each attack
is also run without the check that stops it, and then every device trains.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from aggregation.errors import EdgeAdaptError, ProtocolError, TrustError
from aggregation.pki import PublicKey
from aggregation.server import AbortReason, Established, RoundAborted, RoundResult
from aggregation.steps import Step
from aggregation.transcript import logstate
from aggregation.transcript.entries import AdapterId
from aggregation.transcript.log import Transcript
from aggregation.transcript.logstate import LogState
from client.node import adapterstate
from client.node.adapterstate import AdapterState
from client.node.app import app as client_app
from client.node.statedir import DeviceStateDir
from client.node.tasklabels import TaskLabels
from coordinator import rounds
from coordinator.registry import Head, Registry, StoredAdapter
from edgeadapt.auditing import AuditInput, AuditOptions, chain
from edgeadapt.formats import files
from tests.support import FleetOf, refused
from tests.support.hostile import continues_from_anything

pytestmark = pytest.mark.usefixtures("by_bytes_only")
ATTACKED = 3  # the round whose plan has the adapter
newest_adapter, head = Registry.newest_adapter, Registry.head


@dataclass
class Attack:
    """A coordinator with another adapter in its hands, and what devices do with it."""

    kind: str
    false: str = ""  # checkpoints that name the adapter: those of the "round" before, or of the "session"
    registry: Any = None
    sums: list[Any] = field(default_factory=list)
    trained: int = 0

    def adapter(self, registry: Registry) -> StoredAdapter:
        """The adapter of the attack, from the third round on; before, the true one."""
        true = newest_adapter(registry)
        done = registry.rounds()
        if len(done) < ATTACKED - 1:
            return true
        if self.kind == "old":
            manifest, blob = registry.version(0).manifest, registry.blob(0)
            return StoredAdapter(manifest, blob, files.decode(blob))
        step = self.sums[0] if self.kind == "aborted" else np.float32(0.01)
        tensors = true.layout.unflatten(true.layout.flatten(true.tensors) + step)
        blob = files.encode(tensors)
        digest = files.sha256(blob)
        version = true.manifest.version + 1
        return StoredAdapter(
            replace(true.manifest, version=version, sha256=digest, size=len(blob)), blob, files.decode(blob)
        )

    def head(self, registry: Registry) -> Head:
        self.registry, true = registry, head(registry)
        return replace(true, newest=self.adapter(registry).manifest.id) if self.false else true

    def newest(self, log: Transcript) -> AdapterId:
        """Of the checkpoint after the second round."""
        if self.false == "round" and len(log.endings) == ATTACKED - 1:
            return self.adapter(self.registry).manifest.id
        return log.produced or log.start

    def reach(self, session: Established, result: RoundResult) -> rounds.Summed | RoundAborted:
        """Log the second round as aborted, and keep its sum."""
        if self.kind != "aborted" or result.round % 2:
            return rounds.Summed(session, result)
        self.sums.append((result.values["delta"] / result.values["weight"][0]).astype(np.float32))
        return RoundAborted(AbortReason.TOO_FEW, "as the coordinator says", session)

    def devices(self, message: Message, context: Context) -> Message:
        answer = client_app(message, context)
        plan = message.metadata.message_type == Step.PLAN.message_type
        self.trained += plan and message.metadata.group_id == str(ATTACKED) and not answer.has_error()
        return answer


KINDS = pytest.mark.parametrize(
    ("kind", "false"),
    [("by hand", ""), ("old", "round"), ("aborted", "round")],
    ids=["by hand, true log", "old, false log", "of an aborted round, false log"],
)
IN_A_SESSION = pytest.mark.parametrize("kind", ["old", "aborted"])


def attacked(fleet: Any, attack: Attack) -> None:
    """Run three rounds; the third is the attack."""
    with pytest.MonkeyPatch.context() as hostile:
        continues_from_anything(hostile)
        hostile.setattr(Registry, "newest_adapter", lambda registry: attack.adapter(registry))
        hostile.setattr(Registry, "head", lambda registry: attack.head(registry))
        hostile.setattr(Transcript, "newest", property(attack.newest))
        hostile.setattr(rounds, "within_reach", attack.reach)
        with suppress(EdgeAdaptError):  # no session, or a registry that does not take what the attack made
            fleet.federate(fleet.grid(app=attack.devices))


@pytest.fixture
def refusals(caplog: pytest.LogCaptureFixture) -> Callable[[], set[str]]:
    """What the devices refused so far, by its subject."""
    return lambda: {record.about for record in caplog.records if hasattr(record, "about")}  # type: ignore[attr-defined]


def weaken(patch: pytest.MonkeyPatch, check: str) -> None:
    """Remove a check of the log, and the one of older versions, which would refuse some of these plans as well."""
    patch.setattr(
        adapterstate,
        "on_plan",
        lambda known, plan, *limits: AdapterState(plan.adapter_version, plan.adapter_digest, bytes(32)),
    )
    patch.setattr(logstate if hasattr(logstate, check) else LogState, check, lambda *_: None)


@KINDS
def test_a_plan_of_another_adapter_than_the_logs_newest_is_refused(
    app_fleet_of: FleetOf, kind: str, false: str, refusals: Callable[[], set[str]]
) -> None:
    attack = Attack(kind, false)
    attacked(app_fleet_of(4, aggregation__session_rounds=4), attack)
    assert attack.trained == 0
    assert refusals() == {"receipt.adapter" if false else "plan.adapter"}


@KINDS
def test_without_the_check_every_device_trains_from_it(
    app_fleet_of: FleetOf, kind: str, false: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = Attack(kind, false)
    weaken(monkeypatch, "check_adapter" if false else "require_newest")
    attacked(app_fleet_of(4, aggregation__session_rounds=4), attack)
    assert attack.trained == 4


@IN_A_SESSION
def test_a_session_that_starts_from_another_adapter_is_refused(
    app_fleet_of: FleetOf, kind: str, refusals: Callable[[], set[str]]
) -> None:
    attack = Attack(kind, "session")
    attacked(app_fleet_of(4, attempts=1, aggregation__session_rounds=2), attack)
    assert attack.trained == 0
    assert refusals() == {"proof.adapter"}


def test_a_device_that_has_no_labels_yet_is_on_no_other_base(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, refusals: Callable[[], set[str]]
) -> None:
    """It knows the log of a session that ended before it trained; only on its owner's next base may one begin anew."""
    load: Any = DeviceStateDir.load
    monkeypatch.setattr(DeviceStateDir, "load", lambda files, kind: None if kind is TaskLabels else load(files, kind))
    attack = Attack("aborted", "session")
    attacked(app_fleet_of(4, attempts=1, aggregation__session_rounds=2), attack)
    assert attack.trained == 0
    assert refusals() == {"proof.adapter"}


@IN_A_SESSION
def test_without_the_check_every_device_trains_in_a_session_that_starts_from_another_adapter(
    app_fleet_of: FleetOf, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one of the checks of the other tests: here the first checkpoint of the session names the adapter."""
    checked = LogState.on_session_chain_proof

    def any_start(state: LogState, coordinator: PublicKey, raw: bytes, offer: bytes, **other: bool) -> LogState:
        try:
            return checked(state, coordinator, raw, offer, **other)
        except ProtocolError as error:
            if error.about != "proof.adapter":
                raise
            return LogState.initial(coordinator, raw, offer, state.device)

    attack, fleet = Attack(kind, "session"), app_fleet_of(4, attempts=1, aggregation__session_rounds=2)
    monkeypatch.setattr(LogState, "on_session_chain_proof", any_start)
    monkeypatch.setattr(
        adapterstate,
        "on_plan",
        lambda known, plan, *limits: AdapterState(plan.adapter_version, plan.adapter_digest, bytes(32)),
    )
    attacked(fleet, attack)
    assert attack.trained == 4
    checked_by = AuditInput.open(fleet.out, AuditOptions())
    with refused(TrustError, "session.adapter"):
        chain(checked_by.audit(unfinished=True))


def test_a_false_session_that_no_device_joined_hides_it_from_devices_and_not_from_an_audit(
    app_fleet_of: FleetOf, refusals: Callable[[], set[str]]
) -> None:
    """Of a session that it missed, a device sees the last checkpoint only. An auditor has the logs."""
    attack, fleet = Attack("by hand", "session"), app_fleet_of(4, attempts=2, aggregation__session_rounds=2)
    attacked(fleet, attack)
    assert attack.trained == 4
    assert refusals() == {"proof.adapter"}
    checked = AuditInput.open(fleet.out, AuditOptions())
    with refused(TrustError, "session.adapter"):
        chain(checked.audit(unfinished=True))
