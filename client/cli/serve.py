"""``edgeadapt device serve``: answers many tenants by HTTP and gRPC."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import click

from aggregation.errors import ConfigError
from client.browser.server import LOCAL
from client.cli import options
from client.inference.library import Library
from edgeadapt import commandline


@click.command("serve")
@commandline.bundle()
@options.trust
@click.option("--host", default=LOCAL[0], show_default=True, metavar="ADDRESS", help="Address to listen on.")
@click.option("--port", default=8081, show_default=True, type=click.IntRange(0, 65535), help="0: any free port.")
@click.option("--grpc-port", type=click.IntRange(0, 65535), help="Answer calls of gRPC as well; 0: any free port.")
@click.option("--tenants", type=commandline.FILE, metavar="FILE", help="Who may use what; TOML, as above.")
@click.option("--certificate", type=commandline.FILE, metavar="FILE", help="TLS certificate, PEM.")
@click.option("--key", type=commandline.FILE, metavar="FILE", help="Its key, PEM.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 256), help="Threads of the model.")
@click.option("--memory", default=256, show_default=True, type=click.IntRange(1), help="MiB of adapters in memory.")
@commandline.as_json
def serve(bundle: Path, trust: Path | None, host: str, port: int, as_json: bool, **given: Any) -> None:
    """Answer requests in the form of OpenAI's interface: a model is an adapter of the bundle.

    Without --tenants, everybody on this machine may use every adapter. FILE has a table [tenants.NAME] for each tenant:
    token_sha256, adapters (names or patterns), and if need be requests_per_minute, waiting (most unanswered requests)
    and metrics = true (may read /metrics). It is read again when it changes. Another --host needs --tenants,
    --certificate and --key.

    \b
    Examples:
      edgeadapt device serve --bundle runs/demo/bundle
      edgeadapt device serve --bundle bundle --grpc-port 8082
      edgeadapt device serve --bundle bundle --host 0.0.0.0 --tenants tenants.toml --certificate tls.pem --key tls.key
    """
    from client.inference import server

    local, tls, file = host in LOCAL, (given["certificate"], given["key"]), given["tenants"]
    if not (any(tls) and all(tls) and file) and (any(tls) or not local):
        raise ConfigError(f"--tenants, --certificate and --key go together, and {host} needs them", about="--host")
    tenants = server.Tenants.read(file) if file else None
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = f"nothing can listen at {host}:{port} ({error.strerror}); choose another --host or --port"
        raise ConfigError(reason, about="--port") from error
    with listening:
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else an answer waits 40 ms for the first ACK
        library = Library.open(bundle, trust, update=options.update)
        service = server.Service(library, tenants, given["threads"], given["memory"] * 2**20)
        if file:
            service.watch(file)
        runner = server.server_of(service, LOCAL if local else ("*",), tls if any(tls) else None)
        url = f"http{'s' * any(tls)}://{host}:{listening.getsockname()[1]}"

        async def answer() -> None:
            served = {"url": url}
            if given["grpc_port"] is not None:
                from client.inference import grpcserver

                address = f"{f'[{host}]' if ':' in host else host}:{given['grpc_port']}"
                runner.calls, port = await grpcserver.begin(service, address, tls if any(tls) else None)
                served["grpc"] = f"{address.rpartition(':')[0]}:{port}"
            commandline.print_result(served, f"serving at {' and '.join(served.values())} until Ctrl-C", as_json)
            await runner.serve([listening])

        asyncio.run(answer())
