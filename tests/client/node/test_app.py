"""The device's app, called with real Flower messages: a legal step is answered once, anything else is refused.

The tests act as the coordinator, with its key, so that they can sign what an honest coordinator never would.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from aggregation import checks, envelope, server
from aggregation.entropy import SystemEntropy
from aggregation.messages import Challenge, Survivors
from aggregation.pki import Authority
from aggregation.pki.identity import IdentityKey
from aggregation.server import Coordinator
from aggregation.steps import ADAPTER, BODY, CONSENT, RECORD, REVOCATIONS, Step
from aggregation.vector import VectorSpec
from client.node.app import STATE, app
from client.node.snapshot import Draw, Snapshot
from client.node.statedir import LOCK, SEALING_KEY, SETTINGS, STATES, DeviceSettings, DeviceStateDir
from client.node.statedir import STATE as STATE_FILE
from client.node.step import RefusalCode
from client.training.control import TrainingControl
from client.training.torchengine import FrozenLayers
from client.training.trainer import ClassifierTrainer
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.bases.states import StateCache
from edgeadapt.formats import files, jsontext, storage
from edgeadapt.formats.layout import Floats, Layout
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.rounds.task import Task
from tests.support import FleetOf

FIRST = "device-00"
NODE = 2
DEVICES = 4  # and one unseen
PHRASE = "the code of the safe is 4711"


def message(step: Step, record: Mapping[str, Any] | None) -> Message:
    content = RecordDict({} if record is None else {RECORD: ConfigRecord(dict(record))})
    made = Message(content, NODE, step.message_type, group_id="1")
    made.metadata.__dict__["_message_id"] = "1"  # as a grid does
    return made


@dataclass
class Talk:
    """The coordinator's side, one call for each exchange."""

    fleet: Any
    coordinator: CoordinatorStateDir
    inside: str = ""  # the state directory within the folder of the device's name
    refusals: list[str] = field(default_factory=list)

    def reply(self, device: str, step: Step, record: Mapping[str, Any] | None) -> Message:
        state_dir = str(self.fleet.out / "devices" / device / self.inside)
        return app(message(step, record), Context(1, NODE, {STATE: state_dir}, RecordDict(), {}))

    def ask(self, device: str, step: Step, body: bytes, **extra: bytes) -> bytes:
        reply = self.reply(device, step, {BODY: body, **extra})
        assert not reply.has_error(), reply.error
        answer = reply.content.config_records[RECORD][BODY]
        assert isinstance(answer, bytes)
        return answer

    def refused(self, device: str, step: Step, record: Mapping[str, Any] | None, about: str | None = None) -> None:
        """Refused in one line, for a reason about ``about``, with the device's state as it was."""
        state = self.fleet.out / "devices" / device / "session.sealed"
        before = state.read_bytes() if state.exists() else None
        reply = self.reply(device, step, record)
        assert reply.has_error(), f"{step} was answered"
        assert reply.error.code == RefusalCode.REFUSED
        assert reply.error.reason
        assert "\n" not in reply.error.reason
        assert about is None or self.refusals[-1] == about, reply.error.reason
        assert (state.read_bytes() if state.exists() else None) == before

    def offer(self) -> tuple[Any, bytes]:
        devices = [f"device-{number:02d}" for number in range(DEVICES)]
        folders = {device: self.fleet.out / "devices" / device / self.inside for device in devices}
        certificates = {device: DeviceStateDir.open(folder).certificate for device, folder in folders.items()}
        version, state_dir = self.version(), self.coordinator
        layout = Layout.of(state_dir.registry.tensors(0))
        spec = state_dir.settings.aggregation.spec(DEVICES, layout, version.manifest.base_digest, 2)
        now = datetime.now(UTC)
        return server.open_session(Coordinator(state_dir.key), state_dir.root, spec, certificates, SystemEntropy(), now)

    def version(self) -> Any:
        return self.coordinator.registry.version(0)

    def sharing(self) -> tuple[Any, bytes]:
        state, offer = self.offer()
        for device in sorted(state.cohort):
            state = state.on_advert(device, self.ask(device, Step.OFFER, offer))
        return state.close()  # type: ignore[no-any-return]

    def established(self) -> Any:
        state, roster = self.sharing()
        for device in sorted(state.session.peers):
            state = state.on_shares(device, self.ask(device, Step.ROSTER, roster))
        return state.close()

    def plan(self, session: Any, **changes: Any) -> tuple[Any, dict[str, bytes]]:
        manifest = self.version().manifest
        task = self.coordinator.settings.task(manifest)
        whole = {"adapter_version": 0, "adapter_digest": manifest.sha256, "training": task.encode(), "cohort": None}
        return session.plan(**{**whole, **changes})  # type: ignore[no-any-return]

    @property
    def adapter(self) -> bytes:
        return self.coordinator.registry.blob(0)

    def collect(self, state: Any, plans: Mapping[str, bytes]) -> tuple[Any, dict[str, bytes]]:
        for device, body in plans.items():
            state = state.on_masked_input(device, self.ask(device, Step.PLAN, body, adapter=self.adapter))
        return state.close()  # type: ignore[no-any-return]

    def confirm(self, state: Any, bodies: Mapping[str, bytes]) -> tuple[Any, dict[str, bytes]]:
        for device, body in bodies.items():
            state = state.on_consistency_signature(device, self.ask(device, Step.SURVIVORS, body))
        return state.close()  # type: ignore[no-any-return]


@pytest.fixture
def talk(request: pytest.FixtureRequest, fleet_of: FleetOf, refusals: list[str]) -> Iterator[Talk]:
    fleet = fleet_of(DEVICES, **getattr(request, "param", {}))
    for state_dir in (fleet.out / "devices").iterdir():  # these tests have no log; test_log_proofs.py has one
        with (state_dir / "device.toml").open("a") as file:
            file.write("demand_proofs = false\n")
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    coordinator = CoordinatorStateDir.open(fleet.out / "coordinator")
    yield Talk(fleet, coordinator, refusals=refusals)
    coordinator.registry.close()


def damaged(body: bytes) -> list[bytes]:
    """The body truncated, extended, and with one bit flipped in several places."""
    rng = np.random.default_rng(len(body))
    copies = [b"", body[:1], body[:-1], body[: len(body) // 2], body + b"\0"]
    for place in rng.integers(0, 8 * len(body), 12):
        flipped = bytearray(body)
        flipped[place // 8] ^= 1 << (place % 8)
        copies.append(bytes(flipped))
    return copies


def test_a_device_checks_in_with_proof_of_its_key_and_keeps_its_files_as_they_were(talk: Talk) -> None:
    challenge, folder = Challenge(bytes(32), NODE), talk.fleet.out / "devices" / FIRST
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    raw = talk.ask(FIRST, Step.CHECK_IN, envelope.sign(talk.coordinator.key, challenge))
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}
    assert checks.check_in(talk.coordinator.root, challenge, raw, datetime.now(UTC))[0] == FIRST
    assert after == before


def test_whether_there_are_enough_examples_is_answered_to_an_offer_alone(talk: Talk) -> None:
    """Its answer leaves at a multiple of a quantum; that to a challenge would show how long counting took."""
    folder = talk.fleet.out / "devices" / FIRST
    with (folder / "device.toml").open("a") as file:
        file.write("[eligibility]\nminimum_examples = 1000\n")
    challenge = envelope.sign(talk.coordinator.key, Challenge(bytes(32), NODE))
    assert talk.ask(FIRST, Step.CHECK_IN, challenge)
    _, offer = talk.offer()
    assert talk.reply(FIRST, Step.OFFER, {BODY: offer}).error.code == RefusalCode.NOT_ELIGIBLE
    assert talk.ask("device-01", Step.OFFER, offer)


def test_what_the_owner_sets_aside_is_in_no_snapshot(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, taken = talk.fleet.out / "devices" / FIRST, list[bytes]()
    with (folder / "device.toml").open("a") as file:
        file.write('[data]\nremove = ["personal"]\n')
    path = DeviceStateDir.open(folder).examples
    before = path.read_bytes()
    path.write_bytes(before + b'{"text": "write to anna@home.example", "label": 0}\n')
    monkeypatch.setattr(DeviceStateDir, "take_snapshot", lambda _, examples, key: taken.append(examples))
    assert talk.ask(FIRST, Step.OFFER, talk.offer()[1])
    assert taken == [before + b"\n"]


def test_only_a_challenge_of_the_coordinator_for_this_node_is_signed(talk: Talk) -> None:
    key, own = talk.coordinator.key, talk.fleet.state_dir(FIRST).identity
    for about, raw in {
        "signature": envelope.sign(own, Challenge(bytes(32), NODE)),
        "challenge.node": envelope.sign(key, Challenge(bytes(32), NODE + 1)),
        "envelope.tag": envelope.sign(key, Survivors(bytes(32), {})),
        "encoding.length": b"",
    }.items():
        talk.refused(FIRST, Step.CHECK_IN, {BODY: raw}, about)
    talk.refused(FIRST, Step.CHECK_IN, None, "message.body")


def test_a_device_checks_in_where_its_owner_contributes_what_is_summed(talk: Talk) -> None:
    challenge = envelope.sign(talk.coordinator.key, Challenge(bytes(32), NODE))
    assert talk.ask(FIRST, Step.CHECK_IN, challenge, consent=b"moments")
    for about, what in {"task.observations": b"observations", "consent": b"demand_proofs"}.items():
        talk.refused(FIRST, Step.CHECK_IN, {BODY: challenge, CONSENT: what}, about)


def test_every_device_draws_anew_in_every_round_and_session(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, real = list[float](), Snapshot.generator

    def generator(snapshot: Snapshot, plan: Any, draw: Draw) -> np.random.Generator:
        drawn.append(real(snapshot, plan, draw).random())
        return real(snapshot, plan, draw)

    monkeypatch.setattr(Snapshot, "generator", generator)
    for _ in range(2):
        session = talk.established()
        for _ in range(2):
            planned = talk.plan(session)
            session = planned[0].established
            talk.collect(*planned)
    assert len(drawn) == len(set(drawn)) == 2 * 2 * 2 * DEVICES  # the order of the examples, and the rounding


def test_a_damaged_message_is_refused_at_every_step_and_the_right_one_is_answered_after_it(talk: Talk) -> None:
    def first(step: Step, body: bytes, **extra: bytes) -> None:
        for copy in damaged(body):
            talk.refused(FIRST, step, {BODY: copy, **extra})

    _, offer = talk.offer()
    first(Step.OFFER, offer)
    sharing, roster = talk.sharing()  # another offer, which the device takes
    first(Step.ROSTER, roster)
    for device in sorted(sharing.session.peers):
        sharing = sharing.on_shares(device, talk.ask(device, Step.ROSTER, roster))
    collecting, plans = talk.plan(sharing.close())
    first(Step.PLAN, plans[FIRST], adapter=talk.adapter)
    confirming, survivors = talk.collect(collecting, plans)
    first(Step.SURVIVORS, survivors[FIRST])
    unmasking, requests = talk.confirm(confirming, survivors)
    first(Step.UNMASK, requests[FIRST])
    for device, body in requests.items():
        unmasking = unmasking.on_unmask_response(device, talk.ask(device, Step.UNMASK, body))
    _, result = unmasking.close()
    assert result.survivors == tuple(f"device-{n:02d}" for n in range(DEVICES))
    assert result.values["weight"][0] == sum(len(h.train) for h in talk.fleet.population.clients[:DEVICES])


def test_a_step_out_of_order_is_refused(talk: Talk) -> None:
    later = (Step.ROSTER, Step.PLAN, Step.SURVIVORS, Step.UNMASK)
    for step in later:
        talk.refused(FIRST, step, {BODY: b"anything"}, "step")
    _, offer = talk.offer()
    talk.ask(FIRST, Step.OFFER, offer)
    for step in later[1:]:
        talk.refused(FIRST, step, {BODY: b"anything"}, "step")
    session = talk.established()
    for step in (Step.ROSTER, Step.SURVIVORS, Step.UNMASK):
        talk.refused(FIRST, step, {BODY: b"anything"}, "step")
    _, survivors = talk.collect(*talk.plan(session))
    talk.refused(FIRST, Step.UNMASK, {BODY: b"anything"}, "session.adversary")
    talk.ask(FIRST, Step.SURVIVORS, survivors[FIRST])


def test_the_same_step_twice_is_answered_once(talk: Talk) -> None:
    sharing, roster = talk.sharing()
    for device in sorted(sharing.session.peers):
        sharing = sharing.on_shares(device, talk.ask(device, Step.ROSTER, roster))
    talk.refused(FIRST, Step.ROSTER, {BODY: roster}, "step")
    collecting, plans = talk.plan(sharing.close())
    confirming, survivors = talk.collect(collecting, plans)
    talk.refused(FIRST, Step.PLAN, {BODY: plans[FIRST], ADAPTER: talk.adapter}, "plan.round")
    _, requests = talk.confirm(confirming, survivors)
    talk.refused(FIRST, Step.SURVIVORS, {BODY: survivors[FIRST]}, "step")
    talk.ask(FIRST, Step.UNMASK, requests[FIRST])
    talk.refused(FIRST, Step.UNMASK, {BODY: requests[FIRST]}, "step")


def test_concurrent_copies_of_a_message_are_answered_once(talk: Talk) -> None:
    _, roster = talk.sharing()
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: talk.reply(FIRST, Step.ROSTER, {BODY: roster}), range(4)))
    assert [reply.has_error() for reply in replies].count(False) == 1


def test_a_plan_whose_adapter_or_task_is_not_right_is_refused_and_the_right_plan_is_answered(talk: Talk) -> None:
    session, tensors = talk.established(), talk.coordinator.registry.tensors(0)
    manifest = talk.version().manifest
    task = talk.coordinator.settings.task(manifest)
    flipped = bytearray(talk.adapter)
    flipped[-1] ^= 1
    _, plans = talk.plan(session)
    for other in (None, b"", talk.adapter[:-1], bytes(flipped)):
        record = {BODY: plans[FIRST], **({} if other is None else {ADAPTER: other})}
        talk.refused(FIRST, Step.PLAN, record, "plan.adapter_digest")

    def signed(blob: bytes, about: str | None = None, **changes: Any) -> None:
        """A plan with the digest of ``blob``, signed by the coordinator."""
        _, bodies = talk.plan(session, adapter_digest=files.sha256(blob), **changes)
        talk.refused(FIRST, Step.PLAN, {BODY: bodies[FIRST], ADAPTER: blob}, about)

    name = min(tensors)
    signed(b"no adapter")
    signed(talk.adapter[:-1])
    signed(files.encode({k: v for k, v in tensors.items() if k != name}), "plan.layout")
    signed(files.encode({**tensors, name: np.zeros((7, 7), np.float32)}), "plan.layout")
    signed(files.encode({**tensors, "extra": np.zeros(3, np.float32)}), "plan.layout")
    poisoned = talk.adapter[:-4] + np.float32(np.nan).tobytes()
    signed(poisoned)

    def asked(training: bytes, about: str | None = None) -> None:
        signed(talk.adapter, about, training=training)

    asked(b"")
    asked(json.dumps({**asdict(task), "code": "import os"}).encode())
    asked(json.dumps({**asdict(task), "epochs": 10**9}).encode())
    asked(json.dumps({**asdict(task), "seed": 0}).encode())
    asked(replace(task, peft_config=replace(task.peft_config, r=task.peft_config.r + 1)).encode(), "plan.layout")
    asked(replace(task, peft_config=replace(task.peft_config, r=10**9)).encode())
    asked(replace(task, peft_config=replace(task.peft_config, target_modules=("nothing",))).encode())
    asked(replace(task, labels=(*task.labels, "another")).encode(), "plan.layout")
    asked(replace(task, labels=()).encode())
    talk.ask(FIRST, Step.PLAN, plans[FIRST], adapter=talk.adapter)


@pytest.mark.parametrize(("name", "bound"), [("weight", 5.0), ("held_out", 2.0), ("loss", 1e-3), ("delta", 1e-9)])
def test_bounds_that_tell_devices_apart_are_refused_by_every_device(
    talk: Talk, name: str, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator offers a bound and counts who cannot answer: they have more examples, or a greater loss."""
    genuine = Task.exact_vector

    def narrowed(task: Task, layout: Layout, bounds: Any) -> VectorSpec:
        spec = genuine(task, layout, bounds)
        tight = (replace(each, bound=bound) if each.name == name else each for each in spec.segments)
        return replace(spec, segments=tuple(tight))

    with monkeypatch.context() as hostile:
        hostile.setattr(Task, "exact_vector", narrowed)
        session = talk.established()
    _, plans = talk.plan(session)
    for device, body in plans.items():
        talk.refused(device, Step.PLAN, {BODY: body, ADAPTER: talk.adapter}, "offer.spec.vector")
    monkeypatch.setattr("client.node.training.check_bounds", lambda *given: None)
    monkeypatch.setattr("client.node.training._or_else", lambda attempt, otherwise: attempt())  # the second check
    refused = {
        device: talk.reply(device, Step.PLAN, {BODY: body, ADAPTER: talk.adapter}).has_error()
        for device, body in plans.items()
    }
    assert any(refused.values()) is (name != "delta")  # an update is clipped to its bound
    assert name != "weight" or refused == {device: number > 1 for number, device in enumerate(sorted(plans))}


def test_a_coordinator_with_another_key_is_refused(talk: Talk, fleet_of: FleetOf) -> None:
    stranger = CoordinatorStateDir.open(fleet_of(DEVICES).out / "coordinator")
    _, offer = Talk(talk.fleet, replace(talk.coordinator, key=stranger.key)).offer()
    talk.refused(FIRST, Step.OFFER, {BODY: offer}, "signature")
    stranger.registry.close()


@pytest.mark.parametrize("record", [None, {}, {BODY: "text"}, {BODY: 7}, {ADAPTER: b"x"}, {BODY: [b"a"]}])
def test_a_message_without_a_body_is_refused(talk: Talk, record: Any) -> None:
    talk.refused(FIRST, Step.OFFER, record, "message.body")


def test_a_node_without_a_state_directory_is_refused(
    talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for config in ({}, {STATE: ""}, {STATE: str(tmp_path / "gone")}):
        reply = app(message(Step.CHECK_IN, {BODY: b""}), Context(1, 2, config, RecordDict(), {}))
        assert reply.error.code == RefusalCode.REFUSED
        assert reply.error.reason == "cannot take part; the device's log has the reason"


def test_a_base_that_is_not_the_offered_one_is_refused(talk: Talk, make_base: Any, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other-base", 2)
    path = talk.fleet.out / "devices" / FIRST / "device.toml"
    path.write_text(path.read_text().replace(str(talk.fleet.base.folder), str(other.folder)))
    _, offer = talk.offer()
    talk.refused(FIRST, Step.OFFER, {BODY: offer}, "offer.base_digest")


def test_a_damaged_state_excludes_a_device_from_one_session_only(talk: Talk) -> None:
    _, roster = talk.sharing()
    (talk.fleet.out / "devices" / FIRST / "session.sealed").write_bytes(b"damaged")
    talk.refused(FIRST, Step.ROSTER, {BODY: roster}, "sealed.version")
    talk.established()


# What an error may say.


@pytest.mark.parametrize("name", ["authority.pem", "revoked.crl"])
def test_an_error_in_a_devices_own_files_is_reported_without_its_reason(talk: Talk, name: str) -> None:
    _, offer = talk.offer()
    (talk.fleet.out / "devices" / FIRST / name).write_bytes(b"damaged")
    authority = Authority.from_pem((talk.fleet.out / "authority" / "authority.pem").read_bytes())
    now = datetime.now(UTC)
    listed = authority.revocations(1, {}, now, now + timedelta(days=1)).to_pem()
    reply = talk.reply(FIRST, Step.OFFER, {BODY: offer, REVOCATIONS: listed})
    assert (reply.error.code, reply.error.reason) == (
        RefusalCode.REFUSED,
        "cannot take part; the device's log has the reason",
    )


@pytest.mark.parametrize("kind", ["endless", "pipe", "large"])
def test_a_file_that_would_never_end_or_fill_the_memory_is_refused_unread(talk: Talk, kind: str) -> None:
    _, roster = talk.sharing()
    folder = talk.fleet.out / "devices" / FIRST
    small = ("identity.pem", "certificate.der", "authority.pem", "coordinator.pem", "revoked.crl", "sealing.key")
    for name in (*small, "session.sealed", "device.toml"):
        path, aside = folder / name, folder / "aside"
        if path.exists():
            path.rename(aside)
        if kind == "endless":
            path.symlink_to("/dev/zero")
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.touch()
            os.truncate(path, 2**31)  # sparse: it takes no space
        reply = talk.reply(FIRST, Step.ROSTER, {BODY: roster})
        path.unlink()
        if aside.exists():
            aside.rename(path)
        assert (reply.error.code, reply.error.reason) == (
            RefusalCode.REFUSED,
            "cannot take part; the device's log has the reason",
        )
        assert talk.refusals[-1] == name
    talk.ask(FIRST, Step.ROSTER, roster)


def test_no_answer_is_sent_before_the_new_state_is_on_the_disk(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    session = talk.established()
    _, plans = talk.plan(session)
    state = talk.fleet.out / "devices" / FIRST / "session.sealed"
    before = state.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        reply = talk.reply(FIRST, Step.PLAN, {BODY: plans[FIRST], ADAPTER: talk.adapter})
    assert reply.error.code == RefusalCode.FAILED
    assert state.read_bytes() == before
    talk.ask(FIRST, Step.PLAN, plans[FIRST], adapter=talk.adapter)
    assert state.read_bytes() != before


def test_a_device_that_was_killed_after_it_saved_its_state_does_not_answer_again(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right after the new state is on the disk, a restarted device has answered, though nobody heard it."""
    session = talk.established()
    _, plans = talk.plan(session)

    class Killed(BaseException):
        pass

    def die_after(path: Path, content: bytes) -> None:
        storage.replace(path, content)
        if path.name == STATE_FILE:
            raise Killed

    with monkeypatch.context() as broken:
        broken.setattr("client.node.statedir.replace", die_after)
        with pytest.raises(Killed):
            talk.reply(FIRST, Step.PLAN, {BODY: plans[FIRST], ADAPTER: talk.adapter})
    talk.refused(FIRST, Step.PLAN, {BODY: plans[FIRST], ADAPTER: talk.adapter})


def test_after_a_round_no_state_directory_contains_a_secret_of_it(talk: Talk) -> None:
    """Neither in a file, nor in the unsealed state."""
    session = talk.established()
    state_dirs = [DeviceStateDir.open(talk.fleet.out / "devices" / device) for device in sorted(session.session.peers)]
    own = {secret for state_dir in state_dirs for secret in asdict(state_dir.load_state())["secrets"][1].values()}
    confirming, bodies = talk.collect(*talk.plan(session))
    held = {
        share
        for state_dir in state_dirs
        for pair in asdict(state_dir.load_state())["held"].values()
        for share in pair.values()
    }
    assert (len(own), len(held)) == (2 * DEVICES, 2 * DEVICES**2)
    assert all(holds(state_dir, held) and not holds(state_dir, own) for state_dir in state_dirs)
    _, bodies = talk.confirm(confirming, bodies)
    for device, body in bodies.items():
        talk.ask(device, Step.UNMASK, body)
    assert len(bodies) == DEVICES
    assert not any(holds(state_dir, own | held) for state_dir in state_dirs)


def holds(state_dir: DeviceStateDir, secrets: set[bytes]) -> bool:
    """Whether one of the secrets is in a file of the state directory, or in its sealed state."""
    files = b"".join(path.read_bytes() for path in state_dir.folder.iterdir() if path.is_file())
    state = str(asdict(state_dir.load_state()))
    return any(secret in files or repr(secret) in state for secret in secrets)


def test_the_examples_file_is_never_written_by_a_round(talk: Talk) -> None:
    path = talk.fleet.out / "devices" / FIRST / "examples.jsonl"
    before = path.read_bytes(), path.stat().st_mtime_ns
    talk.collect(*talk.plan(talk.established()))
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


# How a device answers a plan that it must not or cannot train: within limits, and without telling why of its data.
SPOILED = {
    "example": f'{{"text": "{PHRASE}"',
    "examples.split": "",
    "examples": None,  # no file
}


@pytest.mark.parametrize("about", SPOILED)
def test_examples_that_cannot_be_used_are_answered_with_weight_zero(talk: Talk, about: str) -> None:
    path, content = talk.fleet.state_dir(FIRST).examples, SPOILED[about]
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert weight(talk) == sum(trained(talk, number) for number in range(1, DEVICES))
    assert talk.refusals == ([about] if content is not None else [about, "examples.split"])


def test_an_example_with_a_label_that_the_task_lacks_is_left_out(talk: Talk, caplog: pytest.LogCaptureFixture) -> None:
    with talk.fleet.state_dir(FIRST).examples.open("a") as file:
        file.write(json.dumps({"text": PHRASE, "label": 3}) + "\n")
    with caplog.at_level(logging.WARNING, "edgeadapt.device"):
        assert weight(talk) == sum(trained(talk, number) for number in range(DEVICES))
    assert "1 examples have a label that the task lacks" in caplog.text


def trained(talk: Talk, number: int) -> int:
    return len(talk.fleet.population.clients[number].train)


def weight(talk: Talk) -> float:
    """The total weight of a round in which every device answers every step."""
    collecting, plans = talk.plan(talk.established())
    unmasking, requests = talk.confirm(*talk.collect(collecting, plans))
    for device, body in requests.items():
        unmasking = unmasking.on_unmask_response(device, talk.ask(device, Step.UNMASK, body))
    _, result = unmasking.close()
    return float(result.values["weight"][0])


class PanicException(BaseException):
    """What a panic in Rust becomes in Python, where it is no ``Exception``."""


@pytest.mark.parametrize("kind", [RuntimeError, OSError, ValueError, MemoryError, PanicException])
def test_an_exception_in_training_is_answered_and_its_text_is_not_logged(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    _, plans = talk.plan(talk.established())

    def fail(*_: object, **__: object) -> None:
        raise kind(PHRASE)

    with monkeypatch.context() as broken, caplog.at_level(logging.DEBUG, "edgeadapt.device"):
        broken.setattr(ClassifierTrainer, "train", fail)
        talk.ask(FIRST, Step.PLAN, plans[FIRST], adapter=talk.adapter)
    assert "4711" not in caplog.text
    assert f"contributed nothing: {kind.__name__} in fail" in caplog.text
    assert talk.refusals == [kind.__name__]


def test_a_round_is_trained_within_the_owners_limits(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    with (talk.fleet.state_dir(FIRST).folder / SETTINGS).open("a") as settings:  # its last table is the policy
        settings.write("maximum_seconds = 90\nduty_cycle = 0.5\nmaximum_tokens = 7\nmaximum_gradient_norm = 3\n")
    train, seen = ClassifierTrainer.train, list[TrainingControl]()

    def watched(self: ClassifierTrainer, *rest: Any, control: TrainingControl, **named: Any) -> Any:
        seen.append(control)
        return train(self, *rest, control=control, **named)

    monkeypatch.setattr(ClassifierTrainer, "train", watched)
    _, plans = talk.plan(talk.established())
    talk.ask(FIRST, Step.PLAN, plans[FIRST], adapter=talk.adapter)
    assert seen == [TrainingControl(90.0, 0.5, 3.0, True, 7, step=seen[0].step)]


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("task.learning_rate", {"learning_rate": 0.2}),
    ("task.epochs", {"epochs": 11}),
    ("task.batch_size", {"batch_size": 65}),
    ("task.batch_size", {"batch_size": 1}),
    ("task.weight_decay", {"weight_decay": 0.2}),
    ("task.momentum", {"momentum": 0.999}),
    ("task.proximal", {"proximal": 11.0}),
    ("task.proximal", {"proximal": 9.95, "weight_decay": 0.1, "learning_rate": 0.1}),
    ("task.labels", {"labels": tuple(map(str, range(1025)))}),
    ("task.scaling", {"peft_config": PeftConfig("LORA", 2, 130, ("query", "value"))}),
    ("task.scaling", {"peft_config": PeftConfig("LORA", 4, 130, ("query", "value"), use_rslora=True)}),
    ("task.virtual_tokens", {"peft_config": PeftConfig("PROMPT_TUNING", 0, 0, (), num_virtual_tokens=129)}),
    ("rank_pattern", {"peft_config": PeftConfig("LORA", 2, 4, ("query",), (("query", 1),))}),
    ("feedforward_modules", {"peft_config": PeftConfig("IA3", 0, 0, ("key",), feedforward_modules=("query",))}),
    ("target_modules", {"peft_config": PeftConfig("IA3", 0, 0, ("nothing",))}),
    ("target_modules", {"peft_config": PeftConfig("LN_TUNING", 0, 0, ("encoder",))}),
    ("target_modules", {"peft_config": PeftConfig("LN_TUNING", 0, 0, ("word_embeddings",))}),
    ("target_modules", {"peft_config": PeftConfig("BEFT", 0, 0, ("LayerNorm",))}),
    ("num_virtual_tokens", {"peft_config": PeftConfig("PREFIX_TUNING", 0, 0, (), num_virtual_tokens=3)}),
    ("plan.layout", {"peft_config": PeftConfig("IA3", 0, 0, ("key",))}),
]
EXTRA: list[dict[str, Any]] = [  # a configuration that says more than can be trained
    {"peft_type": "ADAPTION_PROMPT"},
    {"modules_to_save": ["encoder"]},
    {"inference_mode": True},
    {"init_lora_weights": "pissa"},
    {"megatron_core": "os"},
    {"target_modules": "all-linear"},
]


def test_training_beyond_the_owners_limits_is_refused_before_an_example_is_read(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.node.training.parse_examples", lambda *_: pytest.fail("an example was read"))
    task, session = talk.coordinator.settings.task(talk.version().manifest), talk.established()
    tasks = [(about, replace(task, **changes).encode()) for about, changes in REFUSED]
    for changes in EXTRA:
        wrong = json.loads(task.encode())
        wrong["peft_config"] |= changes
        tasks.append((f"task.peft_config.{next(iter(changes))}", jsontext.encode(wrong)))
    for about, training in tasks:
        _, plans = talk.plan(session, training=training)
        talk.refused(FIRST, Step.PLAN, {BODY: plans[FIRST], ADAPTER: talk.adapter}, about)


def test_an_adapter_of_numbers_that_are_too_large_or_too_many_is_refused_before_an_example_is_read(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.node.training.parse_examples", lambda *_: pytest.fail("an example was read"))
    tensors, session = talk.coordinator.registry.tensors(0), talk.established()
    name = max(tensors)
    blob = files.encode({**tensors, name: np.full_like(tensors[name], -1000.5)})
    _, plans = talk.plan(session, adapter_digest=files.sha256(blob))
    talk.refused(FIRST, Step.PLAN, {BODY: plans[FIRST], ADAPTER: blob}, "adapter.magnitude")
    with (talk.fleet.state_dir(FIRST).folder / SETTINGS).open("a") as settings:
        settings.write(f"maximum_parameters = {sum(tensor.size for tensor in tensors.values()) - 1}\n")
    _, plans = talk.plan(session)
    talk.refused(FIRST, Step.PLAN, {BODY: plans[FIRST], ADAPTER: talk.adapter}, "adapter.parameters")


# A device keeps the states of the texts that it trains on, encrypted, and computes again what it cannot read.
SOURCE = "a" * 64


def compute(texts: list[Sequence[int]]) -> list[Floats]:
    return [np.full((len(text), 4), 0.7, np.float32) for text in texts]


def fails(texts: list[Sequence[int]]) -> list[Floats]:
    raise AssertionError(texts)


@pytest.fixture
def device(tmp_path: Path) -> DeviceStateDir:
    entropy = SystemEntropy()
    made = DeviceStateDir.create(tmp_path, DeviceSettings(base="x"), IdentityKey.generate(entropy), {}, entropy)
    cache = StateCache(1 << 20, source=SOURCE)
    made.states().load(cache)
    cache.rows([[1, 2], [3]], compute)
    made.states().save(cache)
    return made


def loaded(device: DeviceStateDir, source: str = SOURCE) -> StateCache:
    cache = StateCache(1 << 20, source=source)
    device.states().load(cache)
    return cache


def test_states_are_kept_encrypted_until_the_device_forgets(device: DeviceStateDir) -> None:
    (row,) = loaded(device).rows([[3]], fails)
    np.testing.assert_array_equal(row, compute([[3]])[0])
    assert np.full(4, 0.7, np.float32).tobytes() not in (device.folder / STATES).read_bytes()
    device.forget()
    assert not (device.folder / STATES).exists()
    with pytest.raises(AssertionError):
        loaded(device).rows([[3]], fails)


def test_those_of_a_text_that_was_not_trained_on_again_are_gone(device: DeviceStateDir) -> None:
    cache = loaded(device)
    cache.rows([[3]], fails)
    device.states().save(cache)
    assert len(loaded(device).rows([[3]], fails)) == 1
    with pytest.raises(AssertionError):
        loaded(device).rows([[1, 2]], fails)


@pytest.mark.parametrize("damage", ["source", "byte", "key", "end"])
def test_what_cannot_be_read_or_is_of_another_base_is_computed_again(device: DeviceStateDir, damage: str) -> None:
    file = device.folder / STATES
    content = bytearray(file.read_bytes())
    if damage == "byte":
        content[-1] ^= 1
    if damage == "key":
        (device.folder / SEALING_KEY).write_bytes(bytes(32))
    file.write_bytes(content[: 40 if damage == "end" else None])
    cache = loaded(device, "b" * 64 if damage == "source" else SOURCE)
    assert len(cache.rows([[3]], compute)) == 1
    with pytest.raises(AssertionError):
        cache.rows([[1, 2]], fails)


@pytest.mark.parametrize("talk", [{"adapter": {"layers": 1}}], indirect=True)
def test_the_next_training_of_a_device_computes_no_states(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, states = list[Sequence[int]](), FrozenLayers.states

    def counted(self: FrozenLayers, tokens: Sequence[Sequence[int]]) -> list[Floats]:
        texts.extend(tokens)
        return states(self, tokens)

    monkeypatch.setattr(FrozenLayers, "states", counted)
    for asked in range(2):
        _, plans = talk.plan(talk.established())
        talk.ask(FIRST, Step.PLAN, plans[FIRST], adapter=talk.adapter)
        assert (talk.fleet.out / "devices" / FIRST / STATES).exists()
        assert bool(texts) is not bool(asked)
        texts.clear()
