"""Draw the pictures of the documents from real pages, in a real Chromium.

Usage: python -m tests.browser.picture dashboard FLEET REPO OUT.png, with a coordinator's state directory and a
repository; or python -m tests.browser.picture report REPORT.html OUT.png, with the page of a run (make picture).
"""

import base64
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from coordinator.dashboard.server import TOKEN
from tests.browser.test_dashboard import READY, dashboard
from tests.support import cdp

WIDTH = 1240  # pixels
TWO_CHARTS = "main > section, .figures section + section, .note { display: none }"  # and the headline


@contextmanager
def opened() -> Iterator[cdp.Page]:
    program = cdp.installed()
    if program is None:
        raise SystemExit("no chromium on the path: install it (Debian: apt install chromium)")
    with tempfile.TemporaryDirectory() as profile:
        browser = cdp.Chromium(program, Path(profile))
        page = cdp.Page(browser)
        _resize(page, 900)
        yield page
        browser.close()


def _resize(page: cdp.Page, height: int) -> None:
    page.call("Emulation.setDeviceMetricsOverride", width=WIDTH, height=height, deviceScaleFactor=1, mobile=False)


def write(page: cdp.Page, out: Path) -> None:
    """Write the whole page as a picture."""
    _resize(page, page.evaluate("document.body.offsetHeight"))
    out.write_bytes(base64.b64decode(page.call("Page.captureScreenshot", format="png")["data"]))


def draw_dashboard(fleet: Path, releases: Path, out: Path) -> None:
    with dashboard(fleet, "--channels", releases) as (url, _), opened() as page:
        page.call("Page.navigate", url=url)
        page.until("document.getElementById('token') !== null")
        token = (fleet / TOKEN).read_text().strip()
        page.evaluate(f"document.getElementById('token').value = {token!r}; document.forms[0].submit()")
        page.until(READY)
        write(page, out)


def draw_report(report: Path, out: Path) -> None:
    """Draw the headline of a run's report with accuracy by client and by round."""
    with opened() as page:
        page.call("Page.navigate", url=report.resolve().as_uri())
        page.until("document.readyState === 'complete' && document.querySelector('.figures') !== null")
        page.evaluate(
            f"document.head.append(Object.assign(document.createElement('style'), {{ textContent: {TWO_CHARTS!r} }}))"
        )
        write(page, out)


if __name__ == "__main__":
    drawn: dict[str, Callable[..., None]] = {"dashboard": draw_dashboard, "report": draw_report}
    drawn[sys.argv[1]](*map(Path, sys.argv[2:]))
