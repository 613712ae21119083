"""Drives Chromium over the Chrome DevTools Protocol, as far as the page's tests and measurements need it."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60  # seconds; the machine of a test run may be busy
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),  # a camera that shows a moving disc
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0"),
    *(
        "--enable-unsafe-webgpu",
        "--use-webgpu-adapter=swiftshader",
    ),  # emulated, so the page uses it only when it is asked to
)


def installed() -> str | None:
    """The browser's program, if there is one on the path."""
    return next((program for name in NAMES if (program := shutil.which(name))), None)


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

    def cpu_seconds(self) -> float:
        """Processor time that the browser and all its processes have used; Linux only."""
        return sum(self._ticks().values()) / os.sysconf("SC_CLK_TCK")

    def peak_mebibytes(self) -> int:
        """The most memory that one of its processes had, such as that of a page; Linux only."""
        peaks = [0]
        for pid in self._ticks():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                peaks += [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
        return max(peaks) // 1024

    def _ticks(self) -> dict[int, int]:
        """The browser's processes, and the processor time of each."""
        found = {}  # process → (parent, ticks)
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                found[int(path.parent.name)] = (int(fields[1]), int(fields[11]) + int(fields[12]))
        ours = {self._process.pid}
        while more := {pid for pid, (parent, _) in found.items() if parent in ours} - ours:
            ours |= more
        return {pid: found[pid][1] for pid in ours & found.keys()}

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
    """A tab in a browser context of its own, with its own storage."""

    def __init__(self, browser: Chromium) -> None:
        self._browser = browser
        self._context = browser.call("Target.createBrowserContext")["browserContextId"]
        self.open()

    def open(self) -> None:
        """A new tab in the same context: what a person does who closed it."""
        browser = self._browser
        self._target = browser.call("Target.createTarget", url="about:blank", browserContextId=self._context)[
            "targetId"
        ]
        browser.events.clear()
        self._session = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "DOM"):
            self.call(f"{domain}.enable")
        self.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=True, flatten=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def goto(self, url: str) -> None:
        """Open the page, and wait until it has opened its bundle or shows an error."""
        self.call("Page.navigate", url=url)
        self.until("document.documentElement?.dataset.ready === 'yes'")

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", "failed"))
        return answer["result"].get("value")

    def error(self, expression: str) -> dict[str, str]:
        """The ``name``, ``message`` and ``about`` of the error of a promise that must fail."""
        caught = "({ name, message, about }) => ({ name, message, about })"
        found = self.evaluate(f"({expression}).then(() => null, {caught})")
        assert found is not None, f"{expression} did not fail"
        return dict(found)

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

    def alert(self, name: str) -> str:
        """The error that is shown in the alert of this id."""
        return str(self.evaluate(f"document.getElementById({name!r}).textContent"))

    def press(self, *keys: str, control: bool = False) -> None:
        """Press keys one after the other where the focus is: characters, or names such as Enter and ArrowDown."""
        for key in keys:
            text = {"Enter": "\r", " ": " "}.get(key, key if len(key) == 1 else "")
            code = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "ArrowDown": 40}.get(key, 0)
            event = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 2 if control else 0}
            self.call("Input.dispatchKeyEvent", type="keyDown", text="" if control else text, **event)
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def pick(self, selector: str, *files: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def go_offline(self) -> None:
        """Cut the page and its workers off."""
        workers = [event for event in self._browser.events if event["method"] == "Target.attachedToTarget"]
        conditions = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        for session in (self._session, *(event["params"]["sessionId"] for event in workers)):
            with contextlib.suppress(RuntimeError):  # a worker of a page before
                self._browser.call("Network.emulateNetworkConditions", session, **conditions)

    def requests(self) -> list[str]:
        """The URL of every request of the page and its workers."""
        events = [event for event in self._browser.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in events]

    def errors(self) -> list[str]:
        thrown = [event for event in self._browser.events if event["method"] == "Runtime.exceptionThrown"]
        return [event["params"]["exceptionDetails"]["text"] for event in thrown]

    def shut(self) -> None:
        """Close the tab, not its context: what it stored stays."""
        self._browser.call("Target.closeTarget", targetId=self._target)

    def close(self) -> None:
        self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)
