"""Devices that check in at a rate, each over a connection of its own, and how long they take until they are admitted.

Usage: python -m benchmarks.gateway.arrivals PORT RATE SECONDS, with the authority in PEM and an empty line
on standard input. It makes its devices, prints a line, waits for another line, and prints one JSON object.

A check-in begins at its time whether the ones before are done or not, and is timed from then on: a gateway that falls
behind shows in the times ("coordinated omission", Tene 2013).
"""

import asyncio
import json
import sys
import time
from typing import Any

from grpc import aio

from aggregation.pki import Authority, Root
from benchmarks.gateway.clients import Device, allow_connections, connection
from edgeadapt.formats.gateway import messages

DEVICES = 1000  # at most; each checks in again after the others
PATIENCE = 60.0  # seconds for a check-in


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
    port, rate, seconds = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    authority = Authority.from_pem(b"".join(iter(sys.stdin.buffer.readline, b"\n")))
    count = min(DEVICES, int(rate * seconds))
    allow_connections(int(rate * seconds))  # as many as a gateway that stands still leaves open
    made = [Device.of(f"device-{number:05d}", authority) for number in range(count)]
    print("ready", flush=True)
    sys.stdin.buffer.readline()
    print(json.dumps(asyncio.run(arrive(port, authority.root, rate, seconds, made))), flush=True)
