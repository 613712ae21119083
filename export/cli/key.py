"""``edgeadapt bundle key``: make a signing key."""

from pathlib import Path

import click

from aggregation.entropy import SystemEntropy
from edgeadapt.commandline import FOLDER, as_json, print_result
from edgeadapt.formats.keyfiles import make_key


@click.command()
@click.argument("path", type=FOLDER, metavar="KEY.pem")
@as_json
def key(path: Path, as_json: bool) -> None:
    """Make a signing key (Ed25519) in KEY.pem, readable by you alone, and its public half in KEY.pub.pem.

    \b
    Example:
      edgeadapt bundle key vendor.pem && cp vendor.pub.pem trust.pem
    """
    private, public = make_key(path, SystemEntropy())
    print_result(
        {"key": str(path), "public": str(public), "id": private.public.key_id},
        f"key {private.public.key_id} in {path}; devices pin {public} in their trust.pem",
        as_json,
    )
