"""What several commands of ``edgeadapt export`` have in common: their options, and how these are read and answered."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aggregation.errors import ConfigError, DataError

if TYPE_CHECKING:  # importing it takes a good part of a start, and `--help` needs none of it
    from export.bundle.sources import Origin

FOLDER = click.Path(path_type=Path)
MAX_LIST = 2**24  # bytes of a file of texts or labels

out_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
signed_by = click.option(
    "--key", "key_file", type=FOLDER, required=True, metavar="KEY.pem", help="Private key that signs; see 'key'."
)
from_registry = click.option("--registry", type=FOLDER, metavar="DIR", help="Coordinator's home with a registry.")
from_folder = click.option("--peft", "peft_folder", type=FOLDER, metavar="DIR", help="A folder that peft saved.")
which = click.option(
    "--version",
    type=click.IntRange(0, 2**63 - 1),
    metavar="N",
    help="Version. Default: the newest; of a PEFT folder 1.",
)
pinned = click.option(
    "--trust", type=FOLDER, metavar="FILE", help="Public keys. Default: the registry's own, or beside the bundle."
)
the_labels = click.option(
    "--labels", type=FOLDER, metavar="FILE", help="Of a PEFT folder: the labels of its head, one a line, in order."
)


def origin_of(
    registry: Path | None, folder: Path | None, version: int | None, trust: Path | None, labels: Path | None
) -> "Origin":
    """The adapter that ``--registry`` or ``--peft`` names.

    Raises:
        ConfigError: Both or neither is named, or labels come with a registry, which says its own.
        EdgeAdaptError: As ``sources.from_registry`` and ``sources.from_peft``.
    """
    from export.bundle import sources

    if (registry is None) == (folder is None):
        raise ConfigError("name one source of the adapter: --registry DIR or --peft DIR")
    if folder is not None:
        return sources.from_peft(folder, 1 if version is None else version, lines_of(labels, "label") if labels else ())
    if labels is not None:
        raise ConfigError("--labels is for a PEFT folder; a registry says its labels itself")
    assert registry is not None  # noqa: S101  # one of the two is there
    return sources.from_registry(registry, version, trust)


def lines_of(path: Path, what: str) -> tuple[str, ...]:
    """The lines of a UTF-8 file that are not blank.

    Args:
        path: The file.
        what: A line of it, for a message.

    Raises:
        ConfigError: There is no such file.
        DataError: It is not UTF-8, too large, or holds no line.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_LIST + 1)
        rows = tuple(line.strip() for line in raw.decode().splitlines() if line.strip())
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8") from error
    if len(raw) > MAX_LIST or not rows:
        raise DataError(f"{path} must hold one {what} a line, at most {MAX_LIST} bytes in all")
    return rows


def say(row: dict[str, Any], line: str, as_json: bool) -> None:
    """Answer with ``row`` as one JSON object, or with ``line`` for a person."""
    click.echo(json.dumps(row, ensure_ascii=False) if as_json else line)
