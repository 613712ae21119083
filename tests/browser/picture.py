"""Draw docs/images/dashboard.png: the page of a coordinator, by the real command, in a real Chromium.

Usage: python -m tests.browser.picture FLEET REPO OUT.png, with a coordinator's state directory and a repository.
"""

import base64
import sys
import tempfile
from pathlib import Path

from coordinator.dashboard.server import TOKEN
from tests.browser.test_dashboard import READY, dashboard
from tests.support import cdp

WIDTH = 1240  # pixels


def draw(fleet: Path, releases: Path, out: Path) -> None:
    """Log in, and write the whole page as a picture."""
    program = cdp.installed()
    if program is None:
        raise SystemExit("no chromium on the path")
    with tempfile.TemporaryDirectory() as profile, dashboard(fleet, "--channels", releases) as (url, _):
        browser = cdp.Chromium(program, Path(profile))
        page = cdp.Page(browser)
        size = {"width": WIDTH, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        page.call("Page.navigate", url=url)
        page.until("document.getElementById('token') !== null")
        token = (fleet / TOKEN).read_text().strip()
        page.evaluate(f"document.getElementById('token').value = {token!r}; document.forms[0].submit()")
        page.until(READY)
        height = page.evaluate("document.documentElement.scrollHeight")
        page.call("Emulation.setDeviceMetricsOverride", **size | {"height": height})
        shot = page.call("Page.captureScreenshot", format="png")
        out.write_bytes(base64.b64decode(shot["data"]))
        browser.close()


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:]))
