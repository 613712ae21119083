"""Devices that demand proofs, in complete runs: they never refuse an honest coordinator, whatever drops out."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from aggregation import envelope
from aggregation.errors import EdgeAdaptError, TrustError
from aggregation.messages import Challenge, CheckIn
from aggregation.pki.identity import IdentityKey
from aggregation.steps import BODY, PROOF, RECORD, Step
from aggregation.transcript.log import Transcript
from aggregation.transcript.logstate import LogState, receipts, session_chain_proof
from client.node.app import STATE, app
from client.node.statedir import LOG_STATE, DeviceStateDir
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.auditing.transcripts import logs
from tests.support import FleetOf, refused

FIRST = "device-00"


class Recording:
    """The real app; records the messages to each node."""

    def __init__(self, change: Callable[[Step, str, dict[str, Any]], None] | None = None) -> None:
        self.asked: list[tuple[Step, str, int, dict[str, Any]]] = []
        self.change = change

    def __call__(self, message: Message, context: Context) -> Message:
        step, group = Step(message.metadata.message_type.partition(".")[2]), message.metadata.group_id
        fields = message.content.config_records[RECORD]
        if self.change:
            self.change(step, group, fields)  # type: ignore[arg-type]
        self.asked.append((step, group, context.node_id, dict(fields)))
        return app(message, context)

    def first(self, step: Step, node: int) -> dict[str, Any]:
        return next(fields for asked, _, to, fields in self.asked if (asked, to) == (step, node))


def ask(fleet: Any, device: str, step: Step, fields: Mapping[str, Any]) -> Message:
    """Ask a device outside a run."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 2, 1
    made = Message(RecordDict({RECORD: ConfigRecord(dict(fields))}), 2, step.message_type, group_id="1")
    made.metadata.__dict__["_message_id"] = "1"
    return app(made, Context(1, 2, {STATE: str(fleet.out / "devices" / device)}, RecordDict(), {}))


def check_in(fleet: Any, device: str) -> Message:
    """Ask a device for its check-in outside a run."""
    key = CoordinatorStateDir.open(fleet.out / "coordinator").key
    return ask(fleet, device, Step.CHECK_IN, {BODY: envelope.sign(key, Challenge(bytes(32), 2))})


def last_offer(reply: Message) -> bytes | None:
    """The offer that a device joined last, as its check-in states it."""
    body = reply.content.config_records[RECORD][BODY]
    assert isinstance(body, bytes)
    return CheckIn.decode(envelope.unverified_body(body)).last_offer


def test_no_device_drops_out_over_proofs_from_session_to_session(fleet_of: FleetOf) -> None:
    fleet = fleet_of(5, rounds=5, aggregation__session_rounds=2)
    assert [record.dropped for record in fleet.federate(fleet.grid())] == [{}] * 5


def test_whatever_drops_out_an_honest_coordinator_is_not_refused_over_its_log(
    fleet_of: FleetOf, refusals: list[str]
) -> None:
    """The grid drops messages at every step, before they reach a device and after it has answered. So many dropouts of
    so few devices make rounds fail while they are unmasked, and their repeats over other devices are refused. So is a
    message that a device gets again because its answer was lost.
    """
    fleet = fleet_of(8, rounds=9, attempts=30, aggregation__session_rounds=3)
    records = fleet.federate(fleet.grid(message_loss=0.06, forced_dropouts=1))
    assert {step for record in records for step in record.dropped.values()} >= {"plan", "survivors", "unmask"}
    assert set(refusals) <= {"step", "survivors.repeat", "plan.repeats", "plan.round", "offer.repeated"}


@pytest.mark.parametrize("at", ["plan", "survivors", "unmask"])
def test_a_coordinator_that_was_stopped_in_a_round_goes_on_with_all_devices(fleet_of: FleetOf, at: str) -> None:
    fleet, count = fleet_of(5, rounds=4, aggregation__session_rounds=2), [0]

    def stop(message: Any, context: Any) -> Any:
        count[0] += message.metadata.message_type.endswith(at)
        if count[0] == 7:  # in the second round, after some have answered
            raise KeyboardInterrupt
        return app(message, context)

    with pytest.raises(KeyboardInterrupt):
        fleet.federate(fleet.grid(app=stop))
    records = fleet.federate(fleet.grid())
    assert [record.dropped for record in records] == [{}] * 4


def test_a_device_keeps_its_log_state_across_processes(fleet_of: FleetOf) -> None:
    fleet = fleet_of(4, rounds=1)
    assert last_offer(check_in(fleet, FIRST)) is None
    fleet.federate(fleet.grid())
    log_state = fleet.state_dir(FIRST).load(LogState)
    assert log_state.device == FIRST
    assert len(log_state.delivered) == 2
    assert last_offer(check_in(fleet, FIRST)) == log_state.offer


def run_with_false_receipts(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, lie: Callable[..., Any]
) -> tuple[Any, Any]:
    """A run whose coordinator sends false receipts from the second round on."""
    honest = receipts

    def false(log: Transcript, devices: Any) -> dict[str, bytes]:
        return lie(honest, log, devices) if log.endings else honest(log, devices)  # type: ignore[no-any-return]

    monkeypatch.setattr("coordinator.transcripts.receipts", false)
    fleet = fleet_of(4, rounds=2)
    return fleet, fleet.federate(fleet.grid())


def rewritten(honest: Any, log: Transcript, devices: Any) -> Any:
    """The same log, except for an advert that no device sent, with the coordinator's signature on every checkpoint."""
    forged = Transcript(log.offer, log.newest, log.previous)
    forged.tree.append(b"an advert that no device sent")
    for index in range(1, log.tree.size):
        forged.tree.append(bytes([index]))
    forged.endings, forged.contributions, forged.round = log.endings, log.contributions, log.round
    forged.checkpoint(KEY[0])
    return honest(forged, devices)


def without_me(honest: Any, log: Transcript, devices: Any) -> Any:
    log.contributions.clear()
    return honest(log, devices)


KEY: list[IdentityKey] = []


@pytest.mark.parametrize(
    ("lie", "about"),
    [
        (lambda honest, log, devices: dict.fromkeys(devices, b""), "encoding.length"),
        (without_me, "receipt.contributions"),
        (rewritten, "log.consistency"),
    ],
    ids=["truncated", "without the device's messages", "rewritten"],
)
def test_a_log_that_fails_verification_ends_the_cooperation_of_every_device(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, refusals: list[str], lie: Any, about: str
) -> None:
    begin = CoordinatorStateDir.open

    def opened(folder: Path) -> Any:
        state_dir = begin(folder)
        KEY[:] = [state_dir.key]
        return state_dir

    monkeypatch.setattr("coordinator.app.CoordinatorStateDir.open", opened)
    _, (first, second) = run_with_false_receipts(fleet_of, monkeypatch, lie)
    assert first.dropped == {}
    assert set(second.dropped.values()) == {"plan"}
    assert second.aborted
    assert refusals.count(about) == 4


def test_a_plan_or_an_offer_without_a_proof_is_refused_unless_the_owner_demands_none(fleet_of: FleetOf) -> None:
    fleet = fleet_of(8, rounds=2)
    with (fleet.out / "devices" / FIRST / "device.toml").open("a") as file:
        file.write("demand_proofs = false\n")

    def strip(step: Step, group: str, fields: dict[str, Any]) -> None:
        if (step, group) == (Step.PLAN, "2"):
            del fields[PROOF]

    first, second = fleet.federate(fleet.grid(app=Recording(strip)))
    assert first.dropped == {}
    assert set(second.dropped) == {f"device-{number:02d}" for number in range(1, 8)}
    assert not (fleet.out / "devices" / FIRST / LOG_STATE).exists()


def test_a_replayed_offer_is_refused(fleet_of: FleetOf, refusals: list[str]) -> None:
    fleet, tape = fleet_of(4, rounds=3, aggregation__session_rounds=1), Recording()
    fleet.federate(fleet.grid(app=tape))
    node = fleet.node(FIRST)
    offers = [fields for step, _, to, fields in tape.asked if (step, to) == (Step.OFFER, node)]
    before = (fleet.out / "devices" / FIRST / "session.sealed").read_bytes()
    assert all(ask(fleet, FIRST, Step.OFFER, fields).has_error() for fields in offers)
    assert refusals[-3:] == ["proof.receipt", "receipt.session", "offer.repeated"]
    assert (fleet.out / "devices" / FIRST / "session.sealed").read_bytes() == before


def test_a_coordinator_without_its_logs_does_not_start(fleet_of: FleetOf) -> None:
    fleet = fleet_of(4, rounds=1)
    fleet.federate(fleet.grid())
    for path in logs(fleet.out / "coordinator" / "transcript"):
        path.unlink()
    fleet.configure({"rounds": 2})
    with refused(TrustError, "transcript"):
        fleet.federate(fleet.grid())


def test_a_coordinator_that_was_restored_from_an_old_copy_is_refused_until_devices_forget(
    fleet_of: FleetOf, tmp_path: Path
) -> None:
    fleet = fleet_of(4, rounds=2, attempts=1, aggregation__session_rounds=1)
    fleet.configure({"rounds": 1})
    fleet.federate(fleet.grid())
    shutil.copytree(fleet.out / "coordinator", tmp_path / "copy")
    fleet.configure({"rounds": 2})
    fleet.federate(fleet.grid())
    shutil.rmtree(fleet.out / "coordinator")
    shutil.copytree(tmp_path / "copy", fleet.out / "coordinator")
    fleet.configure({"rounds": 2})
    with refused(EdgeAdaptError, "session"):
        fleet.federate(fleet.grid())
    for device in fleet.nodes.values():
        DeviceStateDir.open(Path(device)).forget()
    assert fleet.federate(fleet.grid())[1].dropped == {}


def test_a_damaged_log_state_is_not_taken_for_a_missing_one(fleet_of: FleetOf) -> None:
    fleet = fleet_of(4, rounds=1)
    fleet.federate(fleet.grid())
    (fleet.out / "devices" / FIRST / LOG_STATE).write_bytes(b"damaged")
    assert check_in(fleet, FIRST).has_error()


def test_a_device_that_forgot_a_session_takes_part_from_the_next_offer(fleet_of: FleetOf) -> None:
    fleet = fleet_of(8, rounds=3, aggregation__session_rounds=2)

    def forget(step: Step, group: str, fields: dict[str, Any]) -> None:
        if (step, group) == (Step.PLAN, "2"):
            (fleet.out / "devices" / FIRST / LOG_STATE).unlink(missing_ok=True)

    first, second, third = fleet.federate(fleet.grid(app=Recording(forget)))
    assert (first.dropped, second.dropped, third.dropped) == ({}, {FIRST: "plan"}, {})


def test_the_coordinator_leads_devices_of_different_sessions_to_the_new_one(fleet_of: FleetOf) -> None:
    """One device receives no valid offer for three sessions."""
    fleet = fleet_of(8, rounds=5, aggregation__session_rounds=1)
    away = fleet.node(FIRST)

    class Away(Recording):
        def __call__(self, message: Message, context: Context) -> Message:
            if context.node_id == away and message.metadata.group_id in {f"session-{n}-1" for n in (2, 3, 4)}:
                message.content.config_records[RECORD][BODY] = b"damaged"
            return super().__call__(message, context)

    records = fleet.federate(fleet.grid(app=Away()))
    assert [FIRST in record.survivors for record in records] == [True, False, False, False, True]


def test_a_session_chain_proof_without_sessions_is_refused_by_a_device_with_a_log_state(
    fleet_of: FleetOf, refusals: list[str]
) -> None:
    fleet, tape = fleet_of(4, rounds=1), Recording()
    fleet.federate(fleet.grid(app=tape))
    offer = tape.first(Step.OFFER, fleet.node(FIRST))
    log_state = fleet.state_dir(FIRST).load(LogState)
    key = IdentityKey.from_pem((fleet.out / "coordinator" / "signing.pem").read_bytes())
    fresh = session_chain_proof(Transcript(log_state.offer, log_state.newest), key)
    assert ask(fleet, FIRST, Step.OFFER, {**offer, PROOF: fresh}).has_error()
    assert refusals[-1] == "offer.repeated"
