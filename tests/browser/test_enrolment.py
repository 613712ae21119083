"""A page enrols with a token, in a real Chromium, at the authority's service, and only with one that is valid."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from aggregation.entropy import SystemEntropy
from aggregation.pki import IdentityKey
from client.browser.server import Site, http_server
from coordinator.gateway.carriers import BrowserSettings
from coordinator.gateway.enrolment import EnrolmentServer, EnrolmentService
from edgeadapt.authority import AuthorityStore
from edgeadapt.authority.store import utc_now
from edgeadapt.formats.gateway.invitation import Invitation
from tests.support import cdp
from tests.support.authority import store
from tests.support.gateway import HOST, free_port, wait_until

__all__ = ["store"]
COORDINATOR = IdentityKey(bytes(range(32))).public
SHORT = 20 / 1440  # days: less than a third of a validity that began an hour before
FACT = "document.getElementById('identity').textContent"
ERROR = "document.getElementById('join-error').textContent"
SHOWN = "[...document.querySelectorAll('#participation form')].filter((form) => !form.hidden).map((form) => form.id)"
FACTS = "[...document.querySelectorAll('#invited dd')].map((each) => each.textContent).join(' ')"

OLDER = """(async () => {
  const { Identity } = await import("/identity.js");
  const { LEARNED, transact } = await import("/storage.js");
  const done = (request) => new Promise((resolve, reject) => {
    [request.onsuccess, request.onerror] = [() => resolve(request.result), () => reject(request.error)];
  });
  const request = indexedDB.open("edgeadapt", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("identities");
  const older = await done(request);
  const pair = await crypto.subtle.generateKey("Ed25519", false, ["sign", "verify"]);
  const store = older.transaction("identities", "readwrite").objectStore("identities");
  await done(store.put({ device: "tab", pair }, "base"));
  older.close();
  const found = await new Identity("base").load();
  const signed = await crypto.subtle.sign("Ed25519", found.pair.privateKey, new Uint8Array(9));
  const holds = await crypto.subtle.verify("Ed25519", pair.publicKey, signed, new Uint8Array(9));
  return [found.device, holds, await transact(LEARNED, ["base"])];
})()"""

ACCOUNTS = """(async () => {
  const modules = ["identity", "aggregation/privacyledger", "aggregation/accounting", "storage", "participation"];
  const [{ Identity }, { EMPTY }, { NOTHING }, { IDENTITIES, transact }, { takePart }] = await Promise.all(
    modules.map((name) => import(`/${name}.js`)),
  );
  const put = (record, key) => transact(IDENTITIES, [], () => [[key, record]]);
  const spent = (each, noisy) => ({ ...EMPTY, settled: { curve: NOTHING.curve.map(() => each), draws: noisy }, noisy });
  const [one, other] = [new Identity("one"), new Identity("other")];
  for (const key of ["one", "other"]) await put({ device: "tab", pair: {} }, key);
  const found = {};
  const privacy = spent(0.5, 10);
  await other.save({ ...(await other.load()), privacy, maximum_epsilon: 2.5 });
  const seen = await one.load();
  found.saved = [seen.privacy.noisy, seen.maximum_epsilon];
  await other.forget();
  await one.forget();
  found.forgotten = [await one.load(), await other.load()].map((each) => each === undefined);
  await put({ device: "tab", pair: {} }, "one");
  found.kept = [(await one.load()).privacy.noisy, (await one.load()).maximum_epsilon];
  const refused = ({ name, about }) => [name, about];
  const asked = { identity: other, examples: [{ text: "", label: "", split: "train" }], minimum: 1 };
  found.another = await navigator.locks.request("edgeadapt/participation", () => takePart(asked).catch(refused));
  found.damaged = [];
  const [lost, negative] = [{ ...privacy, settled: null }, { ...privacy, noisy: -1 }];
  for (const damage of [{ privacy: lost }, { privacy: negative }, { maximum_epsilon: NaN }]) {
    await put({ privacy, maximum_epsilon: 1, ...damage }, "account");
    found.damaged.push(await one.load().catch(refused));
  }
  return found;
})()"""


def invited(store: AuthorityStore, name: str = "tab", ago: float = 0.0) -> Invitation:
    addresses = f"{HOST}:1", f"{HOST}:2,{HOST}:3"  # of devices; the page has its own
    found = Invitation(SystemEntropy().bytes(16), name, *addresses, store.root.der, COORDINATOR.raw)
    replace(store, clock=lambda: utc_now() - timedelta(hours=ago)).invite(name, found.key.public, 1.0)
    return found


def started(store: AuthorityStore, port: int, days: float = 30) -> EnrolmentServer:
    service = EnrolmentService(store, store.unlock(None), days)
    return EnrolmentServer(service, f"{HOST}:0", [HOST], BrowserSettings(f"{HOST}:{port}"))


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def url(phone: Path, libraries: None, port: int) -> Iterator[str]:
    site = Site.of(phone, gateway=f"ws://{HOST}:{free_port()}", enrolment=f"ws://{HOST}:{port}")
    serving = http_server(site, HOST, 0)
    threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://{HOST}:{serving.server_port}/"
    serving.shutdown()
    serving.server_close()


def paste(page: cdp.Page, token: str) -> None:
    page.evaluate(
        f"(() => {{ const field = document.getElementById('token'); field.value = {token!r};"
        " field.dispatchEvent(new Event('input')); })()"
    )


def redeem(page: cdp.Page, token: str) -> str:
    """The line that is shown, or an empty one when the browser is enrolled."""
    paste(page, token)
    page.evaluate("document.getElementById('redeem').click()")
    page.until(f"{ERROR} || {SHOWN}.includes('join-form')")
    page.until("!document.getElementById('redeem').disabled")
    return page.alert("join-error")


def limits_stay(page: cdp.Page, url: str, examples: Path) -> None:
    """The limit on privacy is that of the visit before."""
    examples.write_text('{"text": "lock", "label": 0}')
    page.pick("#examples-file", examples)
    page.evaluate("document.getElementById('maximum_epsilon').value = 2.5")
    page.evaluate("document.getElementById('join').click()")
    page.until("document.getElementById('join-state').textContent.includes('connecting again')")
    page.goto(url)
    page.until(f"{SHOWN}.includes('join-form')")
    assert page.evaluate("document.getElementById('maximum_epsilon').valueAsNumber") == 2.5


def key_of(page: cdp.Page) -> str:
    pairs = (
        "[...document.querySelectorAll('#identity div')].map(({ children }) => [...children].map((e) => e.innerText))"
    )
    return str(dict(page.evaluate(pairs))["Key"])


def test_a_page_enrols_with_a_token_and_one_that_is_no_good_loses_nothing(
    page: Any, store: AuthorityStore, url: str, port: int, phone: Path
) -> None:
    tab, late, foreign = invited(store), invited(store, ago=1.1), invited(store)._replace(device="another")
    token = tab.to_text()
    page.goto(url)
    page.until(f"{SHOWN}.includes('token-form')")
    for text in ("edgeadapt1.", token[:-1], token[:40] + token[41:], f"{token}{'A' * 2**16}", "é" * 40):
        assert "is not an invitation" in redeem(page, text), text[:60]
    assert page.evaluate(SHOWN) == ["token-form", "enrol-form"]  # no key was made
    paste(page, token)
    page.until(f"{FACTS} !== ''")
    assert page.evaluate(FACTS) == f"tab {store.root.fingerprint} {COORDINATOR.key_id}"
    assert "cannot be reached" in redeem(page, token)
    key = key_of(page)
    server = started(store, port)
    try:
        assert "expired" in redeem(page, late.to_text())
        assert "another device or fleet" in redeem(page, foreign.to_text())
        page.goto(url)
        page.until(f"{SHOWN}.includes('token-form')")
        assert redeem(page, token) == ""
        assert page.evaluate(SHOWN) == ["join-form"]
        assert key_of(page) == key
        assert (
            page.evaluate("document.getElementById('token').value + document.getElementById('invited').textContent")
            == ""
        )
        issued = [(each.name, each.key) for each, _ in store.certificates() if each.name != "enrolment"]
        assert issued == [("tab", key)]
        limits_stay(page, url, phone.parent / "examples.jsonl")
        page.evaluate("document.getElementById('identity-forget').click()")
        page.until(f"{SHOWN}.includes('enrol-form')")
        assert "was used" in redeem(page, token)  # a new key, for a token that was used
        assert len(store.certificates()) == len(issued) + 1
    finally:
        server.close()
    assert page.errors() == []


def test_a_page_renews_its_certificate_at_a_visit_when_it_ends_soon_and_keeps_its_key(
    page: Any, store: AuthorityStore, url: str, port: int
) -> None:
    server = started(store, port, SHORT)
    try:
        page.goto(url)
        page.until(f"{SHOWN}.includes('token-form')")
        assert redeem(page, invited(store).to_text()) == ""
        key, soon = key_of(page), until(store)
    finally:
        server.close()
    server = started(store, port)
    try:
        page.goto(url)
        wait_until(lambda: until(store) > soon + timedelta(days=29), 120.0)
        page.until(f"{FACT}.includes('{until(store):%Y-%m-%d}') && {SHOWN}.includes('join-form')")
        assert key_of(page) == key
        assert page.alert("join-error") == ""
        page.goto(url)  # and not again
        page.until(f"{SHOWN}.includes('join-form')")
        assert sum(each.name == "tab" for each, _ in store.certificates()) == 2
    finally:
        server.close()
    assert page.errors() == []


REDEEM = """(async (place, token, url) => {
  const { Identity } = await import("/identity.js");
  const refused = ({ name, about }) => [name, about];
  globalThis.redeemed = new Identity(place).redeem(token, url).then(() => "installed", refused);
})"""
CHANGE = """(async (place, changes) => {
  const { IDENTITIES, transact } = await import("/storage.js");
  await transact(IDENTITIES, [place], (record) => [[place, { ...record, ...changes }]]);
})"""
REDEEMED = """(async (place) => {
  const { IDENTITIES, transact } = await import("/storage.js");
  const result = await redeemed;
  const [{ rounds, certificate }] = await transact(IDENTITIES, [place]);
  return [result, rounds, certificate.length > 1];
})"""


def test_a_certificate_that_arrives_late_overwrites_nothing_of_another_tab(
    page: Any, store: AuthorityStore, url: str, port: int
) -> None:
    behind = free_port()
    server, relay = started(store, behind), Relay(port, behind)
    try:
        page.goto(url)
        for count, (place, change, expected) in enumerate(
            (
                ("tab", "{ rounds: [7] }", ["installed", [7], True]),
                ("second", "{ certificate: Uint8Array.of(1) }", [["ConfigError", "identity"], [], False]),
            ),
            1,
        ):
            relay.hold()
            service = f"ws://{HOST}:{port}/edgeadapt.gateway.v1/enrol"
            page.evaluate(f"{REDEEM}({place!r}, {invited(store, place).to_text()!r}, {service!r})")
            wait_until(lambda count=count: len(relay.accepted) == count)  # type: ignore[misc]
            page.evaluate(f"{CHANGE}({place!r}, {change})")
            relay.open()
            assert page.evaluate(f"{REDEEMED}({place!r})") == expected
    finally:
        relay.close()
        server.close()
    assert page.errors() == []


class Relay:
    """Accepts connections to an enrolment service at once, and passes on nothing until it is opened."""

    def __init__(self, port: int, service: int) -> None:
        self._service, self._opened = service, threading.Event()
        self._listener = socket.create_server((HOST, port))
        self.accepted: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                self.accepted.append(connection)
                threading.Thread(target=self._relay, args=(connection,), daemon=True).start()

    def _relay(self, near: socket.socket) -> None:
        self._opened.wait()
        with contextlib.suppress(OSError), socket.create_connection((HOST, self._service)) as far:
            threading.Thread(target=pass_on, args=(far, near), daemon=True).start()
            pass_on(near, far)

    def open(self) -> None:
        self._opened.set()

    def hold(self) -> None:
        """Pass on nothing of later connections."""
        self._opened.clear()

    def is_held(self) -> bool:
        """Whether a page still waits for an answer."""
        connection = self.accepted[-1]
        connection.setblocking(False)
        try:
            connection.recv(1, socket.MSG_PEEK)
            return bool(connection.recv(2**16)) and self.is_held()
        except BlockingIOError:
            return True

    def close(self) -> None:
        self._listener.close()
        for connection in self.accepted:
            connection.close()


def pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(2**16):
            sink.sendall(chunk)
        sink.shutdown(socket.SHUT_WR)


def test_a_page_is_ready_and_answers_while_an_authority_says_nothing(
    page: Any, store: AuthorityStore, url: str, port: int
) -> None:
    server = started(store, port, SHORT)
    try:
        page.goto(url)
        page.until(f"{SHOWN}.includes('token-form')")
        assert redeem(page, invited(store).to_text()) == ""
    finally:
        server.close()
    silent = Relay(port, 0)
    try:
        page.goto(url)
        wait_until(lambda: bool(silent.accepted))
        page.evaluate("document.getElementById('phrase').value = 'lock the door'")
        page.evaluate("document.getElementById('phrase').form.requestSubmit()")
        page.until("document.getElementById('answers').textContent.includes('%')")
        assert page.state() == "good"
        assert silent.is_held()
    finally:
        silent.close()
    assert page.errors() == []


def until(store: AuthorityStore) -> datetime:
    return [each.not_after for each, _ in store.certificates() if each.name == "tab"][-1]


def test_an_identity_survives_a_newer_version_of_the_database(page: Any, url: str) -> None:
    """That of an older page had fewer stores."""
    page.call("Page.navigate", url=f"{url}trust.pem")  # the application itself would open the database first
    page.until("location.pathname === '/trust.pem' && document.readyState === 'complete'")
    assert page.evaluate(OLDER) == ["tab", True, [None]]


def test_what_a_browser_revealed_stays_counted_for_every_base_and_when_an_identity_is_forgotten(
    page: Any, url: str
) -> None:
    """A damaged account begins no new one."""
    page.goto(url)
    assert page.evaluate(ACCOUNTS) == {
        "saved": [10, 2.5],
        "forgotten": [True, True],
        "kept": [10, 2.5],
        "another": ["ConfigError", "participation"],
        "damaged": [["TrustError", "privacy"]] * 3,
    }
