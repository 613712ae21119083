"""Options that several commands of a device share."""

import sys
from collections.abc import Callable, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from aggregation.errors import DataError

if TYPE_CHECKING:
    from client.inference.options import Options

F = TypeVar("F", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)

state_dir = click.option("--state", "state_dir", type=FOLDER, required=True, metavar="DIR", help="The device's folder.")
bundle = click.option("--bundle", type=FOLDER, required=True, metavar="DIR", help="The bundle's folder.")
trust = click.option(
    "--trust", type=FOLDER, metavar="FILE", help="Pinned public keys. Default: trust.pem beside the bundle."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def drawing(command: F) -> F:
    """The options of ``client.inference.options.Options``; a command hands the keywords that it gets to ``drawn``."""
    for option in reversed(
        (
            click.option("--max-tokens", type=int, default=256, metavar="N", help="Longest answer.", show_default=True),
            click.option("--temperature", type=float, default=0.0, metavar="T", help="0: always the likeliest token."),
            click.option("--top-p", type=float, default=1.0, metavar="P", help="Draw within this share only."),
            click.option("--top-k", type=int, default=0, metavar="K", help="Draw among so many tokens only; 0: all."),
            click.option("--seed", type=int, metavar="N", help="Draw the same answer again."),
            click.option("--stop", multiple=True, metavar="TEXT", help="End an answer before TEXT; may be repeated."),
        )
    ):
        command = option(command)
    return command


def drawn(given: Mapping[str, Any]) -> "Options":
    """What ``drawing`` took. Raises ConfigError for a value out of range."""
    from client.inference.options import Options

    return Options(**given)


def standard_input() -> TextIOWrapper:
    """Standard input, whose bytes that are no UTF-8 become surrogates: who takes a text refuses it with a line.

    Raises:
        DataError: It is closed.
    """
    if sys.stdin is None:
        raise DataError("standard input is closed; give the text as an argument, or open it")
    stream = cast(TextIOWrapper, sys.stdin)
    stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    return stream
