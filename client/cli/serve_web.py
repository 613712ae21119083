"""``edgeadapt device serve-web``: the page that runs a bundle in a browser."""

from pathlib import Path

import click

from client.cli import options


@click.command("serve-web")
@options.bundle
@options.trust
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to serve at.")
@click.option(
    "--port", default=8765, show_default=True, type=click.IntRange(0, 65535), help="0 takes one that is free."
)
@click.option(
    "--export", "out", type=options.FOLDER, metavar="DIR", help="Write the page and the bundle to DIR instead."
)
def serve_web(bundle: Path, trust: Path | None, host: str, port: int, out: Path | None) -> None:
    """Serve a page that verifies the bundle and runs it in the browser; or write that page to a folder.

    The page and what is written on it stay on this machine. Browsers verify signatures on https pages and on localhost
    only, so what --export wrote belongs on a server with TLS (docs/how-to/browser.md names the headers it should send).

    \b
    Examples:
      edgeadapt device serve-web --bundle runs/demo/bundle
      edgeadapt device serve-web --bundle runs/demo/bundle --export site
    """
    from client.browser.server import Site, server

    site = Site.of(bundle, trust)
    if out is not None:
        site.export(out)
        click.echo(f"wrote {out}")
        return
    with server(site, host, port) as serving:
        click.echo(f"serving at http://{host}:{serving.server_port}/ until Ctrl-C")
        serving.serve_forever()
