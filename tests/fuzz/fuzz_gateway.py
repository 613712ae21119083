"""Fuzz target: any bytes are a message of the gateway that is written as the same bytes, or raise ProtocolError.

It is not part of the suite: it needs atheris, which the project does not install.

    pip install atheris
    python tests/fuzz/fuzz_gateway.py -max_total_time=600 corpus/

``--seed corpus/`` first fills a folder with one message of each kind. A crash is written to a file ``crash-…``; pass
that file as the only argument to reproduce it.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from aggregation.errors import ProtocolError  # noqa: E402
from aggregation.wire import Codec  # noqa: E402
from edgeadapt.formats.gateway import messages  # noqa: E402

CODECS: tuple[Codec[Any], ...] = (
    messages.CHALLENGE,
    messages.HELLO,
    messages.REQUEST,
    messages.ANSWER,
    messages.ENROLMENT,
    messages.RENEWAL,
)


def one_input(data: bytes) -> None:
    """The first byte selects the reader of the rest."""
    if not data:
        return
    try:
        read(data[0] % (len(CODECS) + 1), data[1:])
    except ProtocolError:
        return


def read(choice: int, body: bytes) -> None:
    """Read ``body``; what was accepted is written as the same bytes."""
    if choice == len(CODECS):
        window = messages.retry_window(((messages.RETRY_WINDOW, body.decode("latin-1")),))
        if window is not None and not 0 <= window.earliest <= window.latest <= messages.LONGEST_WAIT:
            raise AssertionError(f"a window from {window.earliest} to {window.latest}")
        return
    message = CODECS[choice].decode(body)
    if CODECS[choice].encode(message) != body:
        raise AssertionError(f"{type(message).__name__} is written as other bytes")


def seeds() -> Iterator[bytes]:
    """A message of each kind, as ``one_input`` takes it."""
    valid = (
        messages.CHALLENGE.encode(messages.GatewayChallenge(bytes(32))),
        messages.HELLO.encode(messages.DeviceHello(b"c" * 300, "192.0.2.1", bytes(64), "1.2")),
        next(messages.request_messages(7, "plan", {"body": b"b", "adapter": bytes(messages.INLINE + 1)})),
        next(messages.answer_messages(7, b"answer")),
        messages.ENROLMENT.encode(messages.DeviceEnrolment(bytes(32), bytes(64), b"request")),
        messages.RENEWAL.encode(messages.DeviceRenewal(b"c" * 300, bytes(64))),
    )
    yield from (bytes([choice]) + body for choice, body in enumerate(valid))
    yield bytes([3]) + messages.reason_message(7, 100, "a reason")


SEEDS = (*seeds(), bytes([len(CODECS)]) + b"1000-2000")


def main() -> None:
    if sys.argv[1:2] == ["--seed"]:
        folder = Path(sys.argv[2])
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(SEEDS):
            (folder / f"message-{number}").write_bytes(data)
        return
    atheris: Any = importlib.import_module("atheris")
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
