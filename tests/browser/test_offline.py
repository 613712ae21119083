"""The page without its server: from the copy that Chromium keeps, while the server's process has ended."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aggregation.pki.identity import IdentityKey
from client.browser.server import Site
from edgeadapt.formats.bundle import adapter_path, manifest_path
from edgeadapt.formats.layout import Tensors
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.exported import ExportedBase
from tests.browser.conftest import NO_COPIES
from tests.browser.test_learning import other, taught_in
from tests.browser.test_page import IN_USE, ask, choose, native, shown
from tests.support import cdp
from tests.support.models import PHRASES

pytestmark = pytest.mark.slow

OFFLINE = "document.getElementById('offline').textContent"
KEPT = """(async () => {
  const names = await caches.keys();
  const cache = await caches.open(names[0]);
  const paths = (await cache.keys()).map(({ url }) => new URL(url).pathname.slice(1)).sort();
  return { copies: names.length, paths, site: await (await cache.match("/site.json"))?.json() };
})()"""
PUT = """(async (path, content) => {
  const cache = await caches.open((await caches.keys())[0]);
  const { headers } = await cache.match(path);
  await cache.put(path, new Response(Uint8Array.from(atob(content), (sign) => sign.charCodeAt(0)), { headers }));
})"""


class Server:
    """``edgeadapt device web`` as a process, each time at the same address."""

    def __init__(self, bundle: Path) -> None:
        self.bundle, self.port = bundle, 0
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "edgeadapt", "device", "web", "--bundle", self.bundle]
        self.process = subprocess.Popen([*command, "--port", str(self.port)], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[2]
        self.port = int(self.url.rstrip("/").rpartition(":")[2])

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    tab = cdp.Page(chromium)
    yield tab
    tab.close()


@pytest.fixture
def server(libraries: None, phone: Path) -> Iterator[Server]:
    running = Server(phone)
    yield running
    running.stop()


def opposite(source: AdapterSource) -> Tensors:
    return {name: -value for name, value in source.tensors.items()}


def opened(page: Any, server: Server) -> str:
    """Open the page; what it says about its copy."""
    page.goto(server.url)
    page.until(f"{OFFLINE} !== '' || document.getElementById('status').dataset.state === 'bad'")
    return str(page.evaluate(OFFLINE))


def put(page: Any, path: str, content: bytes) -> None:
    """Alter a file of the copy."""
    page.evaluate(f"{PUT}({json.dumps(path)}, {json.dumps(base64.b64encode(content).decode())})")


def test_without_its_server_a_page_that_was_loaded_answers_switches_learns_and_is_opened_again(
    page: Any, server: Server, phone: Path, first: AdapterSource, trainable: ExportedBase, vendor: IdentityKey
) -> None:
    anna = replace(first, name="anna", parent="a" * 64, tensors=opposite(first))
    write_bundle(phone, trainable, [first, anna], key=vendor, form="fp32")
    expected = {name: native(phone, name, PHRASES[0]) for name in ("anna", "global")}
    label = other(phone)
    assert "A copy is kept in this browser" in opened(page, server)
    server.stop()
    choose(page, "global")  # which was not read before
    page.until(f"{IN_USE}.includes('global')")
    assert "this is the copy of" in opened(page, server)
    assert page.state() == "good"
    for name in ("anna", "global"):
        choose(page, name)
        page.until(f"{IN_USE}.includes({name!r})")
        ask(page, PHRASES[0])
        assert shown(page) == expected[name]
    found = taught_in(page, PHRASES[0], label)
    assert (found["error"], found["in use"].startswith("In use: personal,")) == ("", True), found
    opened(page, server)
    choose(page, "personal")
    page.until(f"{IN_USE}.includes('personal')")
    ask(page, PHRASES[0])
    assert shown(page)[0][0] == label
    assert page.errors() == []


def test_a_browser_without_service_workers_opens_the_page_and_says_that_it_keeps_no_copy(
    page: Any, server: Server
) -> None:
    page.call("Page.addScriptToEvaluateOnNewDocument", source=NO_COPIES)
    assert opened(page, server).startswith("This browser keeps no copy of this page")
    assert page.state() == "good"


def test_a_new_version_replaces_the_copy_and_neither_an_old_nor_an_altered_file_is_accepted(
    page: Any, server: Server, phone: Path, first: AdapterSource, trainable: ExportedBase, vendor: IdentityKey
) -> None:
    opened(page, server)
    before = page.evaluate(KEPT)
    old = {str(path): (phone / path).read_bytes() for path in (manifest_path("global"), adapter_path("global"))}
    newer = replace(first, version=4, sha256="d" * 64, tensors=opposite(first))
    write_bundle(phone, trainable, [newer], key=vendor, form="fp32")
    page.call("Storage.overrideQuotaForOrigin", origin=server.url, quotaSize=1000)
    assert "it has no room for it" in opened(page, server)
    assert page.evaluate(KEPT) == before
    page.call("Storage.overrideQuotaForOrigin", origin=server.url)
    assert "A copy is kept in this browser" in opened(page, server)
    after = page.evaluate(KEPT)
    assert after["copies"] == 1
    assert after["paths"] == sorted(Site.of(phone).paths())
    assert {path for path, digest in after["site"].items() if before["site"][path] != digest} == {
        f"bundle/{path}" for path in old
    }
    server.stop()
    opened(page, server)
    ask(page, PHRASES[0])
    assert shown(page) == native(phone, "global", PHRASES[0])

    for path, content in old.items():
        put(page, f"bundle/{path}", content)
    opened(page, server)
    page.until("document.getElementById('adapter-error').textContent !== ''")
    assert "is version 3, but version 4 was accepted here before" in page.alert("adapter-error")
    put(page, f"bundle/{adapter_path('global')}", b"x")
    put(page, "bundle/base/tokenizer.json", b"{}")
    opened(page, server)
    assert "base/tokenizer.json does not match the digest in its manifest" in page.status()
    put(page, "trust.pem", b"x")
    page.call("Page.navigate", url=server.url)
    page.until("document.body?.textContent.includes('The copy of this page in this browser is damaged')")
    server.start()
    opened(page, server)
    assert page.state() == "good"
