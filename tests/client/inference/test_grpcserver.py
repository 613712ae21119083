"""Calls of gRPC get the answers, the refusals and the ends of requests by HTTP."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode, aio

from aggregation.errors import ConfigError
from client.inference import grpcserver, server
from client.inference.library import Library
from edgeadapt.formats.gateway import messages
from tests.client.inference.test_server import MESSAGES, SAMPLING, TEXT, TOKENS, calling, tenants, until
from tests.client.inference.test_server import two as two
from tests.support import refused

Ask = Callable[..., Awaitable[list[Any]]]


def served(bundle: Path, of: server.Tenants | None, work: Callable[[server.Service, Ask], Awaitable[None]]) -> None:
    """Let ``work`` call a server, in its loop. The function that it gets returns the messages of an answer."""

    async def run() -> None:
        service = server.Service(Library.open(bundle, None), of, 1, 2**28)
        calls, port = await grpcserver.begin(service, "127.0.0.1:0", None)
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:

            async def ask(method: str, name: str = "", **body: Any) -> list[Any]:
                token = (("authorization", f"Bearer {TOKENS[name]}"),) if name else ()
                call = channel.unary_stream(f"/{grpcserver.SERVICE}/{method}")(
                    json.dumps(body).encode(), metadata=token
                )
                return [json.loads(message) async for message in call]

            await work(service, ask)
        await calls.stop(None)

    asyncio.run(run())


async def refusal(answer: Awaitable[Any]) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as caught:
        await answer
    return caught.value


def test_an_answer_is_that_of_http_and_a_tenant_sees_no_other_ones(two: Path) -> None:
    body: dict[str, Any] = {"model": "anna", "input": [TEXT, "play music"], "top": 2}

    async def work(service: server.Service, ask: Ask) -> None:
        (found,) = await ask("Classify", "anna", **body)
        with calling(two, tenants(), "anna") as client:
            assert found == client.post("/v1/classify", json=body).json()
        (models,) = await ask("Models", "anna")
        assert [one["id"] for one in models["data"]] == ["anna", "global", server.BASE]
        for name, changed, code in (
            ("", {}, StatusCode.UNAUTHENTICATED),
            ("ben", {}, StatusCode.NOT_FOUND),
            ("anna", {"input": []}, StatusCode.INVALID_ARGUMENT),
            ("anna", {"input": "a" * server.MAX_BODY}, StatusCode.RESOURCE_EXHAUSTED),
        ):
            error = await refusal(ask("Classify", name, **{**body, **changed}))
            assert (error.code(), "\n" in error.details()) == (code, False)
        assert (await refusal(ask("ChatCompletions", "anna"))).code() is StatusCode.UNIMPLEMENTED

    served(two, tenants(), work)


def test_a_quota_says_when_to_retry(two: Path) -> None:
    async def work(service: server.Service, ask: Ask) -> None:
        asked = {"model": "ben", "input": TEXT}
        await ask("Classify", "ben", **asked)
        error = await refusal(ask("Classify", "ben", **asked))
        assert error.code() is StatusCode.RESOURCE_EXHAUSTED
        assert dict(error.trailing_metadata())["retry-after"] == "60"

    served(two, tenants(requests_per_minute=1), work)


def test_an_answer_streams_fails_and_ends_when_its_reader_goes(lm_bundle: Path) -> None:
    async def work(service: server.Service, ask: Ask) -> None:
        asked = {**SAMPLING, "messages": MESSAGES}
        (whole,) = await ask("ChatCompletions", **asked)
        pieces = [one["choices"][0]["delta"]["content"] for one in await ask("ChatCompletions", **asked, stream=True)]
        assert len(pieces) > 3
        assert "".join(pieces) == whole["choices"][0]["message"]["content"]

        step = service._model.step
        steps = iter([step])

        def fails() -> Any:
            return next(steps, lambda: 1 / 0)()

        service._model.step = fails
        error = await refusal(ask("ChatCompletions", **asked, stream=True))
        assert (error.code(), error.details()) == (StatusCode.INTERNAL, "the server failed: ZeroDivisionError")
        service._model.step = step

        reader = asyncio.ensure_future(ask("ChatCompletions", **{**asked, "max_tokens": 200}))
        await until(lambda: service._waiting == 1)
        reader.cancel()
        await until(lambda: service._waiting == 0 and service._model.idle)
        assert service._seats.free == 2 * server.ROWS

    served(lm_bundle, None, work)


def test_a_peer_that_says_nothing_is_cut_off(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soon = dict(messages.GATEWAY_OPTIONS) | {"grpc.server_handshake_timeout_ms": 100}
    monkeypatch.setattr(messages, "GATEWAY_OPTIONS", tuple(soon.items()))

    async def run() -> None:
        service = server.Service(Library.open(bundle, None), None, 1, 2**28)
        calls, port = await grpcserver.begin(service, "127.0.0.1:0", None)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.wait_for(reader.read(), 60)  # until the end of the stream
        writer.close()
        await calls.stop(None)

    asyncio.run(run())


def test_a_port_that_is_taken_is_one_line(bundle: Path) -> None:
    async def run() -> None:
        service = server.Service(Library.open(bundle, None), None, 1, 2**28)
        calls, port = await grpcserver.begin(service, "127.0.0.1:0", None)
        with refused(ConfigError, "--grpc-port"):
            await grpcserver.begin(service, f"127.0.0.1:{port}", None)
        await calls.stop(None)

    asyncio.run(run())
