"""``edgeadapt device web``: serves the page that runs a bundle in a browser."""

from pathlib import Path

import click

from client.browser.server import Site, http_server
from client.cli import options
from edgeadapt import commandline
from edgeadapt.commandline import option


@click.command("serve-web")
@commandline.bundle()
@options.trust
@option("--gateway URL", "Let the page connect there too: wss://HOST:PORT of a coordinator.", default="")
@option("--enrolment URL", "With --gateway: the same of the authority, for enrolment by a token.", default="")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on.")
@click.option("--port", default=8765, show_default=True, type=click.IntRange(0, 65535), help="0: any free port.")
@option("--export DIR", "Write the page and bundle to DIR; do not serve.", name="out", type=commandline.FOLDER)
@commandline.as_json
def serve_web(
    bundle: Path,
    trust: Path | None,
    gateway: str,
    enrolment: str,
    host: str,
    port: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Serve a page that verifies the bundle and runs it in the browser, or export the page to a folder.

    The texts that are typed on the page stay in the browser. Browsers verify signatures only on https pages and on
    localhost, so serve an exported page over TLS (docs/how-to/browser.md lists the headers to send).

    \b
    Examples:
      edgeadapt device web --bundle runs/demo/bundle
      edgeadapt device web --bundle runs/demo/bundle --export site
    """
    site = Site.of(bundle, trust, gateway, enrolment)
    if out is not None:
        site.export(out)
        commandline.print_result({"folder": str(out)}, f"wrote {out}", as_json)
        return
    with http_server(site, host, port) as serving:
        url = f"http://{host}:{serving.server_port}/"
        commandline.print_result({"url": url}, f"serving at {url} until Ctrl-C", as_json)
        serving.serve_forever()
