"""Transcripts on disk: what a run writes, what a kill can do to it, and how the next start repairs it."""

import hashlib
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from aggregation import envelope
from aggregation.entropy import SystemEntropy
from aggregation.errors import TrustError
from aggregation.messages import Assignment, MaskedInput, Plan
from aggregation.pki.identity import IdentityKey
from aggregation.steps import Step
from aggregation.transcript.entries import ENTRY, LENGTH, MAGIC, AdapterId, Entry, read
from aggregation.transcript.log import Transcript, resume
from aggregation.transcript.logstate import SESSION_CHAIN_PROOF
from coordinator.registry import Head
from coordinator.statedir import CoordinatorStateDir
from coordinator.transcripts import TORN, Recorder, Transcripts
from edgeadapt.auditing import Report, audit, chain, checkpoints
from edgeadapt.auditing.transcripts import VECTORS, logs, vector_path
from edgeadapt.formats.manifest import RoundRecord, digest_of
from tests.support import FleetOf, refused
from tests.support.fleet import make_fleet

SEED: AdapterId = (0, "ab" * 32)
PLAN = Plan(bytes(32), 1, ("a", "b"), 0, "ab" * 32, b"")
INTERRUPTED = ["offer", "checkpoint", "assignment", "abort", "checkpoint", "checkpoint"]


@pytest.fixture(scope="module")
def offer() -> tuple[bytes, bytes]:
    """Digest and bytes of an offer of the small fleet of tests/aggregation."""
    offering, raw = make_fleet(3).offer()
    return offering.offer, raw


@pytest.fixture
def transcripts(tmp_path: Path) -> Transcripts:
    fleet = make_fleet(3)
    return Transcripts(tmp_path / "transcript", fleet.key, fleet.authority.root, False, Known())


@pytest.fixture
def _one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal logs have equal bytes, whenever the second one is written."""
    monkeypatch.setattr(Recorder, "now", lambda self: 1_770_000_000)


@dataclass
class Known:
    head: Head = Head(SEED, None, None)  # noqa: RUF009  # frozen

    def __call__(self) -> Head:
        return self.head


def recorded(transcripts: Transcripts, recorder: Recorder, **changes: Any) -> RoundRecord:
    """The registry's record of the round under way, which aborts it unless ``changes`` say more."""
    log = recorder.synced()
    record = RoundRecord(
        round=1,
        previous=None,
        offer=log.offer.hex(),
        plan=log.plan.hex() if log.plan else None,
        entries=log.tree.size,
        root=log.tree.root().hex(),
        survivors=(),
        groups=(),
        dropped={},
        blamed=(),
        reason="unrecoverable",
        aborted="too few good shares",
        spoiled=None,
        sum=None,
        version=None,
        adapter=None,
        optimizer=None,
        bytes_up=1,
        bytes_down=1,
        seconds=1.0,
        epsilon=None,
        metrics={},
    )
    record = replace(record, **changes)
    newest = SEED if record.version is None else (record.version, str(record.adapter))
    assert isinstance(transcripts.head, Known)
    transcripts.head.head = Head(newest, record, digest_of(record.sign(transcripts.key)))
    return record


MADE = {"reason": None, "aborted": None, "survivors": ("a", "b"), "sum": "00" * 32, "version": 1, "adapter": "cd" * 32}


def write(transcripts: Transcripts, offer: tuple[bytes, bytes]) -> Recorder:
    """A session of one round that went no further than its plan."""
    recorder = transcripts.begin(offer[0])
    recorder.sent(Step.OFFER, dict.fromkeys("ab", offer[1]))
    recorder.checkpoint()
    recorder.begin(PLAN)
    recorder.sent(Step.PLAN, dict.fromkeys("ab", envelope.sign(transcripts.key, Assignment(PLAN, {}))))
    return recorder


def kinds(path: Path) -> list[str]:
    reading = read(path.read_bytes())
    assert reading.problem == ""
    return [entry.kind for entry in reading.entries]


def test_a_record_is_on_the_disk_when_the_call_returns(transcripts: Transcripts, offer: tuple[bytes, bytes]) -> None:
    recorder = write(transcripts, offer)
    assert kinds(recorder.path) == ["offer", "checkpoint", "assignment"]
    recorder.received(Step.UNMASK, "a", b"unmask-response")
    assert kinds(recorder.path)[-1] == "unmask-response"


def test_a_round_ends_in_the_log_as_its_record_says(transcripts: Transcripts, offer: tuple[bytes, bytes]) -> None:
    recorder = write(transcripts, offer)
    recorder.end(recorded(transcripts, recorder, **MADE))
    assert kinds(recorder.path)[3:] == ["result", "checkpoint"]
    assert recorder.log.newest == (1, "cd" * 32)


def test_a_round_that_ended_before_its_plan_has_no_ending_in_the_log(
    transcripts: Transcripts, offer: tuple[bytes, bytes]
) -> None:
    recorder = transcripts.begin(offer[0])
    recorder.sent(Step.OFFER, dict.fromkeys("ab", offer[1]))
    recorder.checkpoint()
    recorder.end(recorded(transcripts, recorder))
    transcripts.finish()
    assert kinds(recorder.path) == ["offer", "checkpoint", "checkpoint"]


def test_the_log_of_a_session_is_closed_once_and_named_by_the_next(
    transcripts: Transcripts, offer: tuple[bytes, bytes]
) -> None:
    first = write(transcripts, offer)
    last = transcripts.finish()
    closed = first.path.read_bytes()
    assert transcripts.finish() == last
    assert first.path.read_bytes() == closed
    second = write(transcripts, offer)
    assert second.log.previous == last
    assert [path.name for path in logs(transcripts.folder)] == ["session-000001.log", "session-000002.log"]


@pytest.mark.parametrize("cut", [1, 3, 5, 40])
def test_the_incomplete_record_of_a_killed_run_is_cut_off_and_kept(
    transcripts: Transcripts, offer: tuple[bytes, bytes], cut: int
) -> None:
    killed = write(transcripts, offer)
    complete = killed.path.stat().st_size
    killed.received(Step.UNMASK, "a", bytes(100))
    os.truncate(killed.path, killed.path.stat().st_size - cut)
    torn = killed.path.read_bytes()[complete:]
    write(transcripts, offer)
    assert kinds(killed.path) == INTERRUPTED
    assert killed.path.with_suffix(TORN).read_bytes() == torn


@pytest.mark.parametrize("left", [0, 5, len(MAGIC), len(MAGIC) + 10])
def test_a_log_without_an_entry_after_a_kill_is_not_a_session(
    transcripts: Transcripts, offer: tuple[bytes, bytes], left: int
) -> None:
    first = write(transcripts, offer)
    killed = write(transcripts, offer)
    os.truncate(killed.path, left)
    again = write(transcripts, offer)
    assert again.path == killed.path
    assert again.log.previous == last_checkpoint(transcripts, first)


def last_checkpoint(transcripts: Transcripts, recorder: Recorder) -> bytes:
    return checkpoints(read(recorder.path.read_bytes()), transcripts.key.public)[-1].digest()


def test_a_log_killed_before_its_first_checkpoint_still_names_the_one_before(
    transcripts: Transcripts, offer: tuple[bytes, bytes]
) -> None:
    write(transcripts, offer)
    last = transcripts.finish()
    killed = transcripts.begin(offer[0])
    killed.sent(Step.OFFER, dict.fromkeys("ab", offer[1]))
    transcripts.finish()
    reports = {path.name: report_of(transcripts, path) for path in logs(transcripts.folder)}
    assert list(reports.values())[1].previous == last
    chain(reports)


def report_of(transcripts: Transcripts, path: Path) -> Report:
    return audit(path.read_bytes(), transcripts.root, transcripts.key.public)


def test_a_log_that_was_altered_is_not_signed_again(transcripts: Transcripts, offer: tuple[bytes, bytes]) -> None:
    killed = write(transcripts, offer)
    raw = bytearray(killed.path.read_bytes())
    raw[len(MAGIC) + 60] ^= 1
    killed.path.write_bytes(raw)
    with refused(TrustError, "session-000001.log"):
        transcripts.begin(offer[0])
    assert killed.path.read_bytes() == raw


def test_a_closed_log_that_cannot_be_read_is_not_taken_for_an_incomplete_one(
    transcripts: Transcripts, offer: tuple[bytes, bytes]
) -> None:
    recorder = write(transcripts, offer)
    transcripts.finish()
    sound, at, lengths = recorder.path.read_bytes(), len(MAGIC), list[int]()
    while at < len(sound):
        lengths.append(at)
        at += LENGTH + int.from_bytes(sound[at : at + LENGTH], "big")
    for place in [0, *(start + byte for start in lengths for byte in range(LENGTH))]:
        raw = bytearray(sound)
        raw[place] ^= 1
        recorder.path.write_bytes(raw)
        with refused(TrustError, "session-000001.log"):
            transcripts.begin(offer[0])
        assert recorder.path.read_bytes() == raw


def test_a_copy_of_a_log_is_not_a_session(transcripts: Transcripts, offer: tuple[bytes, bytes]) -> None:
    first = write(transcripts, offer)
    for name in ("session-000001 (copy).log", "session-old.log"):
        (transcripts.folder / name).write_bytes(first.path.read_bytes())
    assert write(transcripts, offer).path.name == "session-000002.log"


def test_vectors_are_kept_by_digest_where_the_settings_ask_for_that(
    transcripts: Transcripts, offer: tuple[bytes, bytes]
) -> None:
    header = MaskedInput(bytes(32), "a", hashlib.sha256(b"vector").digest())
    body = envelope.sign_vector(transcripts.key, header, b"vector")
    for keep in (False, True):
        kept = replace(transcripts, folder=transcripts.folder / str(keep), keep_vectors=keep)
        write(kept, offer).received(Step.PLAN, "a", body)
        path = vector_path(kept.folder / VECTORS, hashlib.sha256(b"vector").digest())
        assert path.exists() == keep
        assert not keep or path.read_bytes() == b"vector"


# What the registry knows


def sizes(path: Path) -> list[int]:
    """Where each record of a log begins, and where the last one ends."""
    raw, at = path.read_bytes(), [len(MAGIC)]
    while at[-1] < len(raw):
        at.append(at[-1] + LENGTH + int.from_bytes(raw[at[-1] : at[-1] + LENGTH], "big"))
    return at


@pytest.mark.usefixtures("_one_second")
@pytest.mark.parametrize("changes", [MADE, {}], ids=["result", "abort"])
def test_an_ending_that_only_the_registry_has_is_added(
    transcripts: Transcripts, offer: tuple[bytes, bytes], changes: dict[str, Any]
) -> None:
    """A kill at any byte between the registry's transaction and the checkpoint after the ending leaves this."""
    recorder = write(transcripts, offer)
    before = recorder.path.stat().st_size
    recorder.end(recorded(transcripts, recorder, **changes))
    whole = recorder.path.read_bytes()
    transcripts.finish()
    closed = recorder.path.read_bytes()
    for size in range(before, len(whole)):
        recorder.path.write_bytes(whole[:size])
        transcripts.finish()
        assert recorder.path.read_bytes() == closed


@pytest.mark.usefixtures("_one_second")
@pytest.mark.parametrize("changes", [MADE, {}], ids=["result", "abort"])
def test_a_log_that_lost_more_than_a_kill_can_take_is_not_signed_again(
    transcripts: Transcripts, offer: tuple[bytes, bytes], changes: dict[str, Any]
) -> None:
    recorder = write(transcripts, offer)
    before = recorder.path.stat().st_size
    recorder.end(recorded(transcripts, recorder, **changes))
    transcripts.finish()
    whole = recorder.path.read_bytes()
    for size in [*sizes(recorder.path), before - 1, before - 100]:
        cut = whole[:size]
        recorder.path.write_bytes(cut)
        if size < before:
            with refused(TrustError, "transcript"):
                transcripts.finish()
            assert recorder.path.read_bytes() == cut
        else:
            transcripts.finish()
            assert recorder.path.read_bytes() == whole


@pytest.mark.parametrize(
    "change",
    [{"sum": "11" * 32}, {"adapter": "ee" * 32}, {"survivors": ("a",)}, {"plan": "11" * 32}, {"root": "11" * 32}],
)
def test_a_log_whose_ending_is_another_than_the_recorded_one_is_not_continued(
    transcripts: Transcripts, offer: tuple[bytes, bytes], change: dict[str, Any]
) -> None:
    recorder = write(transcripts, offer)
    place = {"entries": recorder.log.tree.size, "root": recorder.log.tree.root().hex(), "plan": PLAN.digest().hex()}
    recorder.end(recorded(transcripts, recorder, **MADE))
    recorded(transcripts, recorder, **{**MADE, **place, **change})
    with refused(TrustError, "transcript"):
        transcripts.finish()


def test_a_closed_log_of_an_earlier_session_is_not_closed_again(
    transcripts: Transcripts, offer: tuple[bytes, bytes]
) -> None:
    first = write(transcripts, offer)
    second = write(transcripts, offer)
    os.truncate(first.path, sizes(first.path)[-2])
    with refused(TrustError, "transcript"):
        transcripts.finish()
    assert kinds(first.path) == INTERRUPTED[:-1]
    assert kinds(second.path) == ["offer", "checkpoint", "assignment"]


# A complete run, with the real devices on the in-process grid


def audited(fleet: Any) -> dict[str, Report]:
    folder = fleet.out / "coordinator" / "transcript"
    state_dir = CoordinatorStateDir.open(fleet.out / "coordinator")
    vectors = {bytes.fromhex(path.stem): path.read_bytes() for path in folder.glob(f"{VECTORS}/*.bin")}
    reports = {
        path.name: audit(path.read_bytes(), state_dir.root, state_dir.key.public, lambda digest, _: vectors.get(digest))
        for path in logs(folder)
    }
    chain(reports)
    return reports


def test_a_device_that_names_a_session_too_long_ago_gets_no_receipt_and_stops_nobody(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = fleet_of(3, rounds=3, aggregation__session_rounds=1)
    fleet.federate(fleet.grid())
    state_dir = CoordinatorStateDir.open(fleet.out / "coordinator")
    first, second, third = logs(state_dir.folder / "transcript")
    offers = [resume(read(path.read_bytes()).entries, SEED).offer for path in (first, second)]
    recorder = Recorder(third, Transcript(bytes(32), SEED), state_dir.key)
    named = dict(zip(("device-00", "device-01"), offers, strict=True))

    def with_receipt() -> set[str]:
        proofs = state_dir.transcripts.session_chain_proofs(recorder, named)
        return {device for device, raw in proofs.items() if SESSION_CHAIN_PROOF.decode(raw).receipt}

    assert with_receipt() == {"device-00", "device-01"}
    monkeypatch.setattr("coordinator.transcripts.MAX_SESSIONS", 0)
    assert with_receipt() == {"device-01"}
    state_dir.registry.close()


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b""], ids=["cut in half", "empty"])
def test_an_old_log_that_cannot_be_read_makes_a_claim_unknown_and_stops_nobody(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    fleet = fleet_of(4, rounds=2, aggregation__session_rounds=1)
    fleet.federate(fleet.grid())
    old = logs(fleet.out / "coordinator" / "transcript")[0]
    old.write_bytes(damage(old.read_bytes()))
    genuine = Transcripts.session_chain_proofs

    def claiming(self: Transcripts, recorder: Recorder, last: Any) -> Any:
        return genuine(self, recorder, {**last, "device-00": b"\1" * 32})

    monkeypatch.setattr(Transcripts, "session_chain_proofs", claiming)
    fleet.configure({"rounds": 3})
    assert len(fleet.federate(fleet.grid())[2].survivors) >= 3


def test_zeros_that_a_power_cut_left_in_the_last_answer_are_cut_off_and_not_signed(
    fleet_of: FleetOf,
) -> None:
    from client.node.app import app

    fleet = fleet_of(4, rounds=2)
    kept: dict[str, bytes] = {}

    def copying(message: Any, context: Any) -> Any:
        if message.metadata.message_type.endswith("survivors"):
            kept.setdefault("log", path().read_bytes())
        return app(message, context)

    def path() -> Path:
        return logs(fleet.out / "coordinator" / "transcript")[-1]

    registry = fleet.out / "coordinator" / "registry.db"
    before = registry.read_bytes()
    fleet.federate(fleet.grid(app=copying))
    entries = read(kept["log"]).entries
    last = max(entry.index for entry in entries if entry.kind == MaskedInput.TAG)
    ends = sizes_of(entries)
    zeroed = kept["log"][: ends[last] - 64] + bytes(64)
    assert len(read(zeroed).entries) == last + 1  # it decodes
    path().write_bytes(zeroed)
    registry.write_bytes(before)
    state_dir = CoordinatorStateDir.open(fleet.out / "coordinator")
    state_dir.transcripts.finish()
    state_dir.registry.close()
    assert path().with_suffix(TORN).read_bytes() == zeroed[ends[last - 1] :]
    (report,) = audited(fleet).values()
    assert report.failed == ()


def sizes_of(entries: tuple[Entry, ...]) -> list[int]:
    """Bytes of the log up to the end of each entry."""
    return list(itertools.accumulate((LENGTH + len(ENTRY.encode(each)) for each in entries), initial=len(MAGIC)))[1:]


def test_a_run_that_was_interrupted_in_a_round_leaves_a_closed_log(fleet_of: FleetOf) -> None:
    from client.node.app import app

    fleet = fleet_of(4)

    def stop(message: Any, context: Any) -> Any:
        if "unmask" in message.metadata.message_type:
            raise KeyboardInterrupt
        return app(message, context)

    with pytest.raises(KeyboardInterrupt):
        fleet.federate(fleet.grid(app=stop))
    (report,) = audited(fleet).values()
    assert report.failed == ()
    assert [each.ending for each in report.rounds] == ["aborted (interrupted)"]
    fleet.federate(fleet.grid())
    assert [len(report.rounds) for report in audited(fleet).values()] == [1, 3]


def test_another_key_makes_another_coordinator(transcripts: Transcripts, offer: tuple[bytes, bytes]) -> None:
    write(transcripts, offer)
    stranger = replace(transcripts, key=IdentityKey.generate(SystemEntropy()))
    with refused(TrustError, "session-000001.log"):
        stranger.begin(offer[0])
