"""Puts the browser page and its libraries, WebAssembly packed, into the wheel; everything else is in pyproject.toml.

The libraries are the files of ``client/browser/vendor.json`` in the page's ``node_modules``, where ``make web`` puts
them. Without them the wheel has no page, and the build says so.
"""

import gzip
import json
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BROWSER = Path("client/browser")
# As in server.py.
PAGE = ["*.html", "*.css", "*.js", "*.svg", "*.webmanifest", "*.LICENSE", "aggregation/*.js", "learning/*.js"]
MISSING = "edgeadapt: this build has no browser page, because its libraries are missing: run make web, and build again"


class BuildPy(build_py):
    """Adds to the data of the package ``client.browser`` what its server serves."""

    def finalize_options(self) -> None:
        super().finalize_options()
        libraries = [f"node_modules/{path}" for path in json.loads((BROWSER / "vendor.json").read_bytes()).values()]
        self.complete = all((BROWSER / "page" / path).is_file() for path in libraries)
        if self.complete:
            added = [f"page/{path}" for path in (*PAGE, *libraries)]
            self.package_data = {**self.package_data, "client.browser": ["vendor.json", *added]}

    def build_package_data(self) -> None:
        super().build_package_data()
        for file in Path(self.build_lib, BROWSER, "page/node_modules").rglob("*.wasm"):
            file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes(), mtime=0))
            file.unlink()

    def run(self) -> None:
        super().run()
        if not (self.complete or self.editable_mode):
            print(MISSING, file=sys.stderr)


setup(cmdclass={"build_py": BuildPy})
