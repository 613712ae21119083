"""A device whose certificate is revoked while its SuperNode stays connected to a real SuperLink.

Flower knows the SuperNode by another key, and goes on to deliver its messages. The coordinator keeps the device out,
from the next session on. In the session that it has joined it stays to the end (docs/explanation/threat-model.md).
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from adapters.roundrecord import RoundRecord
from coordinator.statedir import CoordinatorStateDir
from tests.support.trial import AUTHORITY, COORDINATOR, call, make_trial_fleet

pytestmark = pytest.mark.slow

DEVICES = ("garage", "hall", "kitchen", "office")
REVOKED = "office"  # after round 1 of a session of two
PHRASES = [("Light", "turn on the light"), ("Music", "play music"), ("Timer", "set a timer")]
EXAMPLES = [
    ("kitchen light off", 0, "train"),
    ("play the song", 1, "train"),
    ("ten minutes", 2, "train"),
    ("make it bright", 0, "validation"),
]
RUN = 540  # seconds, on busy cores


@dataclass(frozen=True)
class Outcome:
    """The rounds, the log of the run, and the messages that the revoked device's SuperNode got."""

    rounds: tuple[RoundRecord, ...]
    log: str
    received: int


@pytest.fixture(scope="module")
def outcome(
    deployment: Any, tmp_path_factory: pytest.TempPathFactory, make_base: Callable[..., Any]
) -> Iterator[Outcome]:
    out, base = tmp_path_factory.mktemp("fleet"), make_base(tmp_path_factory.mktemp("base"))
    settings = ("rounds=3", "deadline=240", "attempts=1", "aggregation.session_rounds=2")
    make_trial_fleet(out, str(base.folder), PHRASES, dict.fromkeys(DEVICES, EXAMPLES), *settings, rank=2)
    for device in DEVICES:
        deployment.add_node(device, out / device)
    deployment.wait_for_nodes()
    opened = CoordinatorStateDir.open(out / COORDINATOR)
    run = deployment.begin(opened.folder)
    deployment.wait("round 1", lambda: len(opened.registry.rounds()) == 1, seconds=RUN)
    call("authority", "revoke", out / AUTHORITY, REVOKED)
    shutil.copy(out / AUTHORITY / "revoked.crl", opened.folder / "revoked.crl")
    log = deployment.finish(run, seconds=RUN)
    yield Outcome(opened.registry.rounds(), log, deployment.log(REVOKED).count("Receiving: "))
    opened.registry.close()


def test_a_device_that_is_revoked_stays_in_its_session_and_is_in_no_later_one(outcome: Outcome) -> None:
    others = set(DEVICES) - {REVOKED}
    assert [set(record.survivors) for record in outcome.rounds] == [set(DEVICES), set(DEVICES), others]


def test_its_node_is_asked_again_and_not_admitted(outcome: Outcome) -> None:
    """So it is not Flower that keeps it out: it got the check-in of the second session as well."""
    assert f"is not admitted: certificate of {REVOKED} is revoked" in outcome.log
    session, round_ = 3, 3
    assert outcome.received == session + 2 * round_ + 1
