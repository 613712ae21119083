"""A federation over one gateway: light devices in Python, and tabs of Chromium that contribute given updates."""

import base64
import contextlib
import json
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
from aggregation.pki.identity import PublicKey
from aggregation.steps import Step
from client.browser.server import Site, http_server
from coordinator.gateway.grid import GatewayGrid
from coordinator.gateway.server import GatewayLimits
from coordinator.gateway.websocket import BrowserSettings
from coordinator.statedir import CoordinatorStateDir
from simulations.engine.provision import AUTHORITY, AUTHORITY_KEY
from tests.support import cdp
from tests.support.gateway import HOST, attending, authority_of, give_tls, server_tls
from tests.support.hostile import audit_failures

GENERATE = """(async () => {
  const pair = await crypto.subtle.generateKey("Ed25519", false, ["sign", "verify"]);
  const publicKey = new Uint8Array(await crypto.subtle.exportKey("raw", pair.publicKey));
  globalThis.own = { key: pair.privateKey, publicKey };
  return btoa(String.fromCharCode(...publicKey));
})()"""
TAKE_PART = """(async (given) => {
  const load = (name) => import(`/aggregation/${name}.js`);
  const [{ Root }, { Device }, { Policy }] = await Promise.all([load("certificates"), load("device"), load("policy")]);
  const [{ Participant }, { attend, nodeOf }] = await Promise.all([load("participant"), load("websocket")]);
  const { contribution, requireBounds } = await load("contribution");
  const bytes = (base64) => Uint8Array.from(atob(base64), (sign) => sign.charCodeAt(0));
  const [root, policy] = [await Root.open(bytes(given.root)), new Policy(given.policy)];
  const known = { root, policy, certificate: bytes(given.certificate), coordinator: bytes(given.coordinator) };
  const delta = Float64Array.from({ length: given.size }, (_, i) => given.update * Math.sin(i));
  globalThis.plans = 0;
  const train = (plan, spec) => {
    requireBounds(spec, given.size);
    globalThis.plans++;
    return contribution({ delta, examples: 3, score: { correct: 1, loss: 2.5, count: 2 } }, spec, plan.adapter_digest);
  };
  const device = new Device({ ...globalThis.own, ...known });
  const participant = new Participant(device, train, await nodeOf(given.name), { quantum: 0 });
  globalThis.states = [];
  globalThis.leaving = new AbortController();
  const shown = ({ state, step }) => states.push(step ?? state);
  globalThis.attending = attend({ device, participant, url: given.url, signal: leaving.signal, shown })
    .then(() => "left", (error) => error.message);
})"""


@dataclass
class Tab:
    """A device in a tab."""

    page: cdp.Page
    name: str

    def take_part(self, fleet: Any, page_url: str, gateway: str) -> None:
        """Certify the device with a key that never leaves the tab, and connect it."""
        state_dir = fleet.state_dir(self.name)
        self.page.goto(page_url)
        key = PublicKey(base64.b64decode(self.page.evaluate(GENERATE)))
        authority = Authority.from_pem((fleet.out / AUTHORITY / AUTHORITY_KEY).read_bytes())
        begin = datetime.now(UTC) - timedelta(hours=1)
        certificate = authority.issue(self.name, key, not_before=begin, not_after=authority.root.not_after)
        given = {
            "name": self.name,
            "certificate": base64.b64encode(certificate).decode(),
            "root": base64.b64encode(authority.root.der).decode(),
            "coordinator": base64.b64encode(state_dir.coordinator.raw).decode(),
            "policy": {"known_bases": [state_dir.base().digest], "minimum_cohort": 3, "minimum_survivors": 2},
            "size": fleet.registry().newest_adapter().layout.size,
            "update": 1e-3,
            "url": gateway,
        }
        self.page.evaluate(f"{TAKE_PART}({json.dumps(given)})")


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
def page_of(bundle: Path, libraries: None) -> Iterator[Callable[[str], str]]:
    """Serves a page that may connect to a gateway; returns its URL."""
    running = []

    def serve(gateway: str) -> str:
        running.append(http_server(Site.of(bundle, gateway=gateway), HOST, 0))
        threading.Thread(target=running[-1].serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return f"http://{HOST}:{running[-1].server_port}/"

    yield serve
    for serving in running:
        serving.shutdown()
        serving.server_close()


@pytest.mark.slow
def test_two_light_devices_and_two_tabs_train_an_adapter_over_one_gateway(
    fleet_of: Callable[..., Any], page_of: Callable[[str], str], tabs: list[cdp.Page]
) -> None:
    """In the third round, which is of a second session, one tab is closed after its device has shared its secrets."""
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
        for page, name in zip(tabs, names[2:], strict=True):
            Tab(page, name).take_part(fleet, url, grid.browsers.url)
        grid.await_devices(4)
        records = fleet.federate(grid)
        assert tabs[0].evaluate("globalThis.plans") == 3
        assert {step.value for step in Step} <= set(tabs[0].evaluate("globalThis.states"))
    assert [record.version for record in records] == [1, 2, 3]
    assert [record.survivors for record in records] == [tuple(names), tuple(names), tuple(names[:3])]
    assert records[2].dropped == {names[3]: "plan"}
    tabs[0].until("states.at(-1) === 'away'")
    tabs[0].evaluate("leaving.abort()")
    assert tabs[0].evaluate("attending") == "left"
    assert audit_failures(fleet.out) == set()
    state_dir.registry.close()
