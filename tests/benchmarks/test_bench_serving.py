"""The benchmark of the server runs it, and sees an answer of a foreign adapter."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from click.testing import CliRunner

from benchmarks import serving
from benchmarks.__main__ import bench
from tests.support.models import tiny_base as tiny_base


class _Confused(BaseHTTPRequestHandler):
    """Answers everybody with the adapter of the first tenant."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps({"data": [{"intents": [{"intent": "t1-0"}]}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_foreign_answer_is_counted() -> None:
    with HTTPServer(("127.0.0.1", 0), _Confused) as confused:
        threading.Thread(target=confused.serve_forever, daemon=True).start()
        found = serving._ask(confused.server_port, [1, 11, 1, 2], 2)
        confused.shutdown()
    assert (found["calls"], found["foreign"]) == (4, 2)


def test_a_real_server_is_measured(tiny_base: Any) -> None:
    sizes = ["--adapters", "3", "--calls", "16", "--repeats", "1", "--threads", "2"]
    result = CliRunner().invoke(bench, ["serving", "--base", str(tiny_base.folder), *sizes, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["server"]["calls"]["median"], found["server"]["foreign"]["max"]) == (16, 0)
    assert found["PEFT and torch"]["calls"]["median"] == 16
    assert "foreign" in serving.table(found)
