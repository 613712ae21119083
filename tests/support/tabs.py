"""Devices in tabs of Chromium, which are driven by their view as a person does."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority
from aggregation.pki.certificates import to_pem
from aggregation.pki.identity import PublicKey
from aggregation.pki.requests import read_request
from client.browser.server import Site, http_server
from edgeadapt.authority import AuthorityStore
from edgeadapt.formats.gateway.invitation import Invitation
from tests.support import cdp
from tests.support.gateway import HOST, authority_of, wait_until

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
    url: str  # of its page

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

    def redeem(self, fleet: Any, store: AuthorityStore) -> None:
        """Enrol with a token, which works once."""
        self.page.goto(self.url)
        self.until_shown("token-form")
        anchors = store.root.der, fleet.state_dir(self.name).coordinator.raw
        invitation = Invitation(SystemEntropy().bytes(16), self.name, f"{HOST}:1", f"{HOST}:2", *anchors)
        store.invite(self.name, invitation.key.public, 1.0)
        self.fill(token=invitation.to_text())
        self.click("redeem")
        self.until_shown("join-form")

    def enrol(self, fleet: Any) -> None:
        """Make a key that never leaves the tab, and have it certified; a wrong file is refused, and nothing is lost."""
        authority, coordinator = authority_of(fleet), fleet.state_dir(self.name).coordinator
        pins = self.file("authority.pem", authority.root.to_pem()), self.file("coordinator.pem", coordinator.to_pem())
        self.page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(self.folder))
        self.page.goto(self.url)
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
        self.page.goto(self.url)  # the key is kept
        self.until_shown("certificate-form")
        self.page.pick("#certificate-file", self.certified(authority, self.name, key))
        self.click("certificate-install")
        self.until_shown("join-form")
        assert coordinator.key_id in self.page.alert("identity")

    def take_part(self, examples: Path, **conditions: float) -> None:
        """Take part with these examples, once there are as many as the conditions demand."""
        self.page.evaluate(OBSERVE)
        self.page.pick("#examples-file", examples)
        self.fill(**CONDITIONS, **conditions, **{"minimum-examples": 1000})
        assert "your minimum is 1000" in self.refused("join")
        self.fill(**{"minimum-examples": 1})
        self.click("join")


@contextlib.contextmanager
def served(bundle: Path, **addresses: str) -> Iterator[str]:
    """The URL of a page that may connect to a gateway, and to an enrolment service, while the block runs."""
    with http_server(Site.of(bundle, **addresses), HOST, 0) as serving:
        threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield f"http://{HOST}:{serving.server_port}/"
        finally:
            serving.shutdown()
