"""Many light devices in one process, without training: each has its keys, its connection, and answers what is asked.

Usage: python -m benchmarks.gateway.clients PORT COUNT, with the authority in PEM on standard input. It
prints a line when all are connected. A request's body says how long the device works, and how long its answer is.
"""

import asyncio
import resource
import struct
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Any

import grpc
from grpc import aio

from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority, IdentityKey, Root
from edgeadapt.formats.gateway import messages

WORK = struct.Struct(">dI")  # seconds, and bytes of the answer
AT_ONCE = 50  # connections that are made at the same time
HOST = "127.0.0.1"
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


@dataclass(frozen=True)
class Device:
    """A new device with a certificate for an hour."""

    identity: IdentityKey
    certificate: bytes

    @classmethod
    def of(cls, name: str, authority: Authority) -> "Device":
        identity, now = IdentityKey.generate(SystemEntropy()), datetime.now(UTC)
        begin, end = now - timedelta(hours=1), now + timedelta(hours=1)
        return cls(identity, authority.issue(name, identity.public, not_before=begin, not_after=end))

    async def attend(self, stream: Any) -> None:
        """Prove the identity on a stream; returns once the gateway has admitted the device."""
        nonce = messages.CHALLENGE.decode(await stream.read()).nonce
        signature = self.identity.sign(messages.CHALLENGE_TAG, nonce + HOST.encode())
        hello = messages.DeviceHello(self.certificate, HOST, signature, version("edgeadapt"))
        await stream.write(messages.HELLO.encode(hello))
        if await stream.read() != messages.ADMITTED:
            raise AssertionError("not admitted")


def connection(port: int, authority: Root) -> aio.Channel:
    """A connection of its own, with a TLS handshake of its own."""
    credentials = grpc.ssl_channel_credentials(authority.to_pem())
    return aio.secure_channel(f"{HOST}:{port}", credentials, [*messages.DEVICE_OPTIONS, OWN_CONNECTION])


async def _device(
    port: int, name: str, authority: Authority, gate: asyncio.Semaphore, connected: asyncio.Event
) -> None:
    async with gate:
        channel = connection(port, authority.root)
        stream = channel.stream_stream(messages.ATTEND)()
        await Device.of(name, authority).attend(stream)
        connected.set()
    async with channel:
        while (raw := await stream.read()) is not grpc.aio.EOF:
            request = messages.REQUEST.decode(raw)
            for _, size in sorted(request.blobs.items()):
                reader = messages.PartReader(size)
                while reader.left:
                    reader.add(await stream.read())
            seconds, size = WORK.unpack(request.fields["body"])
            await asyncio.sleep(seconds)
            for message in messages.answer_messages(request.id, bytes(size)):
                await stream.write(message)


def allow_connections(count: int) -> None:
    """Raise this process's limit of open files to what so many connections need, if the system permits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * count + 500)), hard))


if __name__ == "__main__":
    port, count = map(int, sys.argv[1:])
    pem = b"".join(iter(sys.stdin.buffer.readline, b"\n"))
    allow_connections(count)
    asyncio.run(serve(port, count, Authority.from_pem(pem)))
