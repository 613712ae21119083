"""A real Chromium, driven over its own protocol (CDP), and the tiny bases of ``tests.support.models``.

The browser is found as ``chromium`` on the path. Without it, or without the page's libraries, these tests are
skipped; with EDGEADAPT_REQUIRE_BROWSER=1, as in CI, they fail.
"""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client.browser.server import LIBRARIES, VENDOR, Site, http_server
from tests.support import cdp, models, programs
from tests.support.programs import need

globals().update(models.FIXTURES)


@pytest.fixture(scope="session")
def libraries() -> None:
    need(all((LIBRARIES / path).is_file() for path in VENDOR.values()), "npm ci has not run: make web")


@pytest.fixture(scope="session")
def node(libraries: None) -> str:
    return programs.node()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory, libraries: None) -> Iterator[Any]:
    program = cdp.installed()
    need(program, "no chromium on the path: apt install chromium")
    browser = cdp.Chromium(str(program), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    tab = cdp.Page(chromium)
    yield tab
    tab.close()


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
