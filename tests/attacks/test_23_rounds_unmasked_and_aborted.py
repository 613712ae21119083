"""Unmask a round, log it as aborted, and repeat it from the same adapter without the victim.

The coordinator withholds the unmask responses of the first round from its log, so that no result follows from the log;
it has the sum all the same. The sum of the second round is published. Their difference is the victim's update, as far
as the other devices trained alike. Devices refuse this (``test_15_difference_of_sums.py``); here they do not, as those
whose owners forgot what they knew of the coordinator. An audit allows a few repeats, since an honest coordinator makes
them after a failure; it names the rounds and the devices that are in one of the sums only. Without that check it says
nothing about them.
"""

import json
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from flwr.app import Context, Error, Message

from aggregation import envelope
from aggregation.messages import UnmaskResponse
from aggregation.spec import Adversary, SessionSpec
from aggregation.steps import BODY, RECORD, Step
from aggregation.transcript.entries import Result, read
from client.node import adapterstate
from client.node.app import app as client_app
from client.node.statedir import SETTINGS as DEVICE_SETTINGS
from coordinator.statedir import CoordinatorStateDir
from coordinator.transcripts import Recorder
from edgeadapt import program
from edgeadapt.auditing import Check, Finding, Status, history, rules
from edgeadapt.auditing.transcripts import VECTORS, logs, vector_path
from edgeadapt.auditing.weaknesses import RepeatedSums
from tests.support import FleetOf
from tests.support.hostile import plans_for_anyone
from tests.support.subtracting import any_set

pytestmark = pytest.mark.usefixtures("by_bytes_only")
Run = Callable[[Path], tuple[int, dict[str, Any], str]]
DEVICES, VICTIM = 5, "device-02"


@pytest.fixture(autouse=True)
def _sums_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapterstate, "on_survivors", any_set)
    plans_for_anyone(monkeypatch)


class Withholding:
    """The real devices. The coordinator keeps their responses to the first unmask requests out of its log."""

    def __init__(self, victim: int, kept: int = 1) -> None:
        self.victim, self.kept = victim, kept
        self.withheld: dict[str, UnmaskResponse] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        step, group = Step(message.metadata.message_type.partition(".")[2]), message.metadata.group_id
        if (step, group, context.node_id) == (Step.PLAN, "2", self.victim):
            return Message(Error(7, "not asked"), reply_to=message)
        reply = client_app(message, context)
        if (step, group) != (Step.UNMASK, "1"):
            return reply
        body = reply.content.config_records[RECORD][BODY]
        response = UnmaskResponse.decode(envelope.unverified_body(body))  # type: ignore[arg-type]
        self.withheld[response.device] = response
        return reply if len(self.withheld) <= self.kept else Message(Error(7, "withheld"), reply_to=message)


@pytest.fixture(params=[1, 2], ids=["two sessions", "one session"])
def attacked(request: pytest.FixtureRequest, app_fleet_of: FleetOf) -> tuple[Path, Withholding]:
    """A run whose coordinator attacks the victim, and what it withheld."""
    settings = {"aggregation__session_rounds": request.param, "aggregation__keep_masked_inputs": True}
    fleet = app_fleet_of(DEVICES, rounds=2, **settings)
    app = Withholding(fleet.node(VICTIM))
    first, second = fleet.federate(fleet.grid(app=app))
    assert first.aborted
    assert VICTIM not in second.survivors
    return fleet.out, app


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The real command: exit code, JSON, and what it prints for people."""

    def call(out: Path) -> tuple[int, dict[str, Any], str]:
        printed = []
        for options in ([], ["--json"]):
            monkeypatch.setattr(sys, "argv", ["edgeadapt", "audit", "verify", str(out), *options])
            with pytest.raises(SystemExit) as caught:
                program.main()
            printed.append(capsys.readouterr().out)
        return int(caught.value.code or 0), json.loads(printed[1]), " ".join(printed[0].split())

    return call


def repeats(printed: dict[str, Any]) -> list[dict[str, Any]]:
    return [check for each in printed["sessions"] for check in each["checks"] if check["check"] == "repeats"]


def mean_of_aborted(out: Path, withheld: dict[str, UnmaskResponse]) -> Any:
    """The mean of the first round, from the log and what the coordinator kept out of it."""
    state_dir = CoordinatorStateDir.open(out / "coordinator")
    path = logs(out / "coordinator" / "transcript")[0]
    entries, key = read(path.read_bytes()).entries, state_dir.key.public
    logged = history.begin(entries, state_dir.root, key)
    history.follow(logged, entries, history.verify(logged, entries, key), key)
    current = logged.rounds[0]
    current.responses.update(withheld)
    assert logged.session is not None
    unmasked = rules._recover(logged.session, logged, current)
    folder = path.parent / VECTORS
    rules._recompute(logged, current, unmasked, lambda digest, _: vector_path(folder, digest).read_bytes())
    assert unmasked.sums is not None
    (one,) = unmasked.sums
    return one.values["delta"] / one.values["weight"][0]


def test_an_audit_names_the_aborted_round_and_who_is_in_one_sum_only_and_without_the_check_it_does_not(
    attacked: tuple[Path, Withholding], audited: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, app = attacked
    assert 0 < np.linalg.norm(mean_of_aborted(out, app.withheld)) < 12  # the largest norm of an update
    code, printed, text = audited(out)
    assert (code, printed["ok"]) == (0, True)
    found = repeats(printed)
    assert {check["status"] for check in found} == {"warning"}
    assert found[-1]["about"] == "round.repeated"
    assert f"with 1 device ({VICTIM}) in one of the two" in found[-1]["text"]
    assert f"round 1 has no result, and its sum could be unmasked, over {DEVICES} devices" in text
    rounds = [each for session in printed["sessions"] for each in session["rounds"]]
    assert {*rounds[0]["unmasked"]} - {*rounds[1]["unmasked"]} == {VICTIM}
    assert [each["result"] is None for each in rounds] == [True, False]
    assert rounds[0]["adapter"] == rounds[1]["adapter"]

    silent = Finding(Check.REPEATS, Status.PASS, "")
    monkeypatch.setattr(RepeatedSums, "check", lambda self, log, rounds: silent)
    code, _, text = audited(out)
    assert code == 0
    assert "unmasked" not in text
    assert VICTIM not in text


class Silent(Withholding):
    """As ``Withholding``, and one device is not asked to unmask: it will not miss its signature in the log."""

    def __init__(self, victim: int, unasked: int) -> None:
        super().__init__(victim, kept=0)
        self.unasked = unasked

    def __call__(self, message: Message, context: Context) -> Message:
        step, group = Step(message.metadata.message_type.partition(".")[2]), message.metadata.group_id
        if (step, group, context.node_id) == (Step.UNMASK, "1", self.unasked):
            return Message(Error(7, "not asked"), reply_to=message)
        return super().__call__(message, context)


def keep_out_of_the_log(monkeypatch: pytest.MonkeyPatch, forgotten: Sequence[str]) -> None:
    """Of round 1: the unmask request, and the consistency signatures of these devices."""
    sent, received = Recorder.sent, Recorder.received

    def send(recorder: Recorder, step: Step, bodies: Any) -> None:
        if (step, recorder.log.round) != (Step.UNMASK, 1):
            sent(recorder, step, bodies)

    def receive(recorder: Recorder, step: Step, device: str, body: bytes) -> None:
        if (step, recorder.log.round) != (Step.SURVIVORS, 1) or device not in forgotten:
            received(recorder, step, device, body)

    monkeypatch.setattr(Recorder, "sent", send)
    monkeypatch.setattr(Recorder, "received", receive)


def only_a_quorum_counts(spec: SessionSpec, current: history.Round) -> tuple[str, ...]:
    """The rule that the attack was made for."""
    known = isinstance(current.ending, Result) or current.unmasks or current.responses
    return current.survivors if known or len(current.signed) >= spec.quorum else ()


def test_signatures_that_are_kept_out_of_the_log_hide_nothing(
    app_fleet_of: FleetOf, audited: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody misses two of them: that of the victim, which is not asked again, and of a device that was not asked."""
    keep_out_of_the_log(monkeypatch, [VICTIM, "device-03"])
    fleet = app_fleet_of(DEVICES, rounds=2, aggregation__keep_masked_inputs=True)
    app = Silent(fleet.node(VICTIM), fleet.node("device-03"))
    first, second = fleet.federate(fleet.grid(app=app))
    assert first.aborted
    assert len(second.survivors) == DEVICES - 1
    assert 0 < np.linalg.norm(mean_of_aborted(fleet.out, app.withheld)) < 12
    code, printed, _ = audited(fleet.out)
    (found,) = repeats(printed)
    assert (code, found["status"], found["about"]) == (0, "warning", "round.repeated")
    assert f"with 1 device ({VICTIM}) in one of the two" in found["text"]
    monkeypatch.setattr(rules, "unmasked", only_a_quorum_counts)
    code, printed, _ = audited(fleet.out)
    assert (code, [each["status"] for each in repeats(printed)]) == (0, ["pass"])


@pytest.mark.parametrize("adversary", Adversary)
def test_an_unmask_request_that_is_kept_out_of_the_log_hides_nothing(
    app_fleet_of: FleetOf, audited: Run, monkeypatch: pytest.MonkeyPatch, adversary: Adversary
) -> None:
    """What comes before the request is in the log: a device that was asked continues only if it is."""
    keep_out_of_the_log(monkeypatch, ())
    fleet = app_fleet_of(DEVICES, rounds=2, aggregation__adversary=adversary.value)
    for state_dir in fleet.nodes.values():
        path = Path(state_dir) / DEVICE_SETTINGS
        settings = tomllib.loads(path.read_text())
        settings["policy"]["adversaries"] = [each.value for each in Adversary]
        path.write_text(tomli_w.dumps(settings))
    app = Withholding(fleet.node(VICTIM), kept=0)
    first, second = fleet.federate(fleet.grid(app=app))
    assert first.aborted
    assert len(second.survivors) == DEVICES - 1
    (path,) = logs(fleet.out / "coordinator" / "transcript")
    assert {entry.kind for entry in read(path.read_bytes()).entries if entry.round == 1}.isdisjoint(
        {"unmask", Result.TAG}
    )
    code, printed, _ = audited(fleet.out)
    (found,) = repeats(printed)
    assert (code, found["status"], found["about"]) == (0, "warning", "round.repeated")
    assert VICTIM in found["text"]
