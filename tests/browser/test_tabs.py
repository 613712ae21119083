"""A federation over one gateway: light devices in Python, and tabs of Chromium, driven by their view."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from adapters.gateway.websocket import PATH
from aggregation.pki import Authority
from aggregation.pki.certificates import to_pem
from aggregation.pki.identity import PublicKey
from aggregation.pki.requests import read_request
from aggregation.steps import Step
from client.browser.server import Site, http_server
from coordinator.gateway.grid import GatewayGrid
from coordinator.gateway.server import GatewayLimits
from coordinator.gateway.websocket import BrowserSettings
from coordinator.statedir import CoordinatorStateDir
from tests.support import cdp
from tests.support.gateway import HOST, attending, authority_of, give_tls, server_tls, wait_until
from tests.support.hostile import audit_failures

SHOWN = "([...document.querySelectorAll('#participation form')].find((form) => !form.hidden)?.id ?? '')"
STATE = "document.getElementById('join-state').textContent"
AWAY = "This browser does not take part now."
OUTCOMES = "[...document.querySelectorAll('#rounds tr')].map((row) => row.dataset.outcome)"
CONDITIONS = {"minimum_cohort": 3, "minimum_survivors": 2, "answer-quantum": 0}
OBSERVE = """(() => {
  globalThis.states = [];
  const shown = document.getElementById("join-state");
  new MutationObserver(() => states.push(shown.textContent)).observe(shown, { childList: true });
})()"""


@dataclass
class Tab:
    """A device in a tab, driven as a person does."""

    page: cdp.Page
    name: str
    folder: Path  # where the browser puts what it saves

    def click(self, name: str) -> None:
        self.page.evaluate(f"document.getElementById({name!r}).click()")

    def fill(self, **values: object) -> None:
        for name, value in values.items():
            self.page.evaluate(f"document.getElementById({name!r}).value = {str(value)!r}")

    def until_shown(self, form: str) -> None:
        self.page.until(f"{SHOWN} === {form!r} || document.getElementById('join-error').textContent")
        assert self.page.alert("join-error") == ""

    def refused(self, button: str) -> str:
        """The line that is shown after a click."""
        self.click(button)
        self.page.until("document.getElementById('join-error').textContent")
        return self.page.alert("join-error")

    def file(self, name: str, content: bytes) -> Path:
        self.folder.mkdir(exist_ok=True)
        (self.folder / name).write_bytes(content)
        return self.folder / name

    def certified(self, authority: Authority, name: str, key: PublicKey) -> Path:
        begin = datetime.now(UTC) - timedelta(hours=1)
        der = authority.issue(name, key, not_before=begin, not_after=authority.root.not_after)
        return self.file(f"{name}.pem", to_pem(der))

    def enrol(self, fleet: Any, page_url: str) -> None:
        """Make a key that never leaves the tab, and have it certified; a wrong file is refused, and nothing is lost."""
        authority, coordinator = authority_of(fleet), fleet.state_dir(self.name).coordinator
        pins = self.file("authority.pem", authority.root.to_pem()), self.file("coordinator.pem", coordinator.to_pem())
        self.page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(self.folder))
        self.page.goto(page_url)
        self.until_shown("enrol-form")
        self.fill(**{"device-name": self.name})
        self.page.pick("#authority-file", pins[1])
        self.page.pick("#coordinator-file", pins[1])
        assert "not one certificate" in self.refused("enrol")
        self.page.pick("#authority-file", pins[0])
        self.click("enrol")
        self.until_shown("certificate-form")
        request = self.folder / f"{self.name}.csr"
        wait_until(request.exists)
        name, key = read_request(request.read_bytes())
        assert name == self.name
        self.page.pick("#certificate-file", self.certified(authority, "another", key))
        assert "another key or name" in self.refused("certificate-install")
        self.page.goto(page_url)  # the key is kept
        self.until_shown("certificate-form")
        self.page.pick("#certificate-file", self.certified(authority, self.name, key))
        self.click("certificate-install")
        self.until_shown("join-form")
        assert coordinator.key_id in self.page.alert("identity")

    def take_part(self, examples: Path) -> None:
        """Take part with these examples, once there are as many as the conditions demand."""
        self.page.evaluate(OBSERVE)
        self.page.pick("#examples-file", examples)
        self.fill(**CONDITIONS, **{"minimum-examples": 1000})
        assert "your minimum is 1000" in self.refused("join")
        self.fill(**{"minimum-examples": 1})
        self.click("join")


class ClosingGrid(GatewayGrid):
    """Closes a tab when the plans of the third round are about to be sent."""

    tabs: list[cdp.Page]
    plans = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = list(messages)
        self.plans += batch[0].metadata.message_type == Step.PLAN.message_type
        if self.plans == 3 and len(self.tabs) == 2:
            self.tabs.pop().close()
        return super().push_messages(batch)


@pytest.fixture
def tabs(chromium: Any) -> Iterator[list[cdp.Page]]:
    pages = [cdp.Page(chromium), cdp.Page(chromium)]
    yield pages
    for page in pages:
        page.close()


@pytest.fixture
def page_of(phone: Path, libraries: None) -> Iterator[Callable[[str], str]]:
    """Serves a page that may connect to a gateway; returns its URL."""
    running = []

    def serve(gateway: str) -> str:
        running.append(http_server(Site.of(phone, gateway=gateway), HOST, 0))
        threading.Thread(target=running[-1].serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return f"http://{HOST}:{running[-1].server_port}/"

    yield serve
    for serving in running:
        serving.shutdown()
        serving.server_close()


@pytest.mark.slow
def test_two_light_devices_and_two_tabs_train_an_adapter_over_one_gateway(
    fleet_of: Callable[..., Any], page_of: Callable[[str], str], tabs: list[cdp.Page], tmp_path: Path
) -> None:
    """Each trains on its own examples.

    In the third round, which is of a second session, one tab is closed after its device has shared its secrets.
    """
    fleet = fleet_of(4, rounds=3, aggregation__session_rounds=2)
    give_tls(fleet)
    folders = sorted(map(Path, fleet.nodes.values()))
    names = [folder.name for folder in folders]
    state_dir = CoordinatorStateDir.open(fleet.out / "coordinator")
    grid = ClosingGrid(
        *(f"{HOST}:0", server_tls(authority_of(fleet)), state_dir.read_root, GatewayLimits(grace=1.0)),
        browsers=BrowserSettings(f"{HOST}:0"),
    )
    grid.tabs = tabs
    assert grid.browsers is not None
    url = page_of(grid.browsers.url.removesuffix(PATH))
    with contextlib.closing(grid), attending(grid.port, folders[:2]):
        devices = [Tab(page, name, tmp_path / name) for page, name in zip(tabs, names[2:], strict=True)]
        for device in devices:
            device.enrol(fleet, url)
            device.take_part(fleet.state_dir(device.name).examples)
        grid.await_devices(4)
        records = fleet.federate(grid)
    assert [record.version for record in records] == [1, 2, 3]
    assert [record.survivors for record in records] == [tuple(names), tuple(names), tuple(names[:3])]
    assert records[2].dropped == {names[3]: "plan"}
    stays = devices[0]
    stays.page.until(f"{STATE} === {AWAY!r}")
    states = " ".join(stays.page.evaluate("states"))
    assert all(word in states for word in ("Waiting", "training, step 1 of", "masking", "The run is over"))
    assert stays.page.alert("join-error") == ""
    stays.fill(**{"join-when": "open"})
    stays.click("join")
    stays.page.until("!document.getElementById('join-leave').disabled")
    stays.click("join-leave")
    stays.page.until(f"{STATE} === {AWAY!r}")
    stays.page.goto(url)
    stays.until_shown("join-form")
    assert stays.page.evaluate(OUTCOMES) == ["counted"] * 3
    stays.click("identity-forget")
    stays.until_shown("enrol-form")
    assert stays.page.errors() == []
    assert audit_failures(fleet.out) == set()
    state_dir.registry.close()
