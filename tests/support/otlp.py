"""A receiver of OpenTelemetry's spans: OTLP over HTTP, with protobuf."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Receiver:
    url: str
    bodies: list[bytes] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def spans(self) -> list[Any]:
        """All spans, in the order in which they began."""
        scopes = (scope for resource in self._resources() for scope in resource.scope_spans)
        found = [span for scope in scopes for span in scope.spans]
        return sorted(found, key=lambda span: span.start_time_unix_nano)

    def services(self) -> set[str]:
        found = (one for each in self._resources() for one in each.resource.attributes)
        return {one.value.string_value for one in found if one.key == "service.name"}

    def _resources(self) -> list[Any]:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        return [each for body in self.bodies for each in ExportTraceServiceRequest.FromString(body).resource_spans]


def attributes(span: Any) -> dict[str, Any]:
    """Of a span: key → value."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver at a free port of this machine, while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.paths.append(self.path)
            found.headers.append(dict(self.headers))
            found.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Receiver(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
