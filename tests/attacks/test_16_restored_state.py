"""A device whose state directory is restored from a backup answers a plan twice, under the same masks, or deals its
shares twice, encrypted under the same keys and nonces.

The difference of two masked inputs is that of the two updates, in clear: all of it, if the device trained on other
examples the second time. The device runs the real ClientApp in a session of the real ServerApp; the attacker keeps its
device's answers, and restores what it likes. No log has the second answers, so an audit passes with and without the
checks: only the device can refuse.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from flwr.app import Context, Message

from aggregation import envelope, masks, ring, sharing
from aggregation.entropy import SystemEntropy
from aggregation.messages import Shares
from aggregation.ring import Ring
from aggregation.steps import BODY, RECORD, Step
from client.node import app as device_app
from client.node import step as device_step
from client.node.snapshot import Snapshot
from client.node.statedir import EXAMPLES, SNAPSHOT, DeviceStateDir
from client.training.examples import Example, write_examples
from tests.support import FleetOf
from tests.support.hostile import audit_failures

VICTIM = "device-00"
OTHER_EXAMPLES = [Example("play music", 1), Example("stop the music", 1), Example("ten minutes", 2)]


class Rewinding:
    """The devices' app. The victim's state directory is copied before each ``step``, for the attacker to restore."""

    def __init__(self, fleet: Any, step: Step) -> None:
        self.step = step
        self.out: Path = fleet.out
        self.folder: Path = fleet.state_dir(VICTIM).folder
        self.backups: list[Path] = []
        self.asked: list[tuple[Message, Context]] = []
        self.answers: list[bytes] = []
        self.spec: Any = None
        self.last: Any = None

    def __call__(self, message: Message, context: Context) -> Message:
        mine = Path(str(context.node_config[device_app.STATE])) == self.folder
        if mine and message.metadata.message_type == self.step.message_type:
            backup = self.folder.with_name(f"{VICTIM}.{len(self.backups)}")
            shutil.copytree(self.folder, backup)
            self.backups.append(backup)
            self.asked.append((message, context))
            answer = self.answer(len(self.asked) - 1)
            assert answer is not None
            self.answers.append(answer)
            state: Any = DeviceStateDir.open(self.folder).load_state()
            self.spec = getattr(state, "ready", state).session.spec.vector
            return self.last
        return device_app.app(message, context)

    def restore(self, number: int, *names: str) -> None:
        """Restore from the backup before plan ``number`` the named files; without names, everything."""
        backup = self.backups[number]
        if not names:
            shutil.rmtree(self.folder)
            shutil.copytree(backup, self.folder)
        for name in names:
            shutil.copy(backup / name, self.folder / name)

    def answer(self, number: int) -> bytes | None:
        """The victim's answer to plan ``number``, as it is asked now; None if it refuses."""
        message, context = self.asked[number]
        self.last = device_app.app(message, context)
        return None if self.last.has_error() else bytes(self.last.content.config_records[RECORD][BODY])

    def difference(self, first: bytes, second: bytes) -> Ring:
        """First answer minus second, in steps of the ring."""
        size, bits = self.spec.size, self.spec.ring_bits
        packed = [raw[: ring.packed_size(size, bits)] for raw in (first, second)]
        one, other = (ring.unpack(raw, size, bits).astype(np.int64) for raw in packed)
        return np.asarray((one - other) % 2**bits)


def attacked(app_fleet_of: FleetOf, step: Step = Step.PLAN) -> Rewinding:
    """After a session of two rounds, and one of one."""
    fleet = app_fleet_of(5, rounds=3, aggregation__session_rounds=2)
    attack = Rewinding(fleet, step)
    fleet.federate(fleet.grid(app=attack))
    return attack


@pytest.fixture
def attack(app_fleet_of: FleetOf) -> Rewinding:
    return attacked(app_fleet_of)


def test_a_restored_device_answers_byte_for_byte_as_before_also_with_other_examples(attack: Rewinding) -> None:
    assert [(backup / SNAPSHOT).exists() for backup in attack.backups] == [True, True, True]
    assert not (attack.folder / SNAPSHOT).exists()  # after the last round of a session
    for number in (0, 1, 0):
        attack.restore(number)
        assert attack.answer(number) == attack.answers[number]
    attack.restore(0)
    write_examples(attack.folder / EXAMPLES, OTHER_EXAMPLES)
    assert attack.answer(0) == attack.answers[0]
    attack.restore(0)
    (attack.folder / EXAMPLES).unlink()
    assert attack.answer(0) == attack.answers[0]
    assert not audit_failures(attack.out)


def test_without_the_snapshot_the_difference_of_two_answers_is_that_of_two_updates(
    attack: Rewinding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it was: the device trains on the examples that its file has now."""
    plain: list[Ring] = []
    contribute = device_step.contribute

    def trained(*given: Any) -> Any:
        vector, parts = contribute(*given)
        plain.append(vector.copy())
        return vector, parts

    monkeypatch.setattr(device_step, "contribute", trained)
    load = DeviceStateDir.load_snapshot

    def current(state_dir: DeviceStateDir, share_key: bytes) -> Snapshot:
        return Snapshot(load(state_dir, share_key).secret, (attack.folder / EXAMPLES).read_bytes())

    monkeypatch.setattr(DeviceStateDir, "load_snapshot", current)
    attack.restore(0)
    first = attack.answer(0)
    attack.restore(0)
    write_examples(attack.folder / EXAMPLES, OTHER_EXAMPLES)
    second = attack.answer(0)
    assert first is not None
    assert second is not None
    bits = attack.spec.ring_bits
    updates = (plain[0].astype(np.int64) - plain[1].astype(np.int64)) % 2**bits
    assert np.count_nonzero(updates) > 10
    assert np.array_equal(attack.difference(first, second), updates)
    assert not audit_failures(attack.out)


def test_the_snapshot_of_another_session_is_refused_before_anything_is_answered(attack: Rewinding) -> None:
    """The third plan is of another session than the first."""
    for names in ((SNAPSHOT,), (SNAPSHOT, EXAMPLES)):
        attack.restore(0)
        attack.restore(2, *names)
        assert attack.answer(0) is None


def test_a_snapshot_that_opens_in_any_session_gives_a_second_answer(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal, open_ = Snapshot.seal, Snapshot.open
    monkeypatch.setattr(Snapshot, "seal", lambda snapshot, key, share_key: seal(snapshot, key, bytes(32)))
    monkeypatch.setattr(Snapshot, "open", lambda raw, key, share_key: open_(raw, key, bytes(32)))
    attack = attacked(app_fleet_of)
    attack.restore(0)
    attack.restore(2, SNAPSHOT)
    second = attack.answer(0)
    assert second is not None
    assert np.count_nonzero(attack.difference(attack.answers[0], second)) > 10


def test_a_restored_device_deals_its_shares_byte_for_byte_as_before(app_fleet_of: FleetOf) -> None:
    attack = attacked(app_fleet_of, Step.ROSTER)
    assert len(attack.answers) == 2
    for number, answer in enumerate(attack.answers):
        attack.restore(number)
        assert attack.answer(number) == answer


def test_shares_that_are_dealt_anew_show_their_difference(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_step, "_dealing", lambda joined, roster: SystemEntropy())
    attack = attacked(app_fleet_of, Step.ROSTER)
    attack.restore(0)
    second = attack.answer(0)
    assert second is not None
    dealt = [Shares.decode(envelope.unverified_body(raw)) for raw in (attack.answers[0], second)]
    joined: Any = DeviceStateDir.open(attack.backups[0]).load_state()
    ready: Any = DeviceStateDir.open(attack.folder).load_state()
    holder = next(iter(dealt[0].encrypted_shares))
    private = masks.private_key(joined.share_key)
    key = sharing._key(ready.session, private, ready.session.peers[holder].share_key, VICTIM, holder)
    sent = [shares.encrypted_shares[holder].ciphertext for shares in dealt]
    plain = [AESGCM(key).decrypt(bytes(12), each, ready.session.context) for each in sent]
    assert plain[0] != plain[1]
    assert xor(*plain) == xor(*sent)[: len(plain[0])]


def xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))
