"""The benchmark of the server runs it, and sees an answer of a foreign adapter."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

from click.testing import CliRunner

from benchmarks import serving, writing
from benchmarks.__main__ import bench
from tests.support import models

globals().update(models.FIXTURES)


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


def test_the_server_of_a_language_model_is_measured(make_lm: Any) -> None:
    base, sizes = make_lm(max_position_embeddings=128), ["--adapters", "3", "--calls", "8", "--repeats", "1"]
    result = CliRunner().invoke(bench, ["serving", "--base", str(base.folder), *sizes, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["server"]["answers"]["median"], found["server"]["foreign"]["max"]) == (8, 0)
    assert found["PEFT and torch"]["tokens/s"]["min"] > 0


def test_an_answer_of_another_adapter_is_foreign_and_one_of_none_is_not() -> None:
    alone: Any = SimpleNamespace(complete=lambda prompt, params, name: [f"{name}: ", prompt[:2]])
    texts = [f"{name}: {writing._prompt(at)[:2]}, and so on" for at, name in enumerate(("t1", "t2", "t9", "t2"))]
    assert writing._foreign(alone, [1, 1, 1, 2], texts) == (2, 1)
