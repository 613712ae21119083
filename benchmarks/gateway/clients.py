"""Many light devices in one process, without training: each has its keys, its connection, and answers what is asked.

Usage: python -m benchmarks.gateway.clients PORT COUNT, with the authority in PEM on standard input. It
prints a line when all are connected. A request's body says how long the device works, and how long its answer is.
"""

import asyncio
import hashlib
import resource
import struct
import sys
from datetime import UTC, datetime, timedelta
from importlib.metadata import version

import grpc
from grpc import aio

from adapters.gateway import frames
from adapters.gateway import gateway_pb2 as pb
from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority, IdentityKey, certificates
from aggregation.pki.tls import TlsKey, TlsRole, bind, read_tls_request

WORK = struct.Struct(">dI")  # seconds, and bytes of the answer
AT_ONCE = 50  # connections that are made at the same time
OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)


async def serve(port: int, count: int, authority: Authority) -> None:
    """Connect all devices, and answer until standard input ends."""
    gate = asyncio.Semaphore(AT_ONCE)
    connected = [asyncio.Event() for _ in range(count)]
    tasks = [
        asyncio.create_task(_device(port, f"device-{number:05d}", authority, gate, event))
        for number, event in enumerate(connected)
    ]
    for event in connected:
        await event.wait()
    print("connected", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def enrolled(name: str, authority: Authority) -> tuple[bytes, grpc.ChannelCredentials]:
    """A new device: what it says to a gateway, and the TLS credentials of its connection."""
    identity, key, now = IdentityKey.generate(SystemEntropy()), TlsKey.generate(SystemEntropy()), datetime.now(UTC)
    _, public = read_tls_request(key.request(name))
    begin, end = now - timedelta(hours=1), now + timedelta(hours=1)
    serial = int.from_bytes(SystemEntropy().bytes(8), "big") + 1
    der = authority.issue_tls(name, public, TlsRole.DEVICE, not_before=begin, not_after=end, serial=serial)
    hello = pb.Hello(
        certificate=authority.issue(name, identity.public, not_before=begin, not_after=end),
        binding=bind(identity, der),
        version=version("edgeadapt"),
    )
    credentials = grpc.ssl_channel_credentials(authority.root.to_pem(), key.pem, certificates.to_pem(der))
    return hello.SerializeToString(), credentials


def connection(port: int, credentials: grpc.ChannelCredentials) -> aio.Channel:
    """A connection of its own, with a TLS handshake of its own."""
    return aio.secure_channel(f"127.0.0.1:{port}", credentials, [*frames.DEVICE_OPTIONS, OWN_CONNECTION])


async def _device(
    port: int, name: str, authority: Authority, gate: asyncio.Semaphore, connected: asyncio.Event
) -> None:
    async with gate:
        hello, credentials = enrolled(name, authority)
        channel = connection(port, credentials)
        stream = channel.unary_stream(frames.ATTEND)(hello)
        await stream.initial_metadata()
        connected.set()
    async with channel:
        async for raw in stream:
            request = frames.request(raw)
            for blob in request.blobs.values():
                asked = pb.Range(sha256=blob.sha256).SerializeToString()
                parts = [frames.chunk(part) async for part in channel.unary_stream(frames.FETCH)(asked)]
                if hashlib.sha256(b"".join(parts)).digest() != blob.sha256:
                    raise AssertionError("a blob does not match its digest")
            seconds, size = WORK.unpack(request.fields["body"])
            await asyncio.sleep(seconds)
            await channel.stream_unary(frames.ANSWER)(frames.answer_parts(request.id, bytes(size)))


def allow_connections(count: int) -> None:
    """Raise this process's limit of open files to what so many connections need, if the system permits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * count + 500)), hard))


if __name__ == "__main__":
    port, count = map(int, sys.argv[1:])
    pem = b"".join(iter(sys.stdin.buffer.readline, b"\n"))
    allow_connections(count)
    asyncio.run(serve(port, count, Authority.from_pem(pem)))
