"""Whatever is sent to a path of ``device serve``: an answer of HTTP, whose errors are in OpenAI's form, or a closed
connection, within a bound. Nothing is logged, nothing is left, and the next good request is answered.

Each case is drawn from its number, so that a failure is repeated by it. ``WIRE`` cases change bytes of good requests;
``JSON`` cases are whole requests with changed values.
"""

import copy
import json
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from random import Random
from typing import Any

import pytest

from client.inference import connections, server
from export.bundle.write import write_bundle
from tests.client.inference.test_server import TOKENS, tenants
from tests.support import models
from tests.support.gateway import wait_until
from tests.support.wire import Reply, Site, read, replies, site

globals().update(models.FIXTURES)
WIRE, JSON, AT_ONCE = 600, 600, 8

CHAT = {"model": "anna", "max_tokens": 3, "messages": [{"role": "user", "content": "ab"}]}
FORM = {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": {"a": {"enum": [1, "b"]}}}}}
OPTIONS = {"temperature": 0.5, "top_p": 0.5, "seed": 1, "stop": ["a"], "n": 1, "tools": [], "user": "a"}
ASKED: dict[str, list[tuple[str, dict[str, Any] | None]]] = {
    "classifier": [
        ("/v1/classify", {"model": "global", "input": ["play music", "a"], "top": 2}),
        ("/v1/classify", {"model": "global", "input": "play music", "words": True}),
        ("/v1/embeddings", {"model": "base", "input": ["play music"], "encoding_format": "base64"}),
    ],
    "language model": [
        ("/v1/chat/completions", {**CHAT, **OPTIONS, "max_completion_tokens": 3}),
        ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", {**CHAT, "response_format": FORM}),
        ("/v1/completions", {"model": "anna+global:0.5", "prompt": "ab", "max_tokens": 3, "stream": True}),
    ],
}
COMMON = [("/v1/models", None), ("/v1/models/global", None), ("/metrics", None), ("/health", None)]

ODD_BYTES = (
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\0",
        b"\r\n\r\n",
        b" ",
        b"\t",
        b":",
        b",",
        b"%",
        b"%ff",
        b"\xff",
        b"\xc3\x28",
        b"HTTP/9.9",
    ),
    *(b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Host: evil\r\n"),
    *(b"Connection: close\r\n", b"Connection: upgrade\r\nUpgrade: h2c\r\n", b"Expect: 100-continue\r\n"),
    *(b"Authorization: Bearer x\r\n", b"Origin: null\r\n", b"0\r\n\r\n", b"fffffffff\r\n", b"A" * 20_000, b"[" * 5000),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**300, 0.5, -0.0, 1e308, math.nan, math.inf),
    *(
        "",
        " ",
        "a",
        "json_object",
        "\0",
        "\ud800",
        "é\u202e🔥",
        "a" * 70_000,
        "../../base",
        "ben",
        "anna:nan",
        "base+base",
        "{}",
        "<|im_end|>",
    ),
    *(
        [],
        [None],
        [[]],
        ["a"] * 300,
        [""],
        {},
        {"a": {}},
        {"type": "text"},
        [{"type": "text", "text": 1}],
        "json_object",
    ),
    *({"$ref": "#"}, {"pattern": "("}, {"type": "string", "maxLength": 10**12}, {"enum": []}, {"minItems": 10**9}),
)


def head_of(path: str, body: bytes | None, token: str, draw: Random) -> bytes:
    lines = ["Host: 127.0.0.1", f"Authorization: Bearer {token}"]
    if body is not None:
        lines.append("Content-Type: application/json")
        lines.append("Transfer-Encoding: chunked" if draw.random() < 0.3 else f"Content-Length: {len(body)}")
    draw.shuffle(lines)
    return "\r\n".join([f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", *lines, "", ""]).encode()


def request_of(path: str, body: bytes | None, token: str, draw: Random) -> bytes:
    head, sent = head_of(path, body, token, draw), body or b""
    if b"chunked" in head:
        cuts = sorted(draw.choices(range(len(sent) + 1), k=3))
        parts = [sent[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(sent)], strict=True) if begin < end]
        sent = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    return head + sent


def changed_bytes(raw: bytes, draw: Random) -> bytes:
    """Delete, repeat, flip, insert or cut somewhere, a few times."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, size = draw.randrange(len(raw) + 1), draw.choice((1, 1, 4, 30))
        part = raw[at : at + size]
        new = draw.choice(
            (b"", part * 2, bytes(byte ^ 1 << draw.randrange(8) for byte in part), draw.choice(ODD_BYTES))
        )
        raw = raw[:at] + new + raw[at + (0 if new in ODD_BYTES else size) :]
        if draw.random() < 0.1:
            raw = raw[: draw.randrange(len(raw) + 1)]
    return raw


def changed_values(body: Any, draw: Random) -> Any:
    """Put something odd in the place of a value, at any depth, or beside it; sometimes very deep."""
    body = copy.deepcopy(body)
    at: Any = body
    while True:
        keys = list(at) if isinstance(at, dict) else range(len(at))
        key = draw.choice(keys)
        if not isinstance(at[key], dict | list) or not at[key] or draw.random() < 0.4:
            break
        at = at[key]
    what = draw.random()
    if what < 0.1 and isinstance(at, dict):
        del at[key]
    elif what < 0.2 and isinstance(at, dict):
        at[draw.choice(("x", "", "__proto__", "tools", "top", "k" * 5000))] = draw.choice(ODD_VALUES)
    elif what < 0.25:
        for _ in range(draw.choice((20, 150, 300))):
            at[key] = [at[key]] if draw.random() < 0.5 else {"a": at[key]}
    else:
        at[key] = draw.choice(ODD_VALUES)
    return body


def check(found: list[Reply]) -> None:
    for reply in found:
        if reply.status >= 400:
            assert reply.error["message"]
            assert reply.status != 500, reply
            assert len(reply.body) < 5000


Draw = Callable[[Random, int], bytes]


def by_wire(kind: str) -> Draw:
    def drawn(draw: Random, number: int) -> bytes:
        paths = [*ASKED[kind], *COMMON]
        asked = [paths[(number + offset) % len(paths)] for offset in range(draw.choice((1, 1, 2)))]
        token = draw.choice((*TOKENS.values(), "wrong"))
        good = [request_of(path, body and json.dumps(body).encode(), token, draw) for path, body in asked]
        return changed_bytes(b"".join(good), draw)

    return drawn


def by_values(kind: str) -> Draw:
    def drawn(draw: Random, number: int) -> bytes:
        path, body = ASKED[kind][number % len(ASKED[kind])]
        for _ in range(draw.choice((1, 1, 2))):
            body = changed_values(body, draw)
        raw = request_of(path, json.dumps(body).encode(), TOKENS["anna"], draw)
        return raw.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)

    return drawn


@pytest.fixture(scope="module", params=ASKED)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, vendor: Any) -> Iterator[Any]:
    folder, kind = tmp_path_factory.mktemp("fuzz"), request.param
    lm = "lm_" * (kind == "language model")
    exported, source = (request.getfixturevalue(lm + name) for name in ("exported", "source"))
    write_bundle(folder / "bundle", exported, [source(), source("anna"), source("ben")], key=vendor)
    (folder / "trust.pem").write_bytes(vendor.public.to_pem())
    limits = {"requests_per_minute": 10**6}
    with pytest.MonkeyPatch.context() as patch:
        for name, seconds in (("PATIENCE", 0.2), ("SPARE", 0.1), ("LINGER", 0.1)):
            patch.setattr(connections, name, seconds)
        patch.setattr(server, "PATIENCE", 0.2)
        of = tenants(**limits)
        of.tenants["anna"] = of.tenants["anna"].model_copy(update=limits)
        with site(folder / "bundle", of) as running:
            patch.setattr(running.runner.config, "timeout_keep_alive", 0.2)
            yield kind, running


@pytest.mark.parametrize(("drawn", "cases"), [(by_wire, WIRE), (by_values, JSON)], ids=["wire", "values"])
def test_anything_is_answered_or_cut_off_and_the_next_request_is_answered(
    served: tuple[str, Site], drawn: Callable[[str], Draw], cases: int
) -> None:
    kind, running = served
    draw_case, threads = drawn(kind), threading.active_count()

    def good() -> list[int]:
        token = f"Authorization: Bearer {TOKENS['anna']}"
        return [running.ask(path, body, token).status for path, body in [*ASKED[kind], *COMMON]]

    def case(number: int) -> None:
        sent = draw_case(Random(number), number)  # noqa: S311  # no secret
        with running.connect() as peer:
            with suppress(ConnectionError):
                peer.sendall(sent)
            try:
                check(replies(read(peer)))
            except Exception as error:
                raise AssertionError(f"case {number}: {sent[:2000]!r}") from error

    before = good()
    assert before[0] == 200
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(case, range(cases)))
    wait_until(lambda: not running.connections and not running.runner.server_state.tasks)
    wait_until(lambda: running.service._waiting == 0)
    assert good() == before
    assert threading.active_count() <= threads + 40  # of asyncio's pool, which has a limit
    assert not running.logged
