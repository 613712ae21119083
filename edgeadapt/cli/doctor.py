"""``edgeadapt doctor``: what is installed and whether it works, and the machine."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import click

from aggregation.errors import EdgeAdaptError
from edgeadapt.formats.cores import cores
from edgeadapt.program import shadowed

PURPOSES = {  # extra → what it is for
    "generate": "language models on a device",
    "serve": "a server for many tenants",
    "data": "devices that keep personal data out of training",
    "pictures": "bases of pictures",
    "sounds": "bases of sounds",
    "train": "devices that train with torch",
    "federate": "devices that train with a bundle, on Flower",
    "gateway": "the same through the coordinator's gateway",
    "coordinator": "coordinators, their gateway and dashboard",
    "postgresql": "a registry in PostgreSQL",
    "s3": "adapters in a bucket",
    "traces": "spans for OpenTelemetry",
    "export": "bundles from bases and adapters",
    "governance": "gates and bills of material of releases",
    "ray": "the benchmark of simulation engines",
    "simulations": "demo, simulate and suites",
    "bench": "python -m benchmarks ondevice",
    "dev": "tests and the documentation",
}
UNTRIED = ("dev", "bench")  # extras of developers, which are counted and not imported
NAME = re.compile(r"([A-Za-z0-9][\w.-]*)(?:\[([\w,-]+)\])?")
ENOUGH_MEMORY, ENOUGH_DISK = 4e9, 5e9  # bytes: a simulation of households, and torch with its models
YEARS = range(2025, 2100)  # certificates and releases are refused at any other date
JUMP = 1.0  # seconds by which the clocks may differ while this command runs
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OK, MISSING, FAIL = "ok", "missing", "FAIL"
IMPORTS = """
import importlib, sys
out, sys.stdout = sys.stdout, sys.stderr
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
        error = ""
    except BaseException as reason:
        error = f"{type(reason).__name__}: {reason}"
    print(" ".join(error.split()), file=out, flush=True)
"""  # in a process of its own, which a broken library may end


class Row(NamedTuple):
    status: str
    name: str
    note: str
    versions: Mapping[str, str] | None = None  # distribution → version, of an extra


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Check what is installed and whether it can be imported, and this machine: cores, memory, disk, clock.

    What is missing is no error: each extra is for something that this machine may not need. The exit code is 1 if a
    row is FAIL.

    \b
    Examples:
      edgeadapt doctor
      edgeadapt doctor --json
    """
    began, rows = time.time() - time.monotonic(), []
    for row in _rows(began):
        rows.append(row)
        if not as_json:
            click.echo(f"{row.status:8} {row.name:14} {row.note}")
    broken = [row.name for row in rows if row.status == FAIL]
    if as_json:
        click.echo(json.dumps({"ok": not broken, "checks": [row._asdict() for row in rows]}))
    if broken:
        raise EdgeAdaptError(f"broken: {', '.join(broken)}; install it again, or repair what the row says")


def _rows(began: float) -> Iterator[Row]:
    version, place = _version("edgeadapt"), Path(__file__).parents[2]
    yield Row(OK if version else FAIL, "edgeadapt", f"{version or 'not installed by pip, and run from'} {place}")
    reason = shadowed()
    yield Row(FAIL if reason else OK, "packages", reason or "no other distribution stands in front of edgeadapt's")
    yield Row(OK, "python", f"{platform.python_version()}, {sys.executable}")
    yield from _extras() if version else ()
    yield Row(OK, "cores", str(cores()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield _amount("memory", memory, ENOUGH_MEMORY, "a simulation may not fit")
    yield _amount("disk", shutil.disk_usage(Path.cwd()).free, ENOUGH_DISK, "torch and its models may not fit")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    yield Row(OK if browser else MISSING, "chromium", browser or "for tests of the browser's page only")
    yield clock_row(time.time(), time.time() - time.monotonic() - began)


def _amount(name: str, free: float, enough: float, lack: str) -> Row:
    return Row(OK if free >= enough else MISSING, name, f"{free / 1e9:.1f} GB{'' if free >= enough else ': ' + lack}")


def clock_row(now: float, jump: float) -> Row:
    """Check the clock: ``now`` in seconds since 1970, and how far it moved against the monotonic clock."""
    stated = datetime.fromtimestamp(now, UTC)
    if stated.year not in YEARS:
        return Row(FAIL, "clock", f"it says {stated:%Y-%m-%d}: set it, or certificates and releases are refused")
    if abs(jump) > JUMP:
        return Row(FAIL, "clock", f"it jumped by {jump:.1f} s while this command ran: let it run evenly")
    return Row(OK, "clock", f"{stated:%Y-%m-%d %H:%M} UTC")


def _extras() -> Iterator[Row]:
    own = metadata.distribution("edgeadapt")
    needs: dict[str, list[str]] = {"": []} | {extra: [] for extra in own.metadata.get_all("Provides-Extra") or ()}
    for requirement in own.requires or ():
        text, _, marker = requirement.partition(";")
        named = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        needs.setdefault(named[1] if named else "", []).append(text.strip())
    wanted = {extra: sorted(_distributions(some, needs)) for extra, some in needs.items()}
    there = {name: version for names in wanted.values() for name in names if (version := _version(name))}
    tried = {name for extra, names in wanted.items() if extra not in UNTRIED for name in names if name in there}
    errors = import_errors(_modules(tried))
    for extra, names in wanted.items():
        versions = {name: there[name] for name in names if name in there}
        wrong = [f"{name} {version}: {errors[name]}" for name, version in versions.items() if errors.get(name)]
        absent = [name for name in names if name not in there]
        note = PURPOSES.get(extra, extra) if extra else ", ".join(map(" ".join, versions.items()))
        note = "; ".join(wrong) or (f"{note}: without {', '.join(absent)}" if absent else note)
        status = FAIL if wrong or (absent and not extra) else MISSING if absent else OK
        yield Row(status, extra or "needs", note, versions)


def _distributions(requirements: Sequence[str], needs: dict[str, list[str]]) -> set[str]:
    names = set()
    for requirement in requirements:
        name, extras = NAME.match(requirement).groups()  # type: ignore[union-attr]  # pip accepted it
        if name == "edgeadapt":
            names |= {one for extra in extras.split(",") for one in _distributions(needs[extra], needs)}
        else:
            names.add(name)
    return names


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _modules(names: set[str]) -> dict[str, str]:
    """Map distributions to a module of each; those that have none are left out."""
    plain = {re.sub(r"[-_.]+", "-", name).lower(): name for name in names}
    modules: dict[str, str] = {}
    for module, owners in sorted(metadata.packages_distributions().items()):
        for owner in owners:
            name = plain.get(re.sub(r"[-_.]+", "-", owner).lower())
            if name and module.isidentifier() and not module.startswith("_"):
                modules.setdefault(name, module)
    return modules


def import_errors(modules: dict[str, str]) -> dict[str, str]:
    """Import the module of each distribution in another process, and say what went wrong; empty for each that works."""
    names, errors = list(modules), dict[str, str]()
    while len(errors) < len(names):
        left = names[len(errors) :]
        command = [sys.executable, "-P", "-c", IMPORTS, *(modules[name] for name in left)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # noqa: S603
        errors |= dict(zip(left, done.stdout.splitlines(), strict=False))
        if len(errors) < len(names):
            errors[names[len(errors)]] = f"its import ends Python with code {done.returncode}"
    return errors
