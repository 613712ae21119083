"""Options, input and output that several commands of a device share."""

import sys
import unicodedata
from io import TextIOWrapper
from pathlib import Path
from typing import Any, cast

import click

from aggregation.errors import DataError
from edgeadapt.bases.media import is_medium
from edgeadapt.bases.pictures import PictureReader
from edgeadapt.bases.sounds import is_window
from edgeadapt.commandline import FOLDER, option

FILE_OR_INPUT = click.Path(path_type=Path, dir_okay=False, allow_dash=True)

state_dir = option("--state DIR", "The device's state directory.", name="state_dir", type=FOLDER, required=True)
trust = option("--trust FILE", "Pinned public keys. Default: trust.pem next to the bundle.", type=FOLDER)


def words(label: str) -> str:
    return printable(label.replace("_", " ").strip() or label)


def warn_of_unread(text: str, unread: int) -> None:
    """Print a line on standard error if the model leaves out tokens at the end of a text."""
    if unread:
        start = " ".join(printable(text[:40]).split())
        click.echo(f"edgeadapt: the last {unread} tokens of {start!r} … are not read: shorten the text", err=True)


def standard_input() -> TextIOWrapper:
    """Open standard input. Bytes that are not UTF-8 become surrogates, which ``text.checked`` refuses. Raises
    DataError: standard input is closed."""
    if sys.stdin is None:
        raise DataError("standard input is closed; give the text as an argument, or open it", about="stdin")
    stream = cast(TextIOWrapper, sys.stdin)
    stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    return stream


def secret_line(path: Path, limit: int) -> str:
    """Read the first line, of ``limit`` characters, of a file, of a pipe, or of standard input if ``path`` is ``-``. A
    secret comes this way because arguments of a command are shown to every user of the machine. Bytes that are not
    UTF-8 become surrogates. Raises DataError: standard input is closed."""
    if str(path) == "-":
        return standard_input().readline(limit).rstrip("\n")
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        return file.readline(limit).rstrip("\n")


def printable(text: str) -> str:
    """Remove control characters, with which the text of a model could move the cursor or set the terminal's title, and
    the content of a picture or sound.

    >>> printable("\\x1b[31mred\\n")
    '[31mred\\n'
    """
    if is_medium(text):
        noun = (
            "picture" if text.startswith(PictureReader.begin) else "window of sensors" if is_window(text) else "sound"
        )
        return f"a {noun} of {len(text)} characters"
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def update(*given: Any, **named: Any) -> object:
    """Call ``client.updates.update``, which takes 0.1 s to import."""
    from client.updates import update as bring

    return bring(*given, **named)
