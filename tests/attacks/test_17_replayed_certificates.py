"""Nodes that check in as other devices, with certificates that every offer contains.

Five enrolled nodes answer the check-in first, each as a chosen device. If the coordinator admits them, it does not
admit the chosen devices, and the session lacks ten devices: the five cannot sign adverts for the names they took.
"""

import dataclasses
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from aggregation import checks, envelope
from aggregation.errors import EdgeAdaptError, ProtocolError
from aggregation.messages import Challenge, CheckIn, Offer
from aggregation.pki import Root
from aggregation.steps import BODY, RECORD, Step
from client.node.app import app as client_app
from client.node.statedir import DeviceStateDir
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.auditing import audit
from edgeadapt.auditing.transcripts import logs
from tests.support import FleetOf, refused

DEVICES, HOSTILE = 14, 5
ATTACKERS = [f"device-{number:02d}" for number in range(HOSTILE)]
CHOSEN = [f"device-{number:02d}" for number in range(HOSTILE, 2 * HOSTILE)]
HONEST = tuple(f"device-{number:02d}" for number in range(HOSTILE, DEVICES))


def answer(message: Message, body: bytes) -> Message:
    return Message(RecordDict({RECORD: ConfigRecord({BODY: body})}), reply_to=message)


def body_of(message: Message) -> bytes:
    found = message.content.config_records[RECORD][BODY]
    assert isinstance(found, bytes)
    return found


@dataclasses.dataclass
class Impostors:
    """The real app; from the second session on, ``lie`` answers the check-in of the hostile nodes.

    Args:
        fleet: Whose first devices are hostile.
        lie: (this, request, context, the chosen device) → the body of the answer, or None for no answer.
    """

    fleet: Any
    lie: Callable[["Impostors", Message, Context, str], bytes | None]
    certificates: dict[str, bytes] = dataclasses.field(default_factory=dict)  # from the first offer
    answers: dict[str, bytes] = dataclasses.field(default_factory=dict)  # device → its last answer to a check-in
    refusals: int = 0

    def __call__(self, message: Message, context: Context) -> Message:
        step, state_dir = message.metadata.message_type.partition(".")[2], str(context.node_config["state"])
        device = state_dir.rpartition("/")[2]
        if step == Step.OFFER.value and not self.certificates:
            names = [f"device-{number:02d}" for number in range(DEVICES)]
            offer = Offer.decode(envelope.unverified_body(body_of(message)))
            self.certificates = dict(zip(names, offer.certificates, strict=True))
        if step == Step.CHECK_IN.value and self.certificates and device in ATTACKERS:
            lie = self.lie(self, message, context, CHOSEN[ATTACKERS.index(device)])
            return client_app(message, context) if lie is None else answer(message, lie)
        reply = client_app(message, context)
        if step == Step.CHECK_IN.value:
            self.answers[device] = body_of(reply)
        return reply


def run(fleet: Any, lie: Callable[..., bytes | None]) -> tuple[Impostors, tuple[Any, ...]]:
    """Two sessions of a round each; the second is attacked. Without delays nodes answer in order of their numbers."""
    impostors = Impostors(fleet, lie)
    return impostors, fleet.federate(fleet.grid(app=impostors, mean_delay=0.0))


def replayed(self: Impostors, message: Message, context: Context, chosen: str) -> bytes:
    """The chosen device's certificate, signed with the only key that the node has."""
    key = DeviceStateDir.open(self.fleet.state_dir(ATTACKERS[CHOSEN.index(chosen)]).folder).identity
    challenge = Challenge.decode(envelope.unverified_body(body_of(message)))
    return envelope.sign(key, CheckIn(challenge.digest(), self.certificates[chosen], None))


def recorded(self: Impostors, message: Message, context: Context, chosen: str) -> bytes:
    """What the chosen device answered to its own challenge in the session before."""
    return self.answers[chosen]


def relayed(self: Impostors, message: Message, context: Context, chosen: str) -> bytes | None:
    """What the chosen device answers to this node's challenge, which the node forwards to it."""
    theirs = Context(context.run_id, self.fleet.node(chosen), {"state": str(self.fleet.state_dir(chosen).folder)},
                     RecordDict(), {})  # fmt: skip
    reply = client_app(message, theirs)
    self.refusals += reply.has_error()
    return None if reply.has_error() else body_of(reply)


def fleet_with(app_fleet_of: FleetOf) -> Any:
    return app_fleet_of(DEVICES, rounds=2, attempts=2, aggregation__session_rounds=1)


def audited(fleet: Any) -> None:
    """The logs of both sessions pass the audit."""
    state_dir = CoordinatorStateDir.open(fleet.out / "coordinator")
    paths = logs(state_dir.folder / "transcript")
    assert len(paths) == 2
    for path in paths:
        audit(path.read_bytes(), state_dir.root, state_dir.key.public).require()


def certificate_only(root: Root, asked: Challenge, raw: bytes, at: datetime) -> tuple[str, CheckIn]:
    """The check without the proof of possession."""
    message = CheckIn.decode(envelope.unverified_body(raw))
    return root.verify(message.certificate, at)[0], message


def any_challenge(root: Root, asked: Challenge, raw: bytes, at: datetime) -> tuple[str, CheckIn]:
    """The check of the signature, but not of what it answers."""
    device, key = root.verify(CheckIn.decode(envelope.unverified_body(raw)).certificate, at)
    return device, envelope.open_verified(CheckIn, raw, key, device)


@pytest.mark.parametrize("lie", [replayed, recorded])
def test_replayed_certificates_change_nothing(app_fleet_of: FleetOf, lie: Callable[..., bytes]) -> None:
    fleet = fleet_with(app_fleet_of)
    _, (_, second) = run(fleet, lie)
    assert (second.survivors, second.dropped, second.aborted) == (HONEST, {}, None)
    audited(fleet)


@pytest.mark.parametrize(("lie", "weak"), [(replayed, certificate_only), (recorded, any_challenge)])
def test_without_the_proof_five_nodes_stop_every_session(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, lie: Callable[..., bytes], weak: Any
) -> None:
    fleet = fleet_with(app_fleet_of)
    monkeypatch.setattr(checks, "check_in", weak)
    with refused(EdgeAdaptError, "session"):
        run(fleet, lie)
    assert len(fleet.registry().rounds()) == 1


def test_a_device_does_not_answer_the_challenge_of_another_node(app_fleet_of: FleetOf) -> None:
    fleet = fleet_with(app_fleet_of)
    impostors, (_, second) = run(fleet, relayed)
    assert impostors.refusals == HOSTILE
    assert (len(second.survivors), second.dropped, second.aborted) == (DEVICES, {}, None)
    audited(fleet)


def test_without_the_nodes_name_in_the_challenge_a_relayed_answer_takes_the_devices_place(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = fleet_with(app_fleet_of)
    monkeypatch.setattr(checks, "challenge", lambda *given: None)
    with refused(EdgeAdaptError, "session"):
        run(fleet, relayed)
    assert len(fleet.registry().rounds()) == 1


def test_the_answer_of_another_node_or_of_another_challenge_is_refused(app_fleet_of: FleetOf) -> None:
    fleet = app_fleet_of(3)
    state_dir, coordinator = fleet.state_dir("device-00"), CoordinatorStateDir.open(fleet.out / "coordinator")
    asked = Challenge(bytes(32), 2)
    raw = envelope.sign(state_dir.identity, CheckIn(asked.digest(), state_dir.certificate, None))
    at = datetime.fromisoformat("2027-01-01T00:00+00:00")
    assert checks.check_in(coordinator.root, asked, raw, at)[0] == "device-00"
    for other in (Challenge(bytes(32), 3), Challenge(bytes([1]) * 32, 2)):
        with refused(ProtocolError, "check-in.challenge", peer="device-00"):
            checks.check_in(coordinator.root, other, raw, at)
    coordinator.registry.close()
