"""How many calls a TLS certificate has open at the gateway, counted before the first message of a call is there.

gRPC by itself waits for that message without an end, and what it refuses above its limit on calls it refuses to all.
This counts every call, also those of health checks and of reflection, and those with a certificate that was revoked.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn, TypeAlias

import grpc
from grpc import StatusCode, aio

from adapters.gateway import frames
from coordinator.gateway.places import PROOF

OPEN = 16  # calls of one certificate; a device has two, and those of connections that broke
Context: TypeAlias = Any  # grpc.aio.ServicerContext, which has no types


async def later(context: Context, code: StatusCode, reason: str, seconds: float) -> NoReturn:
    """End a call with an error after which it may succeed, in so many seconds."""
    await context.abort(code, reason, ((frames.RETRY_AFTER, str(int(1000 * seconds) + 1)),))
    raise AssertionError


class Admission(aio.ServerInterceptor):
    """Refuses a call with a certificate that has ``OPEN`` calls, and one whose message does not come in time."""

    def __init__(self) -> None:
        self._open: Counter[bytes] = Counter()  # by certificate

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """The handler of a call, which begins before its message is there: for gRPC it takes a stream of them."""
        handler = await continuation(details)
        if handler is None:
            return None
        kind = "stream_stream" if handler.response_streaming else "stream_unary"
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(self._counted(handler), handler.request_deserializer, handler.response_serializer)

    def _counted(self, handler: Any) -> Callable[[AsyncIterator[Any], Context], Awaitable[Any]]:
        behavior = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

        async def call(parts: AsyncIterator[Any], context: Context) -> Any:
            async with self._counting(context):
                answer = behavior(parts if handler.request_streaming else await _first(parts, context), context)
                if not hasattr(answer, "__aiter__"):
                    return await answer
                async for part in answer:  # a handler that yields its answers
                    await context.write(part)
                return None

        return call

    @asynccontextmanager
    async def _counting(self, context: Context) -> AsyncIterator[None]:
        (certificate,) = context.auth_context().get("x509_pem_cert", [b""])
        if self._open[certificate] >= OPEN:
            await later(context, StatusCode.RESOURCE_EXHAUSTED, "too many calls at once", 1.0)
        self._open[certificate] += 1
        try:
            yield
        finally:
            self._open[certificate] -= 1
            if not self._open[certificate]:
                del self._open[certificate]


async def _first(parts: AsyncIterator[Any], context: Context) -> Any:
    """The message of a call that has one."""
    try:
        async with asyncio.timeout(PROOF):
            async for part in parts:
                return part
    except TimeoutError:
        await context.abort(StatusCode.DEADLINE_EXCEEDED, "too slow: the message of the call did not come")
    await context.abort(StatusCode.INVALID_ARGUMENT, "the call has no message")
    raise AssertionError
