"""A wheel has the page and its libraries, and serves them without npm. Without the libraries its build has no page.

It is built offline, from a copy of what a checkout has.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from client.browser.server import LIBRARIES, PAGE, VENDOR, WEB

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("libraries")]

ROOT = Path(__file__).resolve().parents[2]
BUILT_FROM = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
PACKAGES = ("aggregation", "client", "coordinator", "edgeadapt", "export", "simulations")
SERVED = """
import sys
from pathlib import Path
from client.browser import server
assert Path(server.__file__).is_relative_to(sys.argv[1]), server.__file__
server.Site.of(Path(sys.argv[2])).export(Path(sys.argv[3]))
"""


def copied(folder: Path) -> Path:
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, folder / name)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
    return folder


def python(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Python with the packages in ``folder``, and no program on the path."""
    environment = {"PATH": "", "PYTHONPATH": str(folder), "HOME": os.environ.get("HOME", "")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def built(source: Path, out: Path) -> str:
    """Make a wheel from ``source`` and unpack it in ``out``: what the build says on standard error."""
    script = "import sys, setuptools.build_meta as backend; print(backend.build_wheel(sys.argv[1]))"
    done = python(source, "-c", script, out)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(out / done.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(out)
    return done.stderr


def test_the_page_is_served_from_a_wheel_without_npm(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source, wheel = copied(tmp_path / "source"), tmp_path / "wheel"
    (source / "client/browser/page/node_modules").symlink_to(LIBRARIES.resolve())
    assert "no browser page" not in built(source, wheel)
    page = wheel / "client/browser/page"
    in_wheel = {path.relative_to(page).as_posix() for path in page.rglob("*") if path.is_file()}
    own = {path.relative_to(WEB).as_posix() for pattern in PAGE for path in WEB.glob(pattern)}
    packed = {name: f"{name}.gz" for name in VENDOR.values() if name.endswith(".wasm")}
    assert len(packed) == 2
    assert in_wheel == own | {f"node_modules/{packed.get(name, name)}" for name in VENDOR.values()}
    done = python(wheel, "-c", SERVED, wheel, bundle, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    for path, name in VENDOR.items():
        assert (tmp_path / "site" / path).read_bytes() == (LIBRARIES / name).read_bytes()
    texts = {path: (tmp_path / "site" / path).read_text() for path in own if path.endswith((".js", ".html"))}
    imported = {
        (tmp_path / "site" / path).parent / name
        for path, text in texts.items()
        for name in re.findall(r"""(?:from|import\(|src=|href=)\s*["'](\.{0,2}/?[\w./-]+)["']""", text)
    }
    assert len(imported) > 50
    assert [str(path) for path in sorted(imported) if not path.exists()] == []
    licenses = {name for name in VENDOR if name.endswith("LICENSE")} | {"onnxruntime-web.LICENSE"}
    assert len(licenses) == len({path.split("/")[1] for path in VENDOR})  # one for each library


def test_a_build_without_the_libraries_says_so_and_has_no_page(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    wheel = tmp_path / "wheel"
    lines = built(copied(tmp_path / "source"), wheel).splitlines()
    assert sum("this build has no browser page" in line for line in lines) == 1
    assert not (wheel / "client/browser/page").exists()
    done = python(wheel, "-m", "edgeadapt", "device", "web", "--bundle", bundle)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "make wheel" in done.stderr
