"""A kill at any instant of a round's end: the next start makes registry and log agree, and the audit passes.

The whole fleet is copied at each instant, as a power cut would leave it, and goes on from the copy.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Error, Message

from aggregation import envelope
from aggregation.errors import TrustError
from aggregation.steps import Step
from aggregation.transcript.entries import Result, read
from client.node.app import app as client_app
from coordinator.registry import Registry
from coordinator.statedir import CoordinatorStateDir
from coordinator.transcripts import Recorder
from edgeadapt.auditing import AuditInput, AuditOptions
from edgeadapt.auditing.transcripts import logs
from tests.support import FleetOf
from tests.support.hostile import continues_from_anything

KILLED = "2"  # the round
INSTANTS = [
    "before the registry",
    "after the registry",
    "in the ending",
    "after the ending",
    "in the checkpoint",
    "after the checkpoint",
]


@pytest.fixture(params=[False, True], ids=["result", "abort"])
def aborted(request: pytest.FixtureRequest) -> bool:
    """Whether the round ends without a result."""
    return bool(request.param)


@pytest.fixture
def copies(
    app_fleet_of: FleetOf, tmp_path: Path, aborted: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Callable[[str], Path]]:
    """A fleet, and its folder as it was at an instant of the end of the second of three rounds."""
    fleet = app_fleet_of(4, rounds=3, aggregation__keep_masked_inputs=True)
    folder, write = tmp_path / "copies", Recorder.write
    store = "record_round" if aborted else "commit_round"
    publish = getattr(Registry, store)

    def copy(instant: str) -> None:
        shutil.copytree(fleet.out, folder / instant)

    def publishing(self: Registry, record: Any, *args: Any) -> Any:
        if str(record.round) != KILLED:
            return publish(self, record, *args)
        copy(INSTANTS[0])
        stored = publish(self, record, *args)
        copy(INSTANTS[1])
        return stored

    def writing(self: Recorder, records: bytes, *, sync: bool = False) -> None:
        if sync and (folder / INSTANTS[1]).exists() and not (folder / INSTANTS[-1]).exists():
            size, length = self.path.stat().st_size, 4 + int.from_bytes(records[:4], "big")
            for instant, end in zip(INSTANTS[2:5], (length // 2, length, length + 50), strict=True):
                write(self, records[:end])
                copy(instant)
                self.path.write_bytes(self.path.read_bytes()[:size])
            write(self, records)
            copy(INSTANTS[-1])
        else:
            write(self, records, sync=sync)

    with monkeypatch.context() as patch:
        patch.setattr(Registry, store, publishing)
        patch.setattr(Recorder, "write", writing)
        fleet.federate(fleet.grid(app=withholding if aborted else client_app))
    return fleet, lambda instant: folder / instant


def withholding(message: Message, context: Context) -> Message:
    """The real devices; in one round the updates are lost, so that it is aborted."""
    answer = client_app(message, context)
    lost = message.metadata.group_id == KILLED and message.metadata.message_type.endswith(Step.PLAN.value)
    return Message(Error(7, "lost"), reply_to=message) if lost else answer


def test_a_kill_at_any_instant_leaves_what_the_next_start_completes(
    copies: tuple[Any, Callable[[str], Path]], aborted: bool
) -> None:
    fleet, copy = copies
    for instant in INSTANTS:
        shutil.rmtree(fleet.out)
        shutil.copytree(copy(instant), fleet.out)
        done = len(fleet.registry().rounds())
        assert done == (1 if instant == INSTANTS[0] else 2)
        records = fleet.federate(fleet.grid())
        assert [record.aborted is None for record in records] == [True, not aborted or done == 1, True]
        published = [version.manifest.id for version in fleet.registry().versions()]
        assert logged(fleet.out) == published[1:]
        checked = AuditInput.open(fleet.out, AuditOptions())
        checked.require(checked.audit(unfinished=False), unfinished=False)


@pytest.mark.parametrize("aborted", [False], indirect=True)
def test_a_start_that_completes_nothing_leaves_a_version_that_no_log_made(
    copies: tuple[Any, Callable[[str], Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, copy = copies
    shutil.rmtree(fleet.out)
    shutil.copytree(copy(INSTANTS[1]), fleet.out)
    continues_from_anything(monkeypatch)
    CoordinatorStateDir.open(fleet.out / "coordinator").transcripts.finish()
    checked = AuditInput.open(fleet.out, AuditOptions())
    with pytest.raises(TrustError):
        checked.require(checked.audit(unfinished=False), unfinished=False)


def logged(out: Path) -> list[tuple[int, str]]:
    """The adapters of the results in all logs, in order."""
    paths = logs(out / "coordinator" / "transcript")
    entries = [entry for path in paths for entry in read(path.read_bytes()).entries]
    return [
        Result.decode(envelope.unverified_body(entry.message)).produced for entry in entries if entry.kind == Result.TAG
    ]
