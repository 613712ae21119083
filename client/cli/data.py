"""``edgeadapt device data``: what a device trains on."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from aggregation.errors import DataError
from client.cli import options
from client.training.examples import MAX_FILE, parse_examples, read_file
from client.training.hygiene import Cleaned, clean
from edgeadapt import commandline
from edgeadapt.bases.tasks import CLASSIFICATION
from edgeadapt.formats import storage
from edgeadapt.formats.bundle import BASE_MANIFEST
from edgeadapt.formats.phrases import read_phrases


@click.group(cls=commandline.HelpfulGroup)
def data() -> None:
    """Check and import the examples of a device, which never leave it."""


@data.command(short_help="Name the lines that training leaves out.")
@options.state_dir
@commandline.as_json
def check(state_dir: Path, as_json: bool) -> None:
    """Name the lines of the examples file that [data] in device.toml sets aside before training, each with the reason:
    personal data, a secret, a duplicate, a broken, long or old text. No text is printed.

    Without [data], the device trains on every line; this says what an empty table would set aside.

    \b
    Example:
      edgeadapt device data check --state kitchen
    """
    from client.node.statedir import DeviceStateDir

    opened = DeviceStateDir.open(state_dir)
    cleaned = clean(read_file(opened.examples), opened.data, time.time())
    if len(cleaned.aside) < cleaned.lines or not cleaned.lines:
        parse_examples(cleaned.raw, opened.examples, 0)
    row = {"applied": opened.data is not None, "untimed": cleaned.untimed}
    off = "" if opened.data else "\nnothing is set aside in training: device.toml does not have the table [data]"
    _print(row, cleaned, f"{cleaned}; {cleaned.untimed} have no time{off}", as_json)


@data.command("import", short_help="Append examples that are clean.")
@options.state_dir
@commandline.as_json
@click.argument("file", type=commandline.FILE)
def import_(state_dir: Path, as_json: bool, file: Path) -> None:
    """Append the examples in FILE to those of the device, without what [data] in device.toml sets aside or, if that
    table is missing, an empty one.

    FILE has JSON lines like examples.jsonl, or, under another name than .jsonl, lines of a label, a tab and a text. A
    label is a number, or one of the labels of the device's bundle.

    \b
    Examples:
      edgeadapt device data import --state kitchen more.jsonl
      edgeadapt device data import --state kitchen phrases.tsv
    """
    from client.node.statedir import DeviceStateDir
    from client.node.tasklabels import signed_labels

    opened = DeviceStateDir.open(state_dir)
    has_bundle = (Path(opened.settings.base) / BASE_MANIFEST).is_file()
    names = next(iter(signed_labels(opened.base())), ()) if has_bundle else ()
    raw = read_file(file) if file.suffix == ".jsonl" else _labelled(file, names)
    with opened.locked():
        old = read_file(opened.examples) if opened.examples.exists() else b""
        old += b"\n" if old and not old.endswith(b"\n") else b""
        cleaned = clean(old + raw.removeprefix(b"\xef\xbb\xbf"), opened.data, time.time())
        known = old.count(b"\n")
        aside = {number - known: reason for number, reason in cleaned.aside.items() if number > known}
        new = [line.strip() for line in cleaned.raw.split(b"\n")[known:]]
        if count := sum(map(bool, new)):
            labels = len(names) or (None if b'"label"' in raw else 0)
            parse_examples(b"\n".join(new), file, labels if opened.settings.task == CLASSIFICATION else 0)
            content = old + b"".join(line + b"\n" for line in new if line)
            if len(content) > MAX_FILE:
                reason = f"with {file}, {opened.examples} would have more than {MAX_FILE} bytes: import less"
                raise DataError(reason, about="examples")
            storage.replace(opened.examples, content)
    cleaned = Cleaned(b"", aside, count + len(aside))
    _print({"imported": count}, cleaned, f"{count} imported; {cleaned}", as_json)


def _print(row: dict[str, Any], cleaned: Cleaned, line: str, as_json: bool) -> None:
    aside = [{"line": number, "reason": reason} for number, reason in cleaned.aside.items()]
    lines = [*(f"line {number}: {reason}" for number, reason in cleaned.aside.items()), line]
    commandline.print_result(row | {"examples": cleaned.lines, "aside": aside}, "\n".join(lines), as_json)


def _labelled(file: Path, names: Sequence[str]) -> bytes:
    """Make JSON lines of labels and texts; ``parse_examples`` refuses a label that is not known."""
    numbers: dict[str, int | str] = {name: number for number, name in enumerate(names)}
    rows = []
    for label, text in read_phrases(file):
        number = int(label) if label.isdecimal() else label
        rows.append(json.dumps({"text": text, "label": numbers.get(label, number)}))
    return "\n".join(rows).encode()
