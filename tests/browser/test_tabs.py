"""A federation with devices in Python and in tabs of a real Chromium, which contribute given updates."""

import base64
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from aggregation.pki import Authority
from aggregation.pki.identity import PublicKey
from aggregation.steps import Step
from client.browser.server import Site
from simulations.engine.provision import AUTHORITY, AUTHORITY_KEY
from tests.support import cdp
from tests.support.bridge import NODE, Bridge
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
  const [{ Participant }, { connect }] = await Promise.all([load("participant"), load("bridge")]);
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
  connect(new Participant(new Device({ ...globalThis.own, ...known }), train, BigInt(given.node)), given.url);
  return true;
})"""


@dataclass
class Tab:
    """A device in a tab."""

    page: cdp.Page
    node: int

    def take_part(self, fleet: Any, bridge: Bridge, name: str) -> None:
        """Enrol the device with a key that never leaves the tab, and connect it."""
        page, state_dir = self.page, fleet.state_dir(name)
        page.goto(bridge.url)
        key = PublicKey(base64.b64decode(page.evaluate(GENERATE)))
        authority = Authority.from_pem((fleet.out / AUTHORITY / AUTHORITY_KEY).read_bytes())
        begin = datetime.now(UTC) - timedelta(hours=1)
        certificate = authority.issue(name, key, not_before=begin, not_after=authority.root.not_after)
        given = {
            "certificate": base64.b64encode(certificate).decode(),
            "root": base64.b64encode(authority.root.der).decode(),
            "coordinator": base64.b64encode(state_dir.coordinator.raw).decode(),
            "policy": {"known_bases": [state_dir.base().digest], "minimum_cohort": 3, "minimum_survivors": 2},
            "size": fleet.registry().newest_adapter().layout.size,
            "update": 1e-3,
            "node": str(self.node),
            "url": f"{bridge.url.replace('http', 'ws', 1)}{NODE.removeprefix('/')}{self.node}",
        }
        assert page.evaluate(f"{TAKE_PART}({json.dumps(given)})")
        bridge.wait_for(self.node)


@pytest.fixture
def bridge(bundle: Path, libraries: None) -> Iterator[Bridge]:
    running = Bridge(Site.of(bundle))
    yield running
    running.close()


@pytest.fixture
def tabs(chromium: Any) -> Iterator[list[cdp.Page]]:
    pages = [cdp.Page(chromium), cdp.Page(chromium)]
    yield pages
    for page in pages:
        page.close()


@pytest.mark.slow
def test_two_devices_and_two_tabs_train_an_adapter(
    fleet_of: Callable[..., Any], bridge: Bridge, tabs: list[cdp.Page]
) -> None:
    """In the third round, which is of a second session, one tab is closed after its device has shared its secrets."""
    fleet = fleet_of(4, rounds=3, aggregation__session_rounds=2)
    names = sorted(Path(state_dir).name for state_dir in fleet.nodes.values())
    for page, name in zip(tabs, names[2:], strict=True):
        Tab(page, fleet.node(name)).take_part(fleet, bridge, name)
    gone = fleet.node(names[3])
    plans = itertools.count(1)

    def closing(message: Message, context: Context) -> Message:
        if (context.node_id, message.metadata.message_type) == (gone, Step.PLAN.message_type) and next(plans) == 3:
            tabs.pop().close()
            bridge.tabs[gone].wait_closed()
        return bridge(message, context)

    records = fleet.federate(fleet.grid(app=closing))
    assert [record.version for record in records] == [1, 2, 3]
    assert [record.survivors for record in records] == [tuple(names), tuple(names), tuple(names[:3])]
    assert records[2].dropped == {names[3]: "plan"}
    assert tabs[0].evaluate("globalThis.plans") == 3
    assert {step for node, step in bridge.asked if node == gone} == {step.value for step in Step}
    assert audit_failures(fleet.out) == set()
