"""The operator's page in a real Chromium, served by the real command, while rounds are made."""

import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.dashboard.server import TOKEN
from coordinator.statedir import CoordinatorStateDir
from tests.support.gateway import HOST, free_port, wait_until

pytestmark = pytest.mark.slow

ROWS = "document.querySelectorAll('#rounds tbody tr').length"
READY = "document.documentElement?.dataset.ready === 'yes'"


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health") as answer:  # noqa: S310
            return bool(answer.read() == b"ok\n")
    except urllib.error.URLError:
        return False


def test_an_operator_logs_in_and_sees_rounds_as_they_end(fleet_of: Callable[..., Any], page: Any) -> None:
    fleet = fleet_of(5, rounds=3)
    folder, url = fleet.out / "coordinator", f"http://{HOST}:{free_port()}"
    command = [sys.executable, "-m", "edgeadapt", "coordinator", "dashboard", str(folder), "--listen", url[7:]]
    served = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: answers(url) or served.poll() is not None, 120)
        page.call("Page.navigate", url=url)
        page.until("document.getElementById('token') !== null")
        page.evaluate("document.getElementById('token').value = 'wrong'; document.forms[0].submit()")
        page.until("document.querySelector('[role=alert]')?.textContent === 'This is not the token.'")
        token = (folder / TOKEN).read_text().strip()
        page.evaluate(f"document.getElementById('token').value = {token!r}; document.forms[0].submit()")
        page.until(READY)
        assert page.evaluate(ROWS) == 0
        page.evaluate("window.opened = true")
        fleet.federate(fleet.grid(forced_dropouts=1))
        page.until(f"{ROWS} === 3")
        assert page.evaluate("window.opened"), "the page was not loaded again"
        tiles = page.evaluate("document.getElementById('tiles').innerText")
        assert "3 of 3" in tiles
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
    finally:
        served.kill()
        served.wait()
