"""The paths of ``server`` as calls of gRPC, whose messages are the JSON of HTTP.

A call runs the same application as a request, so tokens, quotas, queue, routes and guardrails are the same. All methods
answer with a stream of messages: one, or for ``"stream": true`` one for each event.
"""

import asyncio
import json
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from grpc import StatusCode, aio
from starlette.applications import Starlette

from aggregation.errors import ConfigError
from client.inference.server import MAX_BODY, MAX_CONNECTIONS, MAX_WAITING, Service
from edgeadapt.formats.gateway import messages

SERVICE = "edgeadapt.Adapters"
METHODS = {
    "Models": "/v1/models",
    "Classify": "/v1/classify",
    "Embeddings": "/v1/embeddings",
    "ChatCompletions": "/v1/chat/completions",
    "Completions": "/v1/completions",
}
CODES = {
    400: StatusCode.INVALID_ARGUMENT,
    401: StatusCode.UNAUTHENTICATED,
    404: StatusCode.NOT_FOUND,
    409: StatusCode.FAILED_PRECONDITION,
    422: StatusCode.DATA_LOSS,
    429: StatusCode.RESOURCE_EXHAUSTED,
    503: StatusCode.UNAVAILABLE,
}
EVENT, END, LAST = b"data: ", b"\n\n", b"[DONE]"  # of a stream of events
ERROR = b'{"error"'


async def begin(service: Service, address: str, tls: tuple[Path, Path] | None) -> tuple[aio.Server, int]:
    """Serve the calls of a bundle at HOST:PORT in the running loop, until the server is stopped. ``tls``: certificate
    and key. Returns server and port. Raises ConfigError: nothing can listen there, or the files cannot be used."""
    options = dict(messages.GATEWAY_OPTIONS) | {
        "grpc.max_receive_message_length": MAX_BODY,
        "grpc.max_concurrent_streams": MAX_WAITING,  # of one connection: each tenant has a limit of its own
        "grpc.max_allowed_incoming_connections": MAX_CONNECTIONS,
    }
    server = aio.server(options=tuple(options.items()), maximum_concurrent_rpcs=MAX_CONNECTIONS)
    app, paths = service.application(["*"]), service.paths
    calls = {
        name: grpc.unary_stream_rpc_method_handler(partial(_answer, app, path))
        for name, path in METHODS.items()
        if path in paths
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, calls),))
    try:
        if tls:
            certificate, key = (path.read_bytes() for path in tls)
            port = server.add_secure_port(address, grpc.ssl_server_credentials([(key, certificate)]))
        else:
            port = server.add_insecure_port(address)
    except (OSError, RuntimeError) as error:
        reason = f"nothing can listen at {address} for gRPC; choose another --grpc-port"
        raise ConfigError(reason, about="--grpc-port") from error
    await server.start()
    return server, port


async def _answer(app: Starlette, path: str, body: bytes, context: Any) -> AsyncGenerator[bytes, None]:
    """Run a request, and yield what it answers. A caller who goes is one who hangs up."""
    headers = [(key.encode(), value.encode()) for key, value in context.invocation_metadata() if key == "authorization"]
    gone, sent = asyncio.Event(), asyncio.Queue[dict[str, Any] | None]()
    given = iter([{"type": "http.request", "body": body}])

    async def receive() -> dict[str, Any]:
        if part := next(given, None):
            return part
        await gone.wait()
        return {"type": "http.disconnect"}

    method = "GET" if path == METHODS["Models"] else "POST"
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}
    work = asyncio.ensure_future(app(scope, receive, sent.put))  # type: ignore[arg-type]
    work.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        begun, said = await sent.get() or {}, b""
        while part := await sent.get():
            said += part.get("body", b"")
            if said.endswith(END):
                event, said = said.removeprefix(EVENT).strip(), b""
                if event.startswith(ERROR):
                    said = event
                    break
                if event != LAST:
                    yield event
        if said and not said.startswith(ERROR):
            yield said
        elif said:
            error, later = json.loads(said)["error"], dict(begun["headers"]).get(b"retry-after")
            context.set_trailing_metadata([("retry-after", later.decode())] if later else [])
            await context.abort(CODES.get(int(error["code"]), StatusCode.INTERNAL), error["message"])
    finally:
        gone.set()
        await asyncio.wait([work])
