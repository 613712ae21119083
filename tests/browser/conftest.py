"""A real Chromium, driven over its own protocol (CDP), and the tiny bases of ``tests.support.models``.

The browser is found as ``chromium`` on the path. Without it, or without the page's libraries, these tests are
skipped; with EDGEADAPT_REQUIRE_BROWSER=1, as in CI, they fail.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel

from aggregation.pki.identity import IdentityKey
from client.browser.server import LIBRARIES, VENDOR, Site, http_server
from edgeadapt.bases.base import Base
from edgeadapt.formats.manifest import Card, PrivacyBound
from edgeadapt.formats.peftconfig import PeftConfig
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from tests.support import cdp, models, programs
from tests.support.models import LABELS, draw, slotted_of
from tests.support.nodetab import NodeTab
from tests.support.programs import need

CONFIG = PeftConfig.lora(rank=4, alpha=8)
HEAD = 2e-4  # of the values of ``draw``: so small that 30 steps of a tiny base change answers
NO_COPIES = "Object.defineProperty(navigator, 'serviceWorker', { value: undefined })"  # a browser without them
globals().update(models.FIXTURES)


@pytest.fixture(scope="session")
def libraries() -> None:
    need(all((LIBRARIES / path).is_file() for path in VENDOR.values()), "npm ci has not run: make web")


@pytest.fixture(scope="session")
def node(libraries: None) -> str:
    return programs.node()


@pytest.fixture(scope="session")
def tab(node: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeTab]:
    with contextlib.closing(NodeTab(node, tmp_path_factory.mktemp("node") / "site")) as tab:
        yield tab


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory, libraries: None) -> Iterator[Any]:
    program = cdp.installed()
    need(program, "no chromium on the path: apt install chromium")
    browser = cdp.Chromium(str(program), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A tab that keeps no copy of its page: that takes a second of processor time, and ``test_offline.py`` tests it."""
    tab = cdp.Page(chromium)
    tab.call("Page.addScriptToEvaluateOnNewDocument", source=NO_COPIES)
    yield tab
    tab.close()


@pytest.fixture
def tabs(chromium: Any) -> Iterator[list[cdp.Page]]:
    """Two tabs, each with its own storage; they keep a copy of their page."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(cdp.Page(chromium))) for _ in range(2)]


IN_BROWSER = """
globalThis.load = (name) => import(`/${name}.js`);
globalThis.opened = async () => {
  const [{ Engine }, { HttpSource }] = await Promise.all([load("engine"), load("sources")]);
  const here = new URL("/", location.href);
  const source = new HttpSource(new URL("bundle/", here), new URL("bundle.json", here));
  const provider = new URLSearchParams(location.search).get("provider") ?? undefined;
  return Engine.open(source, await (await fetch("/trust.pem")).text(), () => {}, provider);
};
"""  # what ``NodeTab`` has
Serve = Callable[[Path], str]


@pytest.fixture
def serve(libraries: None) -> Iterator[Serve]:
    """Serves a bundle, with trust.pem next to it; returns the URL of its page."""
    running = []

    def start(bundle: Path) -> str:
        serving = http_server(Site.of(bundle), "127.0.0.1", 0)
        running.append(serving)
        threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return f"http://127.0.0.1:{serving.server_port}/"

    yield start
    for serving in running:
        serving.shutdown()
        serving.server_close()


@pytest.fixture(scope="module")
def trainable(request: Any, model: PeftModel, tiny_base: Base) -> ExportedBase:
    return export_classifier(slotted_of(model), tiny_base, getattr(request, "param", Profile.FP32), training=True)


@pytest.fixture(scope="module")
def first(model: PeftModel) -> AdapterSource:
    """A global adapter whose answers are nearly undecided."""
    values = {name: value * np.float32(HEAD if "classifier" in name else 1) for name, value in draw(model, 0).items()}
    card = Card(owner="Zoë", purpose="Lights", data="Volunteers", license="MIT", languages=("de", "en"))
    bound = PrivacyBound(3.0, 1e-6)
    return AdapterSource("global", values, LABELS, 3, "c" * 64, None, CONFIG, privacy=bound, card=card)


@pytest.fixture
def phone(tmp_path: Path, trainable: ExportedBase, first: AdapterSource, vendor: IdentityKey) -> Path:
    """A bundle that can learn, with a global adapter."""
    write_bundle(tmp_path / "bundle", trainable, [first], key=vendor, form="fp32")
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    return tmp_path / "bundle"
