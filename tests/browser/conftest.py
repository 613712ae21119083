"""A real Chromium, driven over its own protocol (CDP), and the tiny bases of the exporter's tests.

The browser is found as ``chromium`` on the path. Without it, or without the page's libraries, these tests are
skipped; with EDGEADAPT_REQUIRE_BROWSER=1, as in CI, they fail.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

from client.web import LIBRARIES, VENDOR, Site, server

_EXPORT = Path(__file__).parents[1] / "export"
_SHARED = {
    _EXPORT / "conftest.py": ("tiny_base", "model", "exported", "vendor", "household", "source", "bundle"),
    _EXPORT / "causal" / "conftest.py": ("make_lm", "llama", "drawn"),
}
for _number, (_path, _names) in enumerate(_SHARED.items()):
    _spec = importlib.util.spec_from_file_location(f"tiny_base_fixtures_{_number}", _path)
    assert _spec is not None
    assert _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
    globals().update({_name: getattr(_module, _name) for _name in _names})

REQUIRED = os.environ.get("EDGEADAPT_REQUIRE_BROWSER") == "1"
PATIENCE = 60  # seconds; the machine of a test run may be busy
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0"),
)


def need(what: Any, how: str) -> None:
    if not what:
        pytest.fail(how) if REQUIRED else pytest.skip(how)


@pytest.fixture(scope="session")
def libraries() -> None:
    need(all((LIBRARIES / path).is_file() for path in VENDOR.values()), "npm ci --prefix client/web has not run")


@pytest.fixture(scope="session")
def node(libraries: None) -> str:
    program = shutil.which("node")
    need(program, "no node on the path: apt install nodejs")
    return str(program)


class Chromium:
    """One browser process and one connection to it. Not for use from several threads."""

    def __init__(self, program: str, profile: Path) -> None:
        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port, path = self._address(profile / "DevToolsActivePort")
        self._socket = connect(f"ws://127.0.0.1:{port}{path}", max_size=None, compression=None)
        self._ids = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def _address(self, file: Path) -> list[str]:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                if len(lines := file.read_text().split("\n")) >= 2:
                    return lines[:2]
            time.sleep(0.05)
        raise RuntimeError("chromium did not start")

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=PATIENCE))
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            if "method" in answer:
                self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if event["method"] == "Target.attachedToTarget":  # a worker: listen to it before its first request
            session = event["params"]["sessionId"]
            for method in ("Network.enable", "Runtime.runIfWaitingForDebugger"):
                message = {"id": next(self._ids), "method": method, "sessionId": session}
                self._socket.send(json.dumps(message))

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.call("Browser.close")
        self._socket.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Page:
    """A tab in a browser context of its own, so with storage of its own."""

    def __init__(self, browser: Chromium) -> None:
        self._browser = browser
        self._context = browser.call("Target.createBrowserContext")["browserContextId"]
        target = browser.call("Target.createTarget", url="about:blank", browserContextId=self._context)["targetId"]
        browser.events.clear()
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "DOM"):
            self.call(f"{domain}.enable")
        self.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=True, flatten=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def goto(self, url: str) -> None:
        """Open the page and wait until it has opened its bundle, or said why it cannot."""
        self.call("Page.navigate", url=url)
        self.until("document.documentElement?.dataset.ready === 'yes'")

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", "failed"))
        return answer["result"].get("value")

    def until(self, condition: str) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self.evaluate(condition):
                return
            time.sleep(0.02)
        raise TimeoutError(f"{condition}; the page says: {self.status()}")

    def status(self) -> str:
        return str(self.evaluate("document.getElementById('status').textContent"))

    def state(self) -> str:
        return str(self.evaluate("document.getElementById('status').dataset.state"))

    def pick(self, selector: str, *files: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def requests(self) -> list[str]:
        """The address of every request of the page and its workers so far."""
        events = [event for event in self._browser.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in events]

    def errors(self) -> list[str]:
        """What the page threw and nobody caught."""
        thrown = [event for event in self._browser.events if event["method"] == "Runtime.exceptionThrown"]
        return [event["params"]["exceptionDetails"]["text"] for event in thrown]

    def close(self) -> None:
        self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory, libraries: None) -> Iterator[Chromium]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    need(program, "no chromium on the path: apt install chromium")
    browser = Chromium(str(program), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(chromium: Chromium) -> Iterator[Page]:
    tab = Page(chromium)
    yield tab
    tab.close()


Serve = Callable[[Path], str]


@pytest.fixture
def serve(libraries: None) -> Iterator[Serve]:
    """Serves a bundle, with trust.pem beside it; returns the address of its page."""
    running = []

    def start(bundle: Path) -> str:
        serving = server(Site.of(bundle), "127.0.0.1", 0)
        running.append(serving)
        threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return f"http://127.0.0.1:{serving.server_port}/"

    yield start
    for serving in running:
        serving.shutdown()
        serving.server_close()
