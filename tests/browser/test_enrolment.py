"""A page enrols with a token, in a real Chromium, at the authority's service, and only with one that is valid."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from adapters.gateway.invitation import Invitation
from aggregation.entropy import SystemEntropy
from aggregation.pki import IdentityKey
from client.browser.server import Site, http_server
from coordinator.authority import AuthorityStore
from coordinator.authority.store import utc_now
from coordinator.gateway.enrolment import EnrolmentServer, EnrolmentService
from coordinator.gateway.websocket import BrowserSettings
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
  return [found.device, holds, await transact(LEARNED, "readonly", (store) => store.count())];
})()"""

FORGOTTEN = """(async () => {
  const [{ Identity }, { EMPTY }, { IDENTITIES, transact }] = await Promise.all(
    ["identity", "aggregation/privacyledger", "storage"].map((name) => import(`/${name}.js`)),
  );
  const put = (record) => transact(IDENTITIES, "readwrite", (store) => store.put(record, "spent"));
  const identity = new Identity("spent");
  await put({ device: "tab", pair: {}, privacy: { ...EMPTY, noisy: 3 } });
  await identity.forget();
  const left = [await identity.load(), await transact(IDENTITIES, "readonly", (store) => store.get("spent"))];
  await put({ device: "tab", pair: {}, privacy: { ...EMPTY, settled: null } });
  const refused = await identity.load().catch(({ name, about }) => [name, about]);
  return [left[0] === undefined, Object.keys(left[1]), left[1].privacy.noisy, ...refused];
})()"""


def invited(store: AuthorityStore, name: str = "tab", ago: float = 0.0) -> Invitation:
    addresses = f"{HOST}:1", f"{HOST}:2,{HOST}:3"  # of devices; the page has its own
    found = Invitation(SystemEntropy().bytes(16), name, *addresses, store.root.der, COORDINATOR.raw)
    replace(store, clock=lambda: utc_now() - timedelta(hours=ago)).invite(name, found.key.public, 1.0)
    return found


def started(store: AuthorityStore, port: int) -> EnrolmentServer:
    service = EnrolmentService(store, store.unlock(None), 30)
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


def key_of(page: cdp.Page) -> str:
    pairs = (
        "[...document.querySelectorAll('#identity div')].map(({ children }) => [...children].map((e) => e.innerText))"
    )
    return str(dict(page.evaluate(pairs))["Key"])


def test_a_page_enrols_with_a_token_and_one_that_is_no_good_loses_nothing(
    page: Any, store: AuthorityStore, url: str, port: int
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
        page.goto(url)
        page.until(f"{SHOWN}.includes('join-form')")
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
    service = EnrolmentService(store, store.unlock(None), SHORT)
    server = EnrolmentServer(service, f"{HOST}:0", [HOST], BrowserSettings(f"{HOST}:{port}"))
    try:
        page.goto(url)
        page.until(f"{SHOWN}.includes('token-form')")
        assert redeem(page, invited(store).to_text()) == ""
        key, soon = key_of(page), until(store)
        service.days = 30
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


def until(store: AuthorityStore) -> datetime:
    return [each.not_after for each, _ in store.certificates() if each.name == "tab"][-1]


def test_an_identity_survives_a_newer_version_of_the_database(page: Any, url: str) -> None:
    """That of an older page had fewer stores."""
    page.call("Page.navigate", url=f"{url}trust.pem")  # the application itself would open the database first
    page.until("location.pathname === '/trust.pem' && document.readyState === 'complete'")
    assert page.evaluate(OLDER) == ["tab", True, 0]


def test_what_a_browser_revealed_stays_counted_when_its_identity_is_forgotten(page: Any, url: str) -> None:
    page.goto(url)
    assert page.evaluate(FORGOTTEN) == [True, ["privacy"], 3, "TrustError", "privacy"]
