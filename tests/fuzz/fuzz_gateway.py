"""Fuzz target: any bytes are a message of the gateway that is read the same again, or raise ProtocolError.

It is not part of the suite: it needs atheris, which the project does not install.

    pip install atheris
    python tests/fuzz/fuzz_gateway.py -max_total_time=600 corpus/

``--seed corpus/`` first fills a folder with one message of each kind. A crash is written to a file ``crash-…``; pass
that file as the only argument to reproduce it.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from adapters.gateway import frames  # noqa: E402
from adapters.gateway import gateway_pb2 as pb  # noqa: E402
from aggregation.errors import ProtocolError  # noqa: E402


def _answer_part(raw: bytes) -> pb.AnswerPart:
    """The first part of an answer or a later one."""
    try:
        return pb.AnswerPart(beginning=frames.beginning(raw))
    except ProtocolError:
        return pb.AnswerPart(data=frames.answer_data(raw))


READ: tuple[Callable[[bytes], Any], ...] = (
    frames.hello,
    frames.request,
    frames.byte_range,
    lambda raw: pb.Chunk(data=frames.chunk(raw)),
    _answer_part,
    frames.enrol_request,
    frames.renew_request,
    frames.enrolled,
)


def one_input(data: bytes) -> None:
    """The first byte selects the reader of the rest."""
    if not data:
        return
    try:
        read(data[0] % (len(READ) + 1), data[1:])
    except ProtocolError:
        return


def read(choice: int, body: bytes) -> None:
    """Read ``body``; what was accepted is accepted again as it is written, and means the same."""
    if choice == len(READ):
        window = frames.retry_window(((frames.RETRY_WINDOW, body.decode("latin-1")),))
        if window is not None and not 0 <= window.earliest <= window.latest <= frames.LONGEST_WAIT:
            raise AssertionError(f"a window from {window.earliest} to {window.latest}")
        return
    message = READ[choice](body)
    if READ[choice](message.SerializeToString()) != message:
        raise AssertionError(f"{type(message).__name__} is read differently when it is written again")


def seeds() -> Iterator[bytes]:
    """A message of each kind, as ``one_input`` takes it."""
    valid = (
        pb.Hello(certificate=b"c" * 300, binding=bytes(64), version="1.2").SerializeToString(),
        frames.request_message(7, "plan", {"body": b"b", "adapter": b"a" * 9}, {"adapter": bytes(32)}),
        pb.Range(sha256=bytes(32), offset=5).SerializeToString(),
        next(frames.chunks(b"content", 2)),
        next(frames.answer_parts(7, b"answer")),
        pb.EnrolRequest(token=b"t", request=b"r", tls_request=b"q").SerializeToString(),
        pb.RenewRequest(certificate=b"c", signature=bytes(64), tls_request=b"q").SerializeToString(),
        pb.Enrolled(certificate=b"c", tls_certificate=b"t").SerializeToString(),
        b"1000-2000",
    )
    yield from (bytes([choice]) + body for choice, body in enumerate(valid))
    yield from (bytes([4]) + part for part in [*frames.answer_parts(7, b"answer")][1:])
    yield from (bytes([4]) + part for part in frames.reason_parts(7, 100, "a reason"))


def main() -> None:
    if sys.argv[1:2] == ["--seed"]:
        folder = Path(sys.argv[2])
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(seeds()):
            (folder / f"message-{number}").write_bytes(data)
        return
    atheris: Any = importlib.import_module("atheris")
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
