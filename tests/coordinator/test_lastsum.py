"""After a round that was unmasked and has no result: which devices the next rounds are over, and whom they wait for.

Devices reveal shares for sums from one adapter over one set of devices (``client.node.adapterstate``). The apps are the
real ones.
"""

import errno
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from flwr.app import Context, Error, Message

from aggregation import sharing
from aggregation.errors import ConfigError, EdgeAdaptError
from aggregation.pki import Authority, Revocation
from aggregation.sharing import SharePair
from aggregation.steps import Step
from client.node.app import app as client_app
from coordinator import lastsum
from coordinator.registry import Blobs
from coordinator.transcripts import Recorder
from simulations.engine.grid import DeliveryOutcome, InProcessGrid
from tests.support import FleetOf, refused
from tests.support.hostile import plans_for_anyone

Lost = Callable[[str, Step, int], bool]
NOW = datetime.now(UTC).replace(microsecond=0)
ABSENT, SPOILER = "device-01", "device-02"


class Killed(BaseException):
    """The process ends here."""


def losing(lost: Lost) -> Callable[[Message, Context], Message]:
    """The real devices, some of whose answers are lost; ``lost``: group, step, node → whether this one is."""

    def call(message: Message, context: Context) -> Message:
        answer = client_app(message, context)
        step = Step(message.metadata.message_type.partition(".")[2])
        gone = lost(message.metadata.group_id, step, context.node_id)
        return Message(Error(7, "lost"), reply_to=message) if gone else answer

    return call


def revoke(fleet: Any, name: str, number: int = 1) -> None:
    authority = Authority.from_pem((fleet.out / "authority" / "authority.pem").read_bytes())
    begin, serial = (
        NOW - timedelta(days=1),
        x509.load_der_x509_certificate(fleet.state_dir(name).certificate).serial_number,
    )
    listed = authority.revocations(number, {serial: Revocation(begin)}, begin, begin + timedelta(days=30))
    (fleet.out / "coordinator" / "revoked.crl").write_bytes(listed.to_pem())


def failed_while_unmasked(fleet: Any, first: int = 2) -> Lost:
    """Round 1: the first node is away at the plan, and all unmask responses but one are lost."""
    answered = list[int]()

    def lost(group: str, step: Step, node: int) -> bool:
        if (group, step) == ("1", Step.UNMASK):
            answered.append(node)
        return group == "1" and ((step is Step.PLAN and node == first) or (step is Step.UNMASK and len(answered) > 1))

    return lost


@pytest.fixture
def forgets(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the coordinator forgets the last sum when it starts."""
    if request.param:
        monkeypatch.setattr(lastsum, "find", lambda *given: None)
    return bool(request.param)


FORGETS = pytest.mark.parametrize("forgets", [False, True], indirect=True, ids=["reads its log", "forgets"])


@pytest.mark.parametrize(
    ("forgets", "instant"),
    [(False, "the request is logged"), (False, "all shares are in"), (True, "all shares are in")],
    indirect=["forgets"],
)
def test_a_kill_while_a_round_is_unmasked_stops_no_later_round(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, forgets: bool, instant: str
) -> None:
    """One device dropped out of that round and is back after the restart; only the others help to another sum."""
    fleet = fleet_of(6, rounds=3)
    sent = Recorder.sent
    shares = list[int]()

    def dying(self: Recorder, step: Step, bodies: Any) -> None:
        sent(self, step, bodies)
        if step is Step.UNMASK and instant == "the request is logged":
            raise Killed

    def away(group: str, step: Step, node: int) -> bool:
        if step is Step.UNMASK:
            shares.append(node)
            if len(shares) == 5:
                raise Killed
        return step is Step.PLAN and node == 2

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "sent", dying)
        patch.setattr(Recorder, "close", lambda *given: b"")  # nobody tidies up after a kill
        with pytest.raises(Killed):
            fleet.federate(fleet.grid(app=losing(away)))
    assert fleet.registry().rounds() == ()
    records = fleet.federate(fleet.grid())
    survivors = tuple(f"device-{n:02d}" for n in range(1, 6))
    if not forgets:
        assert [record.survivors for record in records] == [survivors, *2 * [("device-00", *survivors)]]
    else:
        assert [record.version for record in records] == [None] * 3
        assert set(records[-1].dropped.values()) == {"survivors"}


@FORGETS
def test_a_restart_after_a_round_without_a_result_plans_for_its_survivors(fleet_of: FleetOf, forgets: bool) -> None:
    fleet = fleet_of(6, rounds=1)
    (failed,) = fleet.federate(fleet.grid(app=losing(failed_while_unmasked(fleet))))
    assert "unmask responses" in failed.aborted
    fleet.configure({"rounds": 2})
    repeated = fleet.federate(fleet.grid())[1]
    assert repeated.version == (None if forgets else 1)
    if not forgets:
        assert repeated.survivors == tuple(f"device-{n:02d}" for n in range(1, 6))


def test_a_session_waits_by_name_for_a_survivor_until_it_is_back(
    fleet_of: FleetOf, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = fleet_of(6, rounds=1)
    fleet.federate(fleet.grid(app=losing(failed_while_unmasked(fleet))))
    fleet.configure({"rounds": 2})
    away = fleet.node(ABSENT)
    asked = list[tuple[str, Step]]()

    def lost(group: str, step: Step, node: int) -> bool:
        asked.append((group, step))
        return node == away and group.startswith(("session-2-1", "session-2-2"))

    grid = fleet.grid(app=losing(lost))
    with caplog.at_level(logging.WARNING, "edgeadapt.coordinator"):
        _, second = fleet.federate(grid)
    assert sum(f"waits for {ABSENT}" in entry.message for entry in caplog.records) == 2
    early = [(group, step) for group, step in asked if group.startswith(("session-2-1", "session-2-2"))]
    assert {step for _, step in early} == {Step.CHECK_IN}
    assert early.count(("session-2-1-2", Step.CHECK_IN)) == 1  # only the node that had not answered
    assert grid.clock.now() > 15 + 30  # the pauses
    assert (second.version, second.survivors) == (1, tuple(f"device-{n:02d}" for n in range(1, 6)))


def test_a_setting_on_which_the_last_sum_was_trained_stays_until_the_round_is_repeated(fleet_of: FleetOf) -> None:
    fleet = fleet_of(6, rounds=1, training__learning_rate=0.01, aggregation__clip_norm=12.0)
    fleet.federate(fleet.grid(app=losing(failed_while_unmasked(fleet))))
    fleet.configure({"rounds": 2})
    asked = list[Step]()

    def seen(group: str, step: Step, node: int) -> bool:
        asked.append(step)
        return False

    for name, before, value in (("training.learning_rate", 0.01, 0.005), ("aggregation.clip_norm", 12.0, 6.0)):
        fleet.configure({name: value})
        with refused(ConfigError, name, value=value):
            fleet.federate(fleet.grid(app=losing(seen)))
        fleet.configure({name: before})
    assert not asked
    assert fleet.federate(fleet.grid())[1].version == 1
    fleet.configure({"rounds": 3, "training.learning_rate": 0.005, "aggregation.clip_norm": 6.0})
    assert fleet.federate(fleet.grid())[2].version == 2


def test_it_goes_on_without_a_survivor_whose_certificate_was_revoked(fleet_of: FleetOf) -> None:
    fleet = fleet_of(7, rounds=1)
    fleet.federate(fleet.grid(app=losing(failed_while_unmasked(fleet))))
    fleet.configure({"rounds": 2})
    gone = fleet.node(ABSENT)

    def lost(group: str, step: Step, node: int) -> bool:
        if group == "session-2-2" and not (fleet.out / "coordinator" / "revoked.crl").exists():
            revoke(fleet, ABSENT)  # counts from the next attempt on
        return node == gone

    _, second = fleet.federate(fleet.grid(app=losing(lost)))
    assert second.survivors == tuple(f"device-{n:02d}" for n in range(2, 7))


class Silent(InProcessGrid):
    """Nothing is heard of one node at the plan of round 2; the authority revokes it at the third request.

    At the second, somebody puts a list there that cannot be read.
    """

    fleet: Any
    requests = 0

    def _outcomes(self, batch: Sequence[Message]) -> dict[int, DeliveryOutcome]:
        first, outcomes, away = batch[0].metadata, super()._outcomes(batch), self.fleet.node(ABSENT)
        if first.message_type != Step.PLAN.message_type or first.group_id.partition("-")[0] != "2":
            return outcomes
        self.requests += away in outcomes
        if self.requests == 2:
            (self.fleet.out / "coordinator" / "revoked.crl").write_bytes(b"no list")
        if self.requests == 3:
            revoke(self.fleet, ABSENT)
        return {node: replace(outcome, request_lost=node == away) for node, outcome in outcomes.items()}


def test_a_round_waits_for_a_silent_survivor_until_it_answers_or_is_revoked(fleet_of: FleetOf) -> None:
    fleet = fleet_of(7, rounds=3, aggregation__session_rounds=3)
    kind = type("Silent", (Silent,), {"fleet": fleet})
    grid = fleet.grid(app=losing(failed_while_unmasked(fleet)), kind=kind)
    _, second, third = fleet.federate(grid)
    assert grid.requests == 3
    assert f"no update of {ABSENT}" in second.aborted
    assert third.survivors == tuple(f"device-{n:02d}" for n in range(2, 7))


def test_a_round_over_the_same_devices_names_no_survivors_if_one_of_them_drops_out(fleet_of: FleetOf) -> None:
    fleet = fleet_of(6, rounds=3)
    asked = list[tuple[str, Step]]()
    fails, away = failed_while_unmasked(fleet), fleet.node(ABSENT)

    def lost(group: str, step: Step, node: int) -> bool:
        asked.append((group, step))
        return fails(group, step, node) or ((group, step, node) == ("2", Step.PLAN, away))

    _, second, third = fleet.federate(fleet.grid(app=losing(lost)))
    assert f"no update of {ABSENT}" in second.aborted
    assert second.dropped == {ABSENT: "plan"}
    assert ("2", Step.SURVIVORS) not in asked
    assert (third.version, len(third.survivors)) == (1, 5)


def test_a_session_that_grew_leaves_devices_out_so_that_the_old_survivors_are_enough(fleet_of: FleetOf) -> None:
    fleet = fleet_of(12, rounds=1)
    for state_dir in (fleet.out / "devices").iterdir():
        with (state_dir / "device.toml").open("a") as file:
            file.write("minimum_cohort = 5\nminimum_survivors = 2\n")
    late = {node for node in range(2, 14) if node > 7}
    fails = failed_while_unmasked(fleet)
    early = losing(lambda group, step, node: node in late or fails(group, step, node))
    (failed,) = fleet.federate(fleet.grid(app=early))
    assert "unmask responses" in failed.aborted
    fleet.configure({"rounds": 3})
    _, second, third = fleet.federate(fleet.grid())
    assert second.survivors == tuple(f"device-{n:02d}" for n in range(1, 6))
    assert second.version == 1
    assert third.version == 2


def dealing_badly(monkeypatch: pytest.MonkeyPatch, dealer: str, *, until: Callable[[], bool]) -> None:
    """``dealer`` deals shares that do not reconstruct its secrets, with digests of these."""
    genuine = sharing.encrypt

    def encrypt(session: Any, share_key: bytes, who: str, holder: str, pairs: dict[int, SharePair]) -> Any:
        if who == dealer and not until():
            pairs = {number: SharePair(spoiled(pair.seed), spoiled(pair.key)) for number, pair in pairs.items()}
        return genuine(session, share_key, who, holder, pairs)

    def spoiled(share: bytes) -> bytes:
        return b"\x00" + bytes(reversed(share[1:]))

    monkeypatch.setattr(sharing, "encrypt", encrypt)


def test_a_dealer_of_wrong_shares_is_named_and_the_training_goes_on_when_it_is_revoked(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = fleet_of(7, rounds=1)
    dealing_badly(monkeypatch, SPOILER, until=lambda: False)
    asked = list[tuple[str, Step]]()

    def seen(group: str, step: Step, node: int) -> bool:
        asked.append((group, step))
        return False

    def federate() -> Any:
        return fleet.federate(fleet.grid(app=losing(seen)))

    with caplog.at_level(logging.WARNING, "edgeadapt.coordinator"):
        federate()
        fleet.configure({"rounds": 12})
        with refused(EdgeAdaptError, "session") as caught:
            federate()
    assert f"until the authority revokes {SPOILER}" in str(caught.value)
    (first,) = fleet.registry().rounds()  # the hostile device costs one round, not those that are left
    assert (first.reason, first.blamed) == ("unrecoverable", (SPOILER,))
    assert [group for group, step in asked if step is Step.UNMASK] == ["1"] * 7  # no sum is spent on another failure
    warned = [entry.message for entry in caplog.records]
    assert f"{SPOILER} dealt or revealed a wrong share: let the authority revoke its certificate" in warned
    revoke(fleet, SPOILER)
    fleet.configure({"rounds": 2})
    second = federate()[1]
    assert second.version == 1
    assert second.survivors == tuple(f"device-{n:02d}" for n in range(7) if n != 2)


def test_another_optimizer_is_refused_before_a_device_is_asked(fleet_of: FleetOf) -> None:
    fleet = fleet_of(6, rounds=1, server__optimizer="fedadam")
    fleet.federate(fleet.grid())
    fleet.configure({"rounds": 2, "server.optimizer": "fedavg"})
    asked = list[Step]()
    with refused(ConfigError, "optimizer"):
        fleet.federate(fleet.grid(app=losing(lambda group, step, node: bool(asked.append(step)))))  # type: ignore[func-returns-value]
    assert not asked
    fleet.configure({"server.optimizer": "fedadam"})
    assert fleet.federate(fleet.grid())[1].version == 2


def test_a_full_disk_is_found_before_a_device_is_asked_for_an_update(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = fleet_of(6, rounds=1)
    asked = list[Step]()

    def seen(group: str, step: Step, node: int) -> bool:
        asked.append(step)
        return False

    def full(self: Blobs, path: str, blob: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Blobs, "_write", full)
        with refused(EdgeAdaptError, "blobs"):
            fleet.federate(fleet.grid(app=losing(seen)))
    assert Step.OFFER in asked
    assert Step.PLAN not in asked
    assert [record.version for record in fleet.federate(fleet.grid())] == [1]
    assert not list((fleet.out / "coordinator" / "blobs").glob("*.part"))


def test_a_coordinator_that_plans_without_the_dealer_gets_no_sum_any_more(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It forgets the last sum, and leaves the dealer out of the session as ``aggregation.server`` does."""
    plans_for_anyone(monkeypatch)
    dealing_badly(monkeypatch, SPOILER, until=lambda: False)
    fleet = fleet_of(7, rounds=3, aggregation__session_rounds=3)
    records = fleet.federate(fleet.grid())
    assert [record.version for record in records] == [None] * 3
    assert SPOILER in records[0].blamed
    assert all(set(record.dropped.values()) == {"survivors"} for record in records[1:])
