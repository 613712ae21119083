"""What a session trains on: fixed when the device joins, opened in that session only, and repeated by nothing else."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from aggregation import sealed
from aggregation.entropy import SystemEntropy
from aggregation.errors import TrustError
from aggregation.messages import Plan
from aggregation.pki.identity import IdentityKey
from client.node.snapshot import Draw, Snapshot
from client.node.statedir import SEALING_KEY, SNAPSHOT, DeviceSettings, DeviceStateDir
from tests.support import refused

KEY, JOIN, OTHER_JOIN = bytes(32), bytes([1]) * 32, bytes([2]) * 32
SNAP = Snapshot(bytes([3]) * 32, b'{"text": "the code of the safe is 4711", "label": 0}\n')
PLAN = Plan(bytes(32), 1, ("a", "b"), 4, "ab" * 32, b"task")


@pytest.fixture
def state_dir(tmp_path: Path) -> DeviceStateDir:
    identity = IdentityKey.generate(SystemEntropy())
    return DeviceStateDir.create(tmp_path / "state", DeviceSettings(base="some_base"), identity, {}, SystemEntropy())


@pytest.mark.parametrize("examples", [b"", SNAP.examples, bytes(range(256)) * 1000])
def test_a_snapshot_opens_as_it_was_sealed(examples: bytes) -> None:
    snapshot = replace(SNAP, examples=examples)
    assert Snapshot.open(snapshot.seal(KEY, JOIN), KEY, JOIN) == snapshot


def test_a_snapshot_of_another_join_or_device_is_refused() -> None:
    raw = SNAP.seal(KEY, JOIN)
    for key, join in ((KEY, OTHER_JOIN), (bytes([9]) * 32, JOIN)):
        with refused(TrustError, "sealed.ciphertext"):
            Snapshot.open(raw, key, join)


def test_a_damaged_snapshot_is_refused() -> None:
    raw = SNAP.seal(KEY, JOIN)
    damaged = [b"", raw[:5], raw[:-1], raw + b"\0"]
    damaged += [raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :] for i in (0, 25, 60)]
    for content in damaged:
        with pytest.raises(TrustError):
            Snapshot.open(content, KEY, JOIN)


def test_neither_a_session_state_nor_other_sealed_bytes_open_as_a_snapshot() -> None:
    with refused(TrustError, "sealed.ciphertext"):
        Snapshot.open(sealed.encrypt(b"anything", KEY, b"edgeadapt/state/1\0"), KEY, JOIN)


def test_a_sealed_snapshot_and_its_text_form_show_no_example() -> None:
    assert b"4711" not in SNAP.seal(KEY, JOIN)
    assert SNAP.seal(KEY, JOIN) != SNAP.seal(KEY, JOIN)
    assert "4711" not in repr(SNAP)


def test_equal_plans_draw_the_same_and_any_other_plan_or_secret_draws_something_else() -> None:
    def first(snapshot: Snapshot, plan: Plan, draw: Draw = Draw.ORDER) -> float:
        return float(snapshot.generator(plan, draw).random())

    assert first(SNAP, PLAN) == first(SNAP, PLAN)
    changes = (
        {"round": 2},
        {"members": ("a", "b", "c")},
        {"adapter_version": 5},
        {"adapter_digest": "cd" * 32},
        {"training": b"another"},
    )
    draws = [first(SNAP, PLAN), first(SNAP, PLAN, Draw.ROUNDING), first(replace(SNAP, secret=KEY), PLAN)]
    draws += [first(SNAP, replace(PLAN, **change)) for change in changes]
    assert len(set(draws)) == len(draws)


def test_a_round_draws_the_same_from_every_snapshot_that_is_not_of_a_later_one() -> None:
    plans = [replace(PLAN, round=number) for number in (1, 2, 3, 4)]
    keys = [SNAP.key(plan, Draw.NOISE) for plan in plans]
    assert len({*keys}) == 4
    later = SNAP.since(2).since(3)
    assert later == SNAP.since(3)
    assert [later.key(plan, Draw.NOISE) for plan in plans[2:]] == keys[2:]
    assert SNAP.secret not in (SNAP.since(2).secret, later.secret)
    for plan in plans[:2]:
        with refused(TrustError, "snapshot.round"):
            later.key(plan, Draw.NOISE)


def test_each_session_has_a_secret_of_its_own_and_a_copy_of_the_device_has_another(
    state_dir: DeviceStateDir, tmp_path: Path
) -> None:
    copy = DeviceStateDir.open(shutil.copytree(state_dir.folder, tmp_path / "copy"))
    secrets = set[bytes]()
    for number in range(5):
        for opened in (state_dir, copy):
            opened.take_snapshot(SNAP.examples, bytes([number]) * 32)
            secrets.add(opened.load_snapshot(bytes([number]) * 32).secret)
    assert len(secrets) == 10


def test_a_missing_snapshot_is_named(state_dir: DeviceStateDir) -> None:
    state_dir.take_snapshot(b"", JOIN)
    state_dir.delete_snapshot()
    with refused(TrustError, SNAPSHOT):
        state_dir.load_snapshot(JOIN)


def test_a_snapshot_that_is_refused_is_named_with_its_file(state_dir: DeviceStateDir) -> None:
    state_dir.take_snapshot(b"", JOIN)
    (state_dir.folder / SEALING_KEY).write_bytes(KEY)
    with refused(TrustError, "sealed.ciphertext") as caught:
        state_dir.load_snapshot(JOIN)
    assert str(state_dir.folder / SNAPSHOT) in str(caught.value)
