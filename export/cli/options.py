"""The options that commands of ``edgeadapt export`` share, and how their values are read."""

import json
from pathlib import Path
from typing import Any

import click

from aggregation.errors import ConfigError, DataError
from export.bundle import sources

FOLDER = click.Path(path_type=Path)
MAX_LIST = 2**24  # bytes of a file of texts or labels

out_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
signed_by = click.option(
    "--key", "key_file", type=FOLDER, required=True, metavar="KEY.pem", help="Private key that signs; see 'key'."
)
from_registry = click.option(
    "--registry", type=FOLDER, metavar="DIR", help="A coordinator's state directory with a registry."
)
from_folder = click.option("--peft", "peft_folder", type=FOLDER, metavar="DIR", help="A folder that peft saved.")
which = click.option(
    "--version",
    type=click.IntRange(0, 2**63 - 1),
    metavar="N",
    help="Version. Default: the newest; of a PEFT folder 1.",
)
pinned = click.option(
    "--trust",
    type=FOLDER,
    metavar="FILE",
    help="Public keys. Default: the registry's own, or trust.pem in the folder that holds the bundle.",
)
the_labels = click.option(
    "--labels", type=FOLDER, metavar="FILE", help="Of a PEFT folder: the labels of its head, one a line, in order."
)


def origin_of(
    registry: Path | None, folder: Path | None, version: int | None, trust: Path | None, labels: Path | None
) -> sources.Origin:
    """The adapter that ``--registry`` or ``--peft`` names.

    Raises:
        ConfigError: Both or neither is named, or labels are given for a registry, which states its own.
        EdgeAdaptError: As ``sources.from_registry`` and ``sources.from_peft``.
    """
    if folder is not None and registry is None:
        return sources.from_peft(folder, 1 if version is None else version, lines_of(labels, "label") if labels else ())
    if registry is None or folder is not None:
        raise ConfigError("name one source of the adapter: --registry DIR or --peft DIR", about="--registry")
    if labels is not None:
        raise ConfigError("--labels is for a PEFT folder; a registry states its labels itself", about="--labels")
    return sources.from_registry(registry, version, trust)


def lines_of(path: Path, what: str) -> tuple[str, ...]:
    """The lines of a UTF-8 file that are not blank.

    Args:
        path: The file.
        what: What a line of it is, for a message.

    Raises:
        ConfigError: There is no such file.
        DataError: It is not UTF-8, too large, or has no line.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_LIST + 1)
        rows = tuple(line.strip() for line in raw.decode().splitlines() if line.strip())
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}", about=path.name) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8", about=path.name) from error
    if len(raw) > MAX_LIST or not rows:
        raise DataError(f"{path} must hold one {what} a line, at most {MAX_LIST} bytes in all", about=path.name)
    return rows


def say(row: dict[str, Any], line: str, as_json: bool) -> None:
    """Print ``row`` as one JSON object, or ``line`` for a person."""
    click.echo(json.dumps(row, ensure_ascii=False) if as_json else line)
