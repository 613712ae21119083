"""The arguments and options that several commands of the coordinator share."""

from pathlib import Path

import click

directory = click.argument("state_dir", type=click.Path(path_type=Path), metavar="DIR")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
