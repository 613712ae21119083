"""Options that several commands of a device share."""

from pathlib import Path

import click

FOLDER = click.Path(path_type=Path)

bundle = click.option("--bundle", type=FOLDER, required=True, metavar="DIR", help="The bundle's folder.")
trust = click.option(
    "--trust", type=FOLDER, metavar="FILE", help="Pinned public keys. Default: trust.pem beside the bundle."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
