"""SamplingParams, input and output that several commands of a device share."""

import sys
import unicodedata
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from aggregation.errors import DataError

F = TypeVar("F", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)

state_dir = click.option(
    "--state", "state_dir", type=FOLDER, required=True, metavar="DIR", help="The device's state directory."
)
bundle = click.option("--bundle", type=FOLDER, required=True, metavar="DIR", help="The bundle's folder.")
trust = click.option(
    "--trust", type=FOLDER, metavar="FILE", help="Pinned public keys. Default: trust.pem next to the bundle."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def sampling(command: F) -> F:
    """Add an option for each field of ``client.inference.SamplingParams``."""
    for option in (
        click.option("--stop", multiple=True, metavar="TEXT", help="End an answer before TEXT; may be repeated."),
        click.option("--seed", type=int, metavar="N", help="Equal seeds give equal answers."),
        click.option("--top-k", type=int, default=0, metavar="K", help="Sample from the K most likely tokens; 0: all."),
        click.option(
            "--top-p", type=float, default=1.0, metavar="P", help="Sample from the fewest tokens of probability P."
        ),
        click.option("--temperature", type=float, default=0.0, metavar="T", help="0: always the most likely token."),
        click.option("--max-tokens", type=int, default=256, metavar="N", help="Limit of an answer.", show_default=True),
    ):
        command = option(command)
    return command


def standard_input() -> TextIOWrapper:
    """Standard input. Bytes that are not UTF-8 become surrogates, which ``text.checked`` refuses.

    Raises:
        DataError: Standard input is closed.
    """
    if sys.stdin is None:
        raise DataError("standard input is closed; give the text as an argument, or open it", about="stdin")
    stream = cast(TextIOWrapper, sys.stdin)
    stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    return stream


def printable(text: str) -> str:
    """Remove control characters, with which the text of a model could move the cursor or set the terminal's title.

    >>> printable("\\x1b[31mred\\n")
    '[31mred\\n'
    """
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")
