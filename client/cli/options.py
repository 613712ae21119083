"""Options, input and output that several commands of a device share."""

import sys
import unicodedata
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from adapters.storage import read
from aggregation.errors import ConfigError, DataError

if TYPE_CHECKING:
    from client.inference.text import SamplingParams

F = TypeVar("F", bound=Callable[..., Any])

FOLDER = click.Path(path_type=Path)
MAX_GUIDE_FILE = 2**18  # bytes; UTF-8 has up to four for a character
FILE = click.Path(path_type=Path, dir_okay=False)
FILE_OR_INPUT = click.Path(path_type=Path, dir_okay=False, allow_dash=True)

state_dir = click.option(
    "--state", "state_dir", type=FOLDER, required=True, metavar="DIR", help="The device's state directory."
)
bundle = click.option("--bundle", type=FOLDER, required=True, metavar="DIR", help="The bundle's folder.")
trust = click.option(
    "--trust", type=FOLDER, metavar="FILE", help="Pinned public keys. Default: trust.pem next to the bundle."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def words(label: str) -> str:
    """A label as a person reads it."""
    return printable(label.replace("_", " ").strip() or label)


def warn_of_unread(text: str, unread: int) -> None:
    """Print a line on standard error if the model leaves out tokens at the end of a text."""
    if unread:
        start = " ".join(printable(text[:40]).split())
        click.echo(f"edgeadapt: the last {unread} tokens of {start!r} … are not read: shorten the text", err=True)


def sampling(command: F) -> F:
    """Add an option for each field of ``client.inference.SamplingParams``; ``params_of`` reads them."""
    for option in (
        click.option("--grammar", type=FILE, metavar="FILE", help="Answer by this Lark grammar."),
        click.option("--regex", metavar="PATTERN", help="Answer with a text that matches PATTERN as a whole."),
        click.option("--json-schema", type=FILE, metavar="FILE", help="Answer with JSON that matches this schema."),
        click.option(
            "--beams",
            type=int,
            default=1,
            metavar="N",
            help="Search for the most likely answer with N at once; it is shown when it is complete.",
        ),
        click.option(
            "--repetition-penalty", type=float, default=1.0, metavar="X", help="Above 1: avoid words that occurred."
        ),
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


def params_of(json_schema: Path | None, regex: str | None, grammar: Path | None, **sampling: Any) -> "SamplingParams":
    """What the options of ``sampling`` say.

    Raises:
        ConfigError: A value is out of range, there is more than one guide, or its file is missing.
        DataError: The file is too large or is not UTF-8.
    """
    from client.inference.guide import Guide, GuideKind
    from client.inference.text import SamplingParams

    given: list[tuple[GuideKind, Path | str | None]] = [
        (GuideKind.JSON_SCHEMA, json_schema),
        (GuideKind.REGEX, regex),
        (GuideKind.GRAMMAR, grammar),
    ]
    guides = [(kind, value) for kind, value in given if value is not None]
    if len(guides) > 1:
        raise ConfigError("an answer has one form: give one of --json-schema, --regex and --grammar", about="guide")
    sources = [Guide(kind, _text(value) if isinstance(value, Path) else value) for kind, value in guides]
    return SamplingParams(guide=sources[0] if sources else None, **sampling)


def _text(path: Path) -> str:
    try:
        return read(path, MAX_GUIDE_FILE).decode()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", about=path.name) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8", about=path.name) from error


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


def secret_line(path: Path, limit: int) -> str:
    """The first line of a file, of a pipe, or of standard input if ``path`` is ``-``.

    A secret comes this way because arguments of a command are shown to every user of the machine.

    Args:
        path: What to read.
        limit: Characters, after which the rest of the line is left out.

    Returns:
        The line. Bytes that are not UTF-8 become surrogates.

    Raises:
        DataError: Standard input is closed.
        OSError: The file cannot be read.
    """
    if str(path) == "-":
        return standard_input().readline(limit).rstrip("\n")
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        return file.readline(limit).rstrip("\n")


def printable(text: str) -> str:
    """Remove control characters, with which the text of a model could move the cursor or set the terminal's title.

    >>> printable("\\x1b[31mred\\n")
    '[31mred\\n'
    """
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")
