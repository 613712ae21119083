"""Many light devices in one process, without training: each has its keys and its connection.

Usage: python -m benchmarks.gateway.clients PORT COUNT, with the authority in PEM and an empty line on standard input.
It prints a line when all are connected, and they answer what is asked: a request's body says how long the device works,
and how long its answer is.

With PORT RATE SECONDS, devices check in at a rate, each over a new connection: the process makes them, prints a line,
waits for another line, and prints one JSON object. A check-in begins at its time whether the ones before are done or
not, and is timed from then on: a gateway that falls behind shows in the times ("coordinated omission", Tene 2013).
"""

import asyncio
import json
import struct
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Any

import grpc
from grpc import aio

from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority, IdentityKey, Root
from coordinator.gateway.places import raise_descriptors
from edgeadapt.formats.gateway import messages

WORK = struct.Struct(">dI")  # seconds, and bytes of the answer
AT_ONCE = 50  # connections that are made at the same time
DEVICES = 1000  # at most that check in at a rate; each checks in again after the others
PATIENCE = 60.0  # seconds for a check-in
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


async def arrive(port: int, authority: Root, rate: float, seconds: float, devices: list[Device]) -> dict[str, Any]:
    """Check in ``rate`` times a second for so many seconds.

    Returns ``milliseconds`` of each check-in that the gateway admitted, ``errors`` of the others by status, ``seconds``
    from the first to the last, and ``cpu_seconds`` of this process.
    """
    count = int(rate * seconds)
    loop, cpu = asyncio.get_running_loop(), time.process_time()
    begin, times, errors = loop.time() + 0.1, list[float](), dict[str, int]()

    async def one(number: int) -> None:
        due = begin + number / rate
        try:
            async with connection(port, authority) as channel:
                stream = channel.stream_stream(messages.ATTEND)(timeout=PATIENCE)
                await devices[number % len(devices)].attend(stream)
                times.append(1e3 * (loop.time() - due))
        except aio.AioRpcError as error:
            errors[error.code().name] = errors.get(error.code().name, 0) + 1

    tasks = []
    for number in range(count):
        await asyncio.sleep(begin + number / rate - loop.time())
        tasks.append(asyncio.create_task(one(number)))
    await asyncio.gather(*tasks)
    return {
        "milliseconds": times,
        "errors": errors,
        "seconds": loop.time() - begin,
        "cpu_seconds": time.process_time() - cpu,
    }


if __name__ == "__main__":
    raise_descriptors()  # for as many connections as a gateway that stands still leaves open
    port, pem = int(sys.argv[1]), b"".join(iter(sys.stdin.buffer.readline, b"\n"))
    authority = Authority.from_pem(pem)
    if len(sys.argv) == 3:
        count = int(sys.argv[2])
        asyncio.run(serve(port, count, authority))
    else:
        rate, seconds = map(float, sys.argv[2:])
        numbers = range(min(DEVICES, int(rate * seconds)))
        made = [Device.of(f"device-{number:05d}", authority) for number in numbers]
        print("ready", flush=True)
        sys.stdin.buffer.readline()
        print(json.dumps(asyncio.run(arrive(port, authority.root, rate, seconds, made))), flush=True)
