"""The operator's page in a real Chromium, served by the real command, while rounds are made."""

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from coordinator.dashboard.server import TOKEN
from coordinator.health import FAILURES
from coordinator.runstate import Ending, Need
from coordinator.services.deployment import RUNNING
from coordinator.statedir import SERVICES_LOCK, CoordinatorStateDir
from edgeadapt.formats import storage
from edgeadapt.formats.keyfiles import TLS_CERTIFICATE
from edgeadapt.releases.actions import GateResult, action_path
from edgeadapt.releases.repository import ChannelRepository
from edgeadapt.releases.rollback import note_evaluation, prepare
from edgeadapt.releases.verdict import JudgedEvaluation, verdict
from tests.support import FleetOf
from tests.support.gateway import HOST, authority_of, certify, free_port, wait_until

pytestmark = pytest.mark.slow

ROWS = "document.querySelectorAll('#rounds tbody tr').length"
READY = "document.documentElement?.dataset.ready === 'yes'"


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health") as answer:  # noqa: S310
            return bool(answer.read() == b"ok\n")
    except urllib.error.URLError:
        return False


@contextmanager
def dashboard(folder: Path, *words: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    url = f"http://{HOST}:{free_port()}"
    command = [sys.executable, "-m", "edgeadapt", "coordinator", "dashboard", str(folder), "--listen", url[7:]]
    command += map(str, words)
    served = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: answers(url) or served.poll() is not None, 120)
        yield url, served
    finally:
        served.kill()
        served.wait()


def test_an_operator_logs_in_and_sees_rounds_as_they_end(fleet_of: FleetOf, page: Any) -> None:
    fleet = fleet_of(5, rounds=3)
    folder = fleet.out / "coordinator"
    soon = datetime.now(UTC) + timedelta(hours=5)
    _, certificate = certify(authority_of(fleet), not_after=soon)
    (folder / TLS_CERTIFICATE).write_bytes(certificate)
    with dashboard(folder) as (url, served):
        page.call("Page.navigate", url=url)
        page.until("document.getElementById('token') !== null")
        page.evaluate("document.getElementById('token').value = 'wrong'; document.forms[0].submit()")
        page.until("document.querySelector('[role=alert]')?.textContent === 'This is not the token.'")
        token = (folder / TOKEN).read_text().strip()
        page.evaluate(f"document.getElementById('token').value = {token!r}; document.forms[0].submit()")
        page.until(READY)
        assert page.evaluate(ROWS) == 0
        said = page.evaluate("document.getElementById('answers').innerText")
        assert said.startswith("Is it learning?\nNot yet: no run has begun. There is no version of a round yet.")
        ending = page.evaluate("document.getElementById('expiries').innerText")
        assert ending.startswith(f"tls.pem ends on {soon:%F}, in 0 days: renew it")
        page.evaluate("window.opened = true")
        fleet.federate(fleet.grid(forced_dropouts=1))
        page.until(f"{ROWS} === 3")
        assert page.evaluate("window.opened"), "the page was not loaded again"
        tiles = page.evaluate("document.getElementById('tiles').innerText")
        assert "3 of 3" in tiles
        said = page.evaluate("document.getElementById('answers').innerText")
        assert "It has ended: all rounds are done. The newest version is 3 (round 3, 20" in said
        assert re.search(r"What does it cost a device\?\n\d+ kB up and \d+ kB down a round, which takes \d+ s", said)
        assert page.evaluate("document.querySelectorAll('#accuracy ellipse').length") == 3
        assert page.evaluate("document.querySelectorAll('#dropouts rect').length") == 3
        text = page.evaluate("document.body.innerText")
        state_dir = CoordinatorStateDir.open(folder)
        names = state_dir.registry.rounds()[0].survivors
        state_dir.registry.close()
        assert not [name for name in names if name in text], "no device is named"
        assert page.errors() == []
        served.terminate()
        _, said = served.communicate(timeout=60)
        assert served.returncode == 143
        assert said.splitlines()[0] == f"{url}/: log in with the token in {folder / TOKEN}"
        assert len(said.splitlines()) == 2, "an open stream ends without an error"
        page.until("document.getElementById('live').textContent.startsWith('no connection')")


def test_an_operator_with_a_telephone_sees_that_a_fleet_is_down_why_devices_refuse_and_no_broken_word(
    fleet_of: FleetOf, page: Any
) -> None:
    folder = fleet_of(3).out / "coordinator"
    state_dir = CoordinatorStateDir.open(folder)
    run, limit = state_dir.run, "cohort of 3 is below this device's minimum of 8"
    with storage.locked(folder / SERVICES_LOCK), dashboard(folder) as (url, _):
        services = [{"name": "superlink", "state": "ready", "address": "fleet.example:8000", "restarts": 0, "pid": 1}]
        row = {"pid": 1, "since": "2026-12-01T08:00:00Z", "stop": 1.0, "services": services}
        (folder / RUNNING).write_text(json.dumps(row))
        page.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=False)
        page.call("Page.navigate", url=url)
        page.until("document.getElementById('token') !== null")
        token = (folder / TOKEN).read_text().strip()
        page.evaluate(f"document.getElementById('token').value = {token!r}; document.forms[0].submit()")
        page.until(READY)
        said = "document.getElementById('answers').innerText"
        with state_dir.leading():
            run.waits(Need.SESSION, 4, 3, 2, 20)
            run.refused("offer", "", f"kitchen: {limit}", limit)
            page.until(f"{said}.includes('4 devices are there, 3 are needed')")
            page.until(f"{said}.includes({f'refused 1 × at offer, the last one: “{limit}”'!r})")
        lines = (
            "[...document.querySelectorAll('#services :is(th, td)')].map(each => each.getClientRects().length && each)"
        )
        tall = f"{lines}.filter(each => each.offsetHeight > 40).map(each => each.innerText)"
        assert page.evaluate(tall) == [], "each cell is one line"
        assert page.evaluate("document.documentElement.scrollWidth <= 390"), "nothing is cut off at the side"
        for _ in range(FAILURES):
            run.ended(Ending.FAILED, "kitchen is away")
        page.until(f"{said}.startsWith('Is it learning?\\nNo: 3 runs in a row failed')")
        assert "What to do?" in page.evaluate(said)
        assert "kitchen" not in page.evaluate("document.body.innerText")
        assert page.errors() == []
    state_dir.registry.close()


def test_an_operator_sees_a_rollout_its_gates_and_a_log_that_was_altered(
    fleet_of: FleetOf, page: Any, phone: Path, vendor: IdentityKey, tmp_path: Path
) -> None:
    folder = fleet_of(5).out / "coordinator"
    releases = ChannelRepository.create(
        tmp_path / "releases", SystemEntropy(), datetime(2026, 11, 27, 9, 30, tzinfo=UTC), by="ada"
    )
    made = releases.publish("canary", phone, [vendor.public]).release
    passed = GateResult("accuracy of global", True, 0.91, 0.9, "0.9100, at least 0.9000: <b>91</b> of 100 right")
    worse = GateResult("canaries of global", False, 0.5, 1.0, "0.5000, at least 1.0000")
    releases.promote("canary", 1, "stable", [passed])
    releases.promote("canary", 1, "stable", [passed], share=10, languages=["de"])
    prepare(releases, "stable", vendor, 0.01)
    figures = {"deviation": 0.0, "accuracy_newest": 0.9, "examples_newest": 128.0}
    figures |= {"accuracy_previous": 0.88, "examples_previous": 128.0}
    judged = verdict(figures, 0.01)
    assert judged is not None
    found = JudgedEvaluation(7, "a" * 64, 12, "global", "b" * 64, "c" * 64, figures, judged, worse=False)
    note_evaluation(releases, "stable", found)
    releases.refuse("canary", made, "stable", [passed, worse])
    with dashboard(folder, "--channels", releases.folder) as (url, _):
        page.call("Page.navigate", url=url)
        page.until("document.getElementById('token') !== null")
        token = (folder / TOKEN).read_text().strip()
        page.evaluate(f"document.getElementById('token').value = {token!r}; document.forms[0].submit()")
        page.until(READY)
        (canary, stable) = page.evaluate("[...document.querySelectorAll('#channels tbody tr')].map(r => r.innerText)")
        seen = re.sub(r"\s+", " ", canary)
        assert seen == "canary 1 global 3 all devices 2026-11-27 09:30 ada: published none asked none"
        assert "round 7: not shown to be worse: difference +0.0200" in stable
        assert "of stable better?\nnot shown to be worse" in page.evaluate(
            "document.getElementById('answers').innerText"
        )
        assert "rollback to release 1 prepared" in stable
        assert "10 % of devices with language de; release 1 for the others" in stable
        assert "ada: promoted from canary" in stable
        assert "release 1 of canary refused, tried by ada" in stable
        assert "REFUSED canaries of global: 0.5000, at least 1.0000" in stable
        page.evaluate("document.querySelector('#channels summary').click()")
        (figure,) = page.evaluate("[...document.querySelectorAll('#channels details li')].map(li => li.innerText)")
        assert figure == "passed accuracy of global: 0.9100, at least 0.9000: <b>91</b> of 100 right"
        releases.set_rollout("stable", 50)
        page.until("document.querySelector('#channels').innerText.includes('50 % of devices; release 1')")
        action_path(releases.folder, 2).unlink()
        releases.renew()
        page.until("!document.getElementById('channels-problem').hidden")
        assert "2.json" in page.evaluate("document.getElementById('channels-problem').textContent")
        assert page.evaluate("document.querySelectorAll('#channels tbody tr').length") == 0
        assert page.errors() == []
