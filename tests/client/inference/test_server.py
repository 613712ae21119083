"""A server answers each tenant with its own adapters and nothing of another's, and refuses the rest in one line."""

import asyncio
import base64
import hashlib
import itertools
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError
from aggregation.pki.authority import Authority
from aggregation.pki.identity import IdentityKey
from client.cli import device
from client.inference import server
from client.inference.generate import ChatMessage, Generator
from client.inference.library import Library
from client.inference.session import AUTO, ClassificationSession
from client.inference.text import SamplingParams
from edgeadapt.formats.policy import Policy
from export.bundle.write import AdapterSource, add_adapter
from export.onnx.exported import ExportedBase
from tests.client.inference.test_passages import encoder as encoder
from tests.support.bundles import flip
from tests.support.gateway import certify, wait_until
from tests.support.models import Source

TEXT = "turn on the kitchen lights"
TOKENS = {"anna": "a" * 32, "ben": "b" * 32}
Add = Callable[[AdapterSource], None]


def tenants(**limits: Any) -> server.Tenants:
    """Anna may use ``anna*`` and ``global``, Ben ``ben*``; ``limits`` are Ben's."""
    digest = {name: hashlib.sha256(token.encode()).hexdigest() for name, token in TOKENS.items()}
    anna = {"token_sha256": digest["anna"], "adapters": ["anna*", "global"], "metrics": True}
    return server.Tenants.parse(
        {"tenants": {"anna": anna, "ben": {"token_sha256": digest["ben"], "adapters": ["ben*"], **limits}}}, "test"
    )


@contextmanager
def calling(bundle: Path, of: server.Tenants | None = None, name: str = "") -> Iterator[TestClient]:
    """Call the application of a bundle, as a tenant if there is a ``name``."""
    app = server.Service(Library.open(bundle, None), of, 1, 2**28).application(["testserver"])
    headers = {"authorization": f"Bearer {TOKENS[name]}"} if name else {}
    with TestClient(app, headers=headers) as client:
        yield client


def problem(response: httpx.Response) -> str:
    """The line of a refusal, in OpenAI's form."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert error["code"] == str(response.status_code)
    assert "\n" not in error["message"]
    return str(error["message"])


@pytest.fixture
def two(bundle: Path, source: Source, add: Add) -> Path:
    add(source("anna", seed=7, parent="a" * 64))
    add(source("ben", seed=9, parent="a" * 64))
    return bundle


def test_a_text_is_answered_as_infer_answers_it(two: Path) -> None:
    with calling(two) as client:
        found = client.post("/v1/classify", json={"model": "anna", "input": [TEXT, "🔥"], "top": 2}).json()
    done = CliRunner().invoke(
        device, ["infer", "--bundle", str(two), "--adapter", "anna", "--json", "--top", "2", TEXT]
    )
    (expected,) = json.loads(done.stdout)["adapters"][0]["answers"]
    first, unknown = found["data"]
    assert first == {key: value for key, value in expected.items() if key != "text"} | {"index": 0, "adapter": "anna"}
    assert (unknown["outcome"], unknown["intents"], unknown["unknown"]) == ("unsure", [], 1)


def test_a_tenant_sees_and_uses_its_own_adapters_and_no_others(two: Path) -> None:
    of = tenants()
    with calling(two, of, "anna") as anna, calling(two, of, "ben") as ben:
        listed = [[one["id"] for one in each.get("/v1/models").json()["data"]] for each in (anna, ben)]
        assert listed == [["anna", "global", "base"], ["ben", "base"]]
        assert anna.post("/v1/classify", json={"model": "anna+global", "input": TEXT}).status_code == 200
        lines = set()
        for model in ("anna", "nobody", "global+ben", "../base/model", "", "ben:", AUTO, "base"):
            refusal = ben.post("/v1/classify", json={"model": model, "input": TEXT})
            assert refusal.status_code == 404, model
            lines.add(problem(refusal))
        assert len(lines) == 1  # one of another tenant looks like none
        assert ben.post("/v1/embeddings", json={"model": "anna", "input": TEXT}).status_code == 404


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", f"Basic {'a' * 32}", f"Bearer {'c' * 32}", "Bearer \xff"])
def test_who_has_no_token_of_a_tenant_gets_nothing(two: Path, header: str) -> None:
    with calling(two, tenants()) as client:
        for path in ("/v1/models", "/metrics"):
            refusal = client.get(path, headers={"authorization": header.encode("latin-1")})
            assert (refusal.status_code, refusal.headers["www-authenticate"]) == (401, "Bearer")
            problem(refusal)
        assert (
            client.post("/v1/classify", content=b"{", headers={"authorization": header.encode("latin-1")}).status_code
            == 401
        )
        assert client.get("/health").text == "ok\n"


def test_only_a_tenant_that_may_reads_the_metrics(two: Path) -> None:
    of = tenants()
    with calling(two, of, "ben") as ben:
        assert ben.get("/metrics").status_code == 403
    with calling(two, of, "anna") as anna:
        anna.post("/v1/classify", json={"model": "anna", "input": [TEXT, TEXT]})
        anna.post("/v1/classify", json={"model": "ben", "input": TEXT})
        text = anna.get("/metrics").text
    assert 'edgeadapt_requests_total{path="/v1/classify",status="200",tenant="anna"} 1.0' in text
    assert 'edgeadapt_requests_total{path="/v1/classify",status="404",tenant="anna"} 1.0' in text
    assert "edgeadapt_rows_sum 2.0" in text
    assert "edgeadapt_waiting 0.0" in text
    assert TEXT not in text


BAD = {
    "no JSON": b"{",
    "empty": b"",
    "a list": b"[]",
    "deep": b'{"model": ' + b"[" * 5000,
    "no text": b'{"model": "global"}',
    "no texts": b'{"model": "global", "input": []}',
    "a number": b'{"model": "global", "input": 7}',
    "tokens": b'{"model": "global", "input": [1, 2]}',
    "many": json.dumps({"model": "global", "input": ["a"] * (server.MAX_TEXTS + 1)}).encode(),
    "top": b'{"model": "global", "input": "a", "top": 0}',
    "unknown key": b'{"model": "global", "input": "a", "tools": []}',
    "NUL": json.dumps({"model": "global", "input": "a\0"}).encode(),
    "surrogate": b'{"model": "global", "input": "\\ud800"}',
    "long text": json.dumps({"model": "global", "input": "a" * 70_000}).encode(),
    "not UTF-8": b'{"model": "global", "input": "\xff"}',
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_a_bad_body_is_refused_in_one_line(bundle: Path, body: bytes) -> None:
    with calling(bundle) as client:
        refusal = client.post("/v1/classify", content=body)
        assert refusal.status_code == 400
        assert problem(refusal)
        assert client.post("/v1/classify", json={"model": "global", "input": TEXT}).status_code == 200


def test_a_body_that_does_not_come_is_waited_for_no_longer(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PATIENCE", 0.0)

    class Slow(Caller):
        async def _receive(self) -> dict[str, Any]:
            await self.gone.wait()
            return {}

    async def run() -> None:
        app = server.Service(Library.open(bundle, None), None, 1, 2**28).application(["testserver"])
        caller = Slow(app, "/v1/classify")
        assert "did not come" in (await caller.json())["error"]["message"]
        assert caller.status == 408

    asyncio.run(run())


def test_a_failure_of_the_server_shows_no_text(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    service = server.Service(Library.open(bundle, None), None, 1, 2**28)
    ranked, service._model.rankings = service._model.rankings, lambda rows, top: [][rows[0][0]]
    with TestClient(service.application(["testserver"])) as client:
        refusal = client.post("/v1/classify", json={"model": "global", "input": TEXT})
        assert (refusal.status_code, problem(refusal)) == (500, "the server failed: TypeError")
        service._model.rankings = ranked
        assert client.post("/v1/classify", json={"model": "global", "input": TEXT}).status_code == 200
    assert TEXT not in "".join(capfd.readouterr())


def test_embeddings_are_those_of_the_base(encoder: Path) -> None:
    expected = ClassificationSession.open(encoder).embed([TEXT, "play music"])
    with calling(encoder) as client:
        for coding in ("float", "base64"):
            body = {"model": "base", "input": [TEXT, "play music"], "encoding_format": coding}
            found = client.post("/v1/embeddings", json=body).json()
            rows = [one["embedding"] for one in found["data"]]
            if coding == "base64":
                rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
            np.testing.assert_allclose(rows, expected, atol=1e-6)
        assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] > 2
        assert client.post("/v1/embeddings", json={"model": "base", "input": [TEXT, ""]}).status_code == 400


def test_an_oversized_body_is_refused(bundle: Path) -> None:
    with calling(bundle) as client:
        body = json.dumps({"model": "global", "input": "a"}).encode()
        assert client.post("/v1/classify", content=body.ljust(server.MAX_BODY)).status_code == 200
        refusal = client.post("/v1/classify", content=body.ljust(server.MAX_BODY + 1))
        assert (refusal.status_code, refusal.headers["connection"]) == (413, "close")
        problem(refusal)


def test_a_foreign_site_is_refused(bundle: Path) -> None:
    with calling(bundle) as client:
        assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 400


def test_each_text_counts_in_the_quota_of_its_tenant(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(server, "time", SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter))
    of = tenants(requests_per_minute=6)
    with calling(two, of, "ben") as ben:
        assert ben.post("/v1/classify", json={"model": "ben", "input": [TEXT] * 8}).status_code == 200
        refusal = ben.post("/v1/classify", json={"model": "ben", "input": TEXT})
        assert (refusal.status_code, refusal.headers["retry-after"]) == (429, "30")
        problem(refusal)
        now += 29.5
        assert ben.post("/v1/classify", json={"model": "ben", "input": TEXT}).status_code == 429
        now += 1
        assert ben.post("/v1/classify", json={"model": "ben", "input": TEXT}).status_code == 200
    with calling(two, of, "anna") as anna:
        assert anna.post("/v1/classify", json={"model": "anna", "input": TEXT}).status_code == 200


def test_a_broken_or_outdated_adapter_says_why_and_harms_no_other(
    two: Path, source: Source, add: Add, exported: ExportedBase
) -> None:
    with calling(two) as client:
        ask = lambda model: client.post("/v1/classify", json={"model": model, "input": TEXT})  # noqa: E731
        first = ask("ben").json()
        old = {path: path.read_bytes() for path in (two / "adapters").glob("ben.*")}
        add(source("ben", seed=11, version=4, parent="a" * 64))
        replaced = ask("ben").json()
        assert replaced["data"][0]["intents"] != first["data"][0]["intents"]  # under way
        for path, content in old.items():
            path.write_bytes(content)
        outdated = ask("ben")
        assert outdated.status_code == 409
        assert "version 4 was accepted" in problem(outdated)
        flip(two / "adapters/anna.onnx_adapter", 0.9)
        assert ask("anna").status_code == 409
        (two / "adapters/anna.onnx_adapter").unlink()
        assert ask("anna").status_code == 422
        assert ask("global").status_code == 200


def test_the_router_chooses_among_the_tenants_adapters(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"x": "ben"}
    monkeypatch.setattr(ClassificationSession, "route", lambda self, found, has: chosen["x"])
    monkeypatch.setattr(server, "ROUTER", "anna")
    with calling(two, tenants(), "anna") as client:
        assert client.get("/v1/models").json()["data"][-2]["id"] == AUTO
        assert client.post("/v1/classify", json={"model": AUTO, "input": TEXT}).status_code == 404
        chosen["x"] = "global"
        (row,) = client.post("/v1/classify", json={"model": AUTO, "input": TEXT}).json()["data"]
        assert row["adapter"] == "global"


def test_the_policy_holds(bundle: Path, exported: ExportedBase, source: Source, vendor: IdentityKey) -> None:
    policy = Policy(input=("kitchen",), denied="Not from here.")
    add_adapter(bundle, exported.adapter_inputs, replace(source(version=4), policy=policy), key=vendor)
    with calling(bundle) as client:
        (row,) = client.post("/v1/classify", json={"model": "global", "input": TEXT}).json()["data"]
    assert (row["outcome"], row["says"], row["intents"]) == ("blocked", "Not from here.", [])


# What waits, and who hangs up.

Call = Callable[..., Any]


class Caller:
    """Calls an application as uvicorn does, in this event loop. ``gone`` hangs up."""

    def __init__(self, app: Any, path: str, token: str = "", **body: Any) -> None:
        self.gone, self.text, self.status, self._sent = asyncio.Event(), "", 0, False
        self._body = json.dumps(body).encode()
        headers = [(b"host", b"testserver"), (b"authorization", f"Bearer {token}".encode())]
        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
        scope |= {"method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
        scope |= {"scheme": "http", "server": ("testserver", 80), "client": ("127.0.0.1", 1), "root_path": ""}
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.status = message.get("status", self.status)
        self.text += message.get("body", b"").decode()

    async def json(self) -> Any:
        await asyncio.wait_for(self.task, 60)
        return json.loads(self.text)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0)


class Gate:
    """Lets one call after another of a session through, and notes the rows of each."""

    def __init__(self, service: Any) -> None:
        self.open, self.runs, self._call = threading.Semaphore(0), list[list[Any]](), service._model.rankings
        service._model.rankings = self._rankings

    def _rankings(self, rows: Any, top: int) -> Any:
        self.runs.append([(text, str(name)) for text, name in rows])
        assert self.open.acquire(timeout=60)
        return self._call(rows, top)


def test_texts_that_wait_are_one_run_and_each_tenant_gets_its_own_answer(two: Path) -> None:
    async def run() -> None:
        service = server.Service(Library.open(two, None), tenants(), 1, 2**28)
        gate, app = Gate(service), service.application(["testserver"])
        alone = {name: service._model.ranking(TEXT, name, 3).to_json()["intents"] for name in ("anna", "ben")}
        assert alone["anna"] != alone["ben"]
        ask = lambda name, **more: Caller(app, "/v1/classify", TOKENS[name], model=name, input=TEXT, **more)  # noqa: E731
        first = ask("anna")
        await until(lambda: len(gate.runs) == 1)
        waiting = [ask("ben", top=3), ask("anna", top=3), ask("ben", top=1)]
        gone = ask("anna")
        await until(lambda: service._waiting == 5)
        gone.gone.set()
        await until(lambda: service._waiting == 4)
        gate.open.release(2)
        assert [len((await first.json())["data"][0]["intents"])] == [1]
        for caller, name, top in zip(waiting, ("ben", "anna", "ben"), (3, 3, 1), strict=True):
            (row,) = (await caller.json())["data"]
            assert (row["adapter"], [one["intent"] for one in row["intents"]]) == (
                name,
                [one["intent"] for one in alone[name][:top]],
            )
        assert gate.runs == [[(TEXT, "anna")], [(TEXT, "ben"), (TEXT, "anna"), (TEXT, "ben")]]
        assert (service._waiting, gone.status) == (0, 499)

    asyncio.run(run())


def test_one_who_hangs_up_while_a_run_is_under_way_costs_the_others_nothing(two: Path) -> None:
    async def run() -> None:
        service = server.Service(Library.open(two, None), None, 1, 2**28)
        gate, app = Gate(service), service.application(["testserver"])
        ask = lambda name: Caller(app, "/v1/classify", model=name, input=TEXT)  # noqa: E731
        ask("global")
        await until(lambda: len(gate.runs) == 1)
        leader = ask("anna")
        await until(lambda: len(service._rows) == 2)
        other = ask("ben")
        await until(lambda: len(service._rows) == 3)
        gate.open.release()
        await until(lambda: len(gate.runs) == 2)
        leader.gone.set()
        gate.open.release()
        assert (await other.json())["data"][0]["adapter"] == "ben"
        assert len(gate.runs) == 2
        await until(lambda: service._waiting == 0)

    asyncio.run(run())


def test_tenants_are_read_again_when_their_file_changes(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "REREAD", 0.0)
    file = tmp_path / "tenants.toml"

    changes = itertools.count(time.time_ns())

    def write(text: str) -> None:
        file.write_text(text)
        os.utime(file, ns=(now := next(changes), now))

    row = "[tenants.{0}]\ntoken_sha256 = '{1}'\nadapters = ['{0}']\nrequests_per_minute = {2}\n"
    digest = {name: hashlib.sha256(token.encode()).hexdigest() for name, token in TOKENS.items()}
    write(row.format("anna", digest["anna"], 2))
    service = server.Service(Library.open(two, None), server.Tenants.read(file), 1, 2**28)
    service.watch(file)

    def asked(name: str) -> int:
        head = {"Authorization": f"Bearer {TOKENS[name]}"}
        body = {"model": name, "input": TEXT}
        return client.post("/v1/classify", json=body, headers=head).status_code

    with TestClient(service.application(["testserver"])) as client:
        assert [asked("anna"), asked("ben")] == [200, 401]
        write(row.format("anna", digest["anna"], 2) + row.format("ben", digest["ben"], 9))
        assert [asked("anna"), asked("anna"), asked("ben")] == [200, 429, 200]  # a change gives no new quota
        write("[tenants.anna]\ntoken_sha256 = 'secret'\n")
        assert asked("ben") == 200
        file.unlink()
        assert asked("ben") == 200
        write(row.format("anna", digest["anna"], 2))
        assert asked("ben") == 401
    (said,) = [one.getMessage() for one in caplog.records if one.name == "edgeadapt.device"]
    assert said.startswith("the tenants stay as they were: ")
    assert "'secret'" not in said


def test_a_tenant_with_many_texts_keeps_no_other_waiting(two: Path) -> None:
    async def run() -> None:
        service = server.Service(Library.open(two, None), tenants(), 1, 2**28)
        gate, app = Gate(service), service.application(["testserver"])
        ask = lambda name, texts: Caller(app, "/v1/classify", TOKENS[name], model=name, input=texts)  # noqa: E731
        ask("anna", [TEXT])
        await until(lambda: len(gate.runs) == 1)
        many = ask("anna", [TEXT] * 100)
        await until(lambda: len(service._rows) == 101)
        few = ask("ben", [TEXT, TEXT])
        await until(lambda: len(service._rows) == 103)
        gate.open.release(2)
        assert len((await few.json())["data"]) == 2
        assert not many.task.done()
        gate.open.release(100)
        assert len((await many.json())["data"]) == 100
        assert Counter(name for _, name in gate.runs[1])["ben"] == 2

    asyncio.run(run())


def test_a_seat_goes_to_the_tenant_with_the_fewest_and_then_to_who_waited_longest() -> None:
    async def run() -> None:
        seats, taken = server.Seats(2), list[str]()

        async def take(name: str) -> None:
            await seats.take(name)
            taken.append(name)

        waits = [asyncio.create_task(take(name)) for name in ("a", "a", "a", "a", "b", "c")]
        await until(lambda: len(seats._waiting) == 4)
        waits[-1].cancel()
        await asyncio.wait(waits[-1:])
        for left in ("a", "a", "b", "a"):
            seats.leave(left)
            await asyncio.sleep(0)
        assert (taken, seats.free) == (["a", "a", "b", "a", "a"], 1)
        seats.leave("a")
        first, given = (asyncio.create_task(take(name)) for name in ("a", "b"))
        await asyncio.wait([first, given])
        late = asyncio.create_task(take("c"))
        await until(lambda: len(seats._waiting) == 1)
        seats.leave("a")
        late.cancel()  # in the moment in which it gets the seat
        await asyncio.wait([late])
        assert (late.cancelled(), seats.free) == (True, 1)

    asyncio.run(run())


def test_a_full_queue_and_a_server_that_stops_say_so(two: Path) -> None:
    async def run() -> None:
        service = server.Service(Library.open(two, None), tenants(waiting=1), 1, 2**28)
        gate, app = Gate(service), service.application(["testserver"])
        ask = lambda name: Caller(app, "/v1/classify", TOKENS[name], model=name, input=TEXT)  # noqa: E731
        running = ask("ben")
        await until(lambda: len(gate.runs) == 1)
        refusal = ask("ben")
        assert "full" in (await refusal.json())["error"]["message"]
        waits = ask("anna")  # whose places are its own
        await until(lambda: service._waiting == 2)
        service.stops = lambda: True
        gate.open.release()
        assert (await running.json())["data"]
        assert "stops" in (await waits.json())["error"]["message"]
        assert (refusal.status, waits.status, running.status) == (503, 503, 200)

    asyncio.run(run())


# Language models.

SAMPLING = {"max_tokens": 6, "model": "anna"}
MESSAGES = [{"role": "user", "content": "ab"}]


def written(bundle: Path, adapter: str | None = "anna", **params: Any) -> str:
    """What the generator answers to ``MESSAGES``."""
    given = SamplingParams(**{"max_tokens": 6, **params})
    return "".join(Generator.open(bundle, threads=1).answer([ChatMessage("user", "ab")], given, adapter))


def test_a_chat_is_answered_by_the_adapter_whole_and_in_pieces(lm_bundle: Path) -> None:
    expected = written(lm_bundle)
    assert expected != written(lm_bundle, "global")
    with calling(lm_bundle) as client:
        found = client.post("/v1/chat/completions", json={**SAMPLING, "messages": MESSAGES}).json()
        (choice,) = found["choices"]
        assert choice["message"] == {"role": "assistant", "content": expected}
        assert choice["finish_reason"] == "length"
        assert found["usage"]["completion_tokens"] == 6
        assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + 6
        options = {"stream": True, "stream_options": {"include_usage": True}}
        lines = client.post("/v1/chat/completions", json={**SAMPLING, **options, "messages": MESSAGES}).text
        *events, done, _ = lines.split("\n\n")
        rows = [json.loads(event.removeprefix("data: ")) for event in events]
        assert done == "data: [DONE]"
        assert rows[-1]["usage"] == found["usage"]
        deltas = [row["choices"][0]["delta"] for row in rows[:-1]]
        assert "".join(delta["content"] for delta in deltas) == expected
        assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert [row["choices"][0]["finish_reason"] for row in rows[:-1]] == [None] * (len(deltas) - 1) + ["length"]
        bare = client.post("/v1/chat/completions", json={**SAMPLING, "model": "base", "messages": MESSAGES}).json()
        assert bare["choices"][0]["message"]["content"] == written(lm_bundle, None)
        text = client.post("/v1/completions", json={**SAMPLING, "prompt": "ab", "stop": expected[0]}).json()
        assert set(text["choices"][0]) == {"index", "text", "finish_reason"}


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("chat/completions", {"messages": [{"role": "tool", "content": "a"}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "<|im_end|>"}]}),
        ("chat/completions", {"messages": MESSAGES, "temperature": -1}),
        ("chat/completions", {"messages": MESSAGES, "n": 2}),
        ("chat/completions", {"messages": MESSAGES, "stop": [""]}),
        ("chat/completions", {"messages": MESSAGES, "stream": True, "seed": -1}),
        ("chat/completions", {"messages": MESSAGES, "response_format": {"type": "json_object"}}),
        ("completions", {"prompt": ""}),
        ("completions", {"prompt": "a" * 300}),
    ],
)
def test_what_a_language_model_cannot_answer_is_refused(lm_bundle: Path, path: str, more: dict[str, Any]) -> None:
    with calling(lm_bundle) as client:
        refusal = client.post(f"/v1/{path}", json={**SAMPLING, **more})
        assert refusal.status_code == 400
        problem(refusal)


def test_what_the_policy_blocks_is_in_no_message(lm_bundle: Path, lm_source: Any, vendor: IdentityKey) -> None:
    given = replace(lm_source(), version=9, policy=Policy(input=("secret",), denied="No."))
    add_adapter(lm_bundle, given.adapter_inputs, given, key=vendor, form="fp32")
    with calling(lm_bundle) as client:
        for role in ("system", "user", "assistant"):
            said = [{"role": role, "content": "a Secret"}, *MESSAGES]
            found = client.post("/v1/chat/completions", json={**SAMPLING, "model": "global", "messages": said}).json()
            assert found["choices"][0] == {
                "index": 0,
                "message": {"role": "assistant", "content": "No."},
                "finish_reason": "content_filter",
            }


class Steps:
    """Notes how many answers each step of a model wrote; ``open`` lets steps through if ``held``."""

    def __init__(self, service: Any, held: bool = False) -> None:
        self.open, self.wrote, self.held, self._model = threading.Semaphore(0), list[int](), held, service._model
        self._step, self._model.step = self._model.step, self._stepped

    def _stepped(self) -> Any:
        assert not self.held or self.open.acquire(timeout=60)
        parts = self._step()
        self.wrote.append(self._model.writing)
        return parts


def asker(app: Any, **more: Any) -> Callable[..., Caller]:
    given = {**SAMPLING, **more}
    return lambda **own: Caller(app, "/v1/chat/completions", **{"messages": MESSAGES, **given, **own})


def test_answers_are_written_together_and_each_is_its_adapters(lm_bundle: Path) -> None:
    expected = {name: written(lm_bundle, name, max_tokens=30) for name in ("anna", "global", "anna+global")}

    async def run() -> None:
        service = server.Service(Library.open(lm_bundle, None), None, 1, 2**28)
        steps, ask = Steps(service, held=True), asker(service.application(["testserver"]), max_tokens=30)
        callers = [ask(model=name) for name in expected for _ in range(4)]
        await until(lambda: len(service._written) == len(callers))
        steps.open.release(1000)
        found = [(await one.json())["choices"][0]["message"]["content"] for one in callers]
        assert found == [text for text in expected.values() for _ in range(4)]
        assert max(steps.wrote) > 4
        assert service._registry.get_sample_value("edgeadapt_rows_sum") == sum(steps.wrote)

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_when_its_reader_hangs_up_and_others_go_on(lm_bundle: Path, stream: bool) -> None:
    async def run() -> None:
        service = server.Service(Library.open(lm_bundle, None), None, 1, 2**28)
        steps, app = Steps(service, held=True), service.application(["testserver"])
        first, second = asker(app, stream=stream)(max_tokens=200), asker(app)(max_tokens=30)
        await until(lambda: len(service._written) == 2)
        steps.open.release(5)
        await until(lambda: len(steps.wrote) == 5)
        assert steps.wrote[-1] == 2
        first.gone.set()
        await asyncio.wait_for(first.task, 60)
        steps.open.release(200)
        assert (await second.json())["choices"][0]["message"]["content"] == written(lm_bundle, max_tokens=30)
        await until(lambda: service._model.idle)
        assert len(steps.wrote) < 50
        assert (service._waiting, service._seats.free) == (0, 2 * server.ROWS)

    asyncio.run(run())


def test_a_reader_who_is_slow_keeps_no_other_waiting(lm_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "ROWS", 1)  # two seats

    async def run() -> None:
        service = server.Service(Library.open(lm_bundle, None), None, 1, 2**28)
        app, reads = service.application(["testserver"]), asyncio.Event()

        class Slow(Caller):
            async def _send(self, message: dict[str, Any]) -> None:
                await reads.wait()

        slow = [
            Slow(app, "/v1/chat/completions", **SAMPLING, messages=MESSAGES, stream=stream) for stream in (True, False)
        ]
        ask = asker(app)
        assert (await ask().json())["choices"]
        assert service._waiting == 1  # one has its whole answer
        reads.set()
        await asyncio.wait_for(asyncio.gather(*(one.task for one in slow)), 60)
        assert (service._waiting, service._seats.free) == (0, 2)

    asyncio.run(run())


def test_a_failed_step_is_said_to_all_and_the_next_answer_is_right(lm_bundle: Path) -> None:
    async def run() -> None:
        service = server.Service(Library.open(lm_bundle, None), None, 1, 2**28)
        step, ask = service._model.step, asker(service.application(["testserver"]))

        def fails() -> None:
            wait_until(lambda: len(service._written) == 2)
            service._model.step = step
            raise MemoryError

        service._model.step = fails
        assert [(await one.json())["error"]["code"] for one in (ask(), ask())] == ["500"] * 2
        assert (await ask().json())["choices"][0]["message"]["content"] == written(lm_bundle)
        refused = ask(max_tokens=0)
        await refused.json()
        assert (refused.status, service._seats.free, service._model.idle) == (400, 2 * server.ROWS, True)

    asyncio.run(run())


# The command.


def serving(bundle: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "edgeadapt", "device", "serve", "--bundle", str(bundle), "--port", "0", "--json"]
    return subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_tenant_is_served_over_tls(bundle: Path, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    authority = Authority.create("fleet", SystemEntropy(), now - timedelta(days=1), now + timedelta(days=1))
    for name, content in zip(("key.pem", "tls.pem"), certify(authority), strict=True):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "root.pem").write_bytes(authority.root.to_pem())
    token = hashlib.sha256(b"secret").hexdigest()
    (tmp_path / "tenants.toml").write_text(f'[tenants.anna]\ntoken_sha256 = "{token}"\nadapters = ["*"]\n')
    files = {"tenants": "tenants.toml", "certificate": "tls.pem", "key": "key.pem"}
    words = [word for option, name in files.items() for word in (f"--{option}", str(tmp_path / name))]
    with serving(bundle, *words, "--grpc-port", "0") as process:
        assert process.stdout is not None
        served = json.loads(process.stdout.readline())
        url, root = served["url"], (tmp_path / "root.pem").read_bytes()
        with grpc.secure_channel(served["grpc"], grpc.ssl_channel_credentials(root)) as channel:
            call = channel.unary_stream("/edgeadapt.Adapters/Models")
            (models,) = call(b"", metadata=(("authorization", "Bearer secret"),), timeout=60)
            assert [one["id"] for one in json.loads(models)["data"]] == ["global", server.BASE]
        with httpx.Client(base_url=url, verify=ssl.create_default_context(cafile=tmp_path / "root.pem")) as client:
            assert client.get("/v1/models").status_code == 401
            found = client.get("/v1/models", headers={"Authorization": "Bearer secret"})
            assert [one["id"] for one in found.json()["data"]] == ["global", server.BASE]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


def test_a_process_serves_until_it_is_told_to_stop(lm_bundle: Path) -> None:
    with serving(lm_bundle) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        url = json.loads(process.stdout.readline())["url"]
        body = {**SAMPLING, "max_tokens": 100, "messages": MESSAGES, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(60) == 130
        assert process.stderr.read().strip() == "edgeadapt: interrupted"


def test_a_call_of_grpc_that_runs_is_answered_to_its_end(lm_bundle: Path) -> None:
    with serving(lm_bundle, "--grpc-port", "0") as process:
        assert process.stdout is not None
        body = {**SAMPLING, "max_tokens": 100, "messages": MESSAGES, "stream": True}
        with grpc.insecure_channel(json.loads(process.stdout.readline())["grpc"]) as channel:
            call = channel.unary_stream("/edgeadapt.Adapters/ChatCompletions")
            messages = call(json.dumps(body).encode(), timeout=60)
            next(messages)
            process.send_signal(signal.SIGINT)
            assert json.loads(list(messages)[-1])["choices"][0]["finish_reason"] == "length"
        assert process.wait(60) == 130


def test_a_second_interrupt_waits_for_nobody(bundle: Path) -> None:
    with serving(bundle) as process:
        assert process.stdout is not None
        address = ("127.0.0.1", int(json.loads(process.stdout.readline())["url"].rpartition(":")[2]))
        with socket.create_connection(address) as slow:
            slow.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            httpx.get(f"http://{address[0]}:{address[1]}/health")  # after it
            process.send_signal(signal.SIGINT)
            with suppress(OSError):  # when the first interrupt has come
                while True:
                    socket.create_connection(address).close()
            process.send_signal(signal.SIGINT)
            assert process.wait(server.PATIENCE / 2) == 130
        assert process.stderr is not None
        assert process.stderr.read().strip() == "edgeadapt: interrupted"


@pytest.mark.parametrize(
    ("words", "about"),
    [
        (["--host", "0.0.0.0"], "--host"),  # noqa: S104
        (["--host", "0.0.0.0", "--tenants", "tenants.toml"], "--host"),  # noqa: S104
        (["--certificate", "x.pem"], "--host"),
        (["--tenants", "nowhere.toml"], "nowhere.toml"),
        (["--tenants", "tenants.toml", "--certificate", "x.pem", "--key", "x.key", "--port", "0"], "--certificate"),
        (["--host", "203.0.113.1", "--tenants", "tenants.toml", "--certificate", "x", "--key", "x"], "--port"),
    ],
)
def test_it_listens_to_other_machines_only_with_tenants_and_tls(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], about: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tenants.toml").write_text(f'[tenants.anna]\ntoken_sha256 = "{"a" * 64}"\nadapters = ["*"]\n')
    Path("x.pem").write_text("no certificate")
    Path("x.key").write_text("no key")
    result = CliRunner().invoke(device, ["serve", "--bundle", str(bundle), *words])
    error = result.exception
    assert isinstance(error, ConfigError)
    assert error.about == about
    assert result.output == ""  # it does not say that it serves
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"tenants": {}},
        {"tenants": {"a": {"token": "secret"}}},
        {"tenants": {"a": {"token_sha256": "A" * 64, "adapters": []}}},
        {"tenants": {"a": {"token_sha256": "a" * 64, "adapters": [], "requests_per_minute": 0}}},
        {"tenants": {name: {"token_sha256": "a" * 64, "adapters": []} for name in "ab"}},
    ],
)
def test_a_wrong_file_of_tenants_is_refused(table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        server.Tenants.parse(table, "test")
