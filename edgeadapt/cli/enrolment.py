"""``edgeadapt authority serve``, the command of the authority that needs more than the bare install."""

import threading
from pathlib import Path

import click

from edgeadapt.authority import AuthorityStore
from edgeadapt.cli.authority import folder, passphrase_file, unlock
from edgeadapt.commandline import as_lines, number_option, option, quiet, show_log


@click.command()
@folder
@click.option("--listen", required=True, metavar="HOST:PORT", help="Address for light devices.")
@click.option("--host", "hosts", multiple=True, required=True, metavar="HOST", help="Name or IP; may be repeated.")
@click.option("--websocket", default="", metavar="HOST:PORT", help="Address for pages in a browser, besides.")
@option("--origin URL", "Of pages that are not on loopback; may be repeated.", name="origins", multiple=True)
@number_option("--days", "Validity of certificates.", 1, 3650, default=365)
@passphrase_file
@quiet
@as_lines
def serve(
    folder: Path,
    listen: str,
    hosts: tuple[str, ...],
    websocket: str,
    origins: tuple[str, ...],
    days: int,
    passphrase_file: Path | None,
    as_json: bool,
) -> None:
    """Certify the keys of devices that have an invitation, and again before their certificates end, until Ctrl-C.

    Run it where the authority's key is, never on the coordinator's machine. HOST are the names and addresses at which
    devices reach it, as in their invitations. A device whose certificate has expired or was revoked enrols again.

    \b
    Examples:
      edgeadapt authority serve authority --listen 0.0.0.0:9444 --host authority.example
      edgeadapt authority serve authority --listen 0.0.0.0:9444 --host authority.example \\
        --websocket 0.0.0.0:9446 --origin https://fleet.example
      edgeadapt authority serve authority --listen 0.0.0.0:9444 --host authority.example --json
    """
    from coordinator.gateway.carriers import BrowserSettings
    from coordinator.gateway.enrolment import EnrolmentServer, EnrolmentService
    from edgeadapt.formats.gateway.messages import ENROL

    store = AuthorityStore(folder)
    service = EnrolmentService(store, unlock(store, passphrase_file), days)
    browsers = BrowserSettings(websocket, frozenset(origins)) if websocket else None
    server = EnrolmentServer(service, listen, hosts, browsers)
    log, address = show_log(as_json), f"{listen.rpartition(':')[0]}:{server.port}"
    log.info("listening at %s", address, extra={"address": address})
    if url := server.url(ENROL):
        log.info("pages enrol at %s", url, extra={"url": url})
    try:
        threading.Event().wait()
    finally:
        server.close()
