"""Fuzz target: any bytes decode to a message that encodes to the same bytes, or raise ProtocolError or TrustError.

It is not part of the suite: it needs atheris, which the project does not install.

    pip install atheris
    python tests/fuzz/fuzz_messages.py -max_total_time=600 corpus/

``--seed corpus/`` first fills a folder with the messages of the frozen rounds, and one of the gateway of each kind. A
crash is written to a file ``crash-…``; pass that file as the only argument to reproduce it.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from aggregation import envelope, ring  # noqa: E402
from aggregation.errors import ProtocolError, TrustError  # noqa: E402
from aggregation.messages import MESSAGES  # noqa: E402
from aggregation.pki.identity import IdentityKey  # noqa: E402
from aggregation.sealedstate import unseal  # noqa: E402
from aggregation.transcript import entries  # noqa: E402
from aggregation.transcript.entries import ENTRY, MAGIC, Abort, Checkpoint, Result  # noqa: E402
from aggregation.transcript.logstate import LOG_STATE, RECEIPT, SESSION_CHAIN_PROOF  # noqa: E402
from aggregation.wire import Codec  # noqa: E402
from edgeadapt.formats.gateway import messages as gateway  # noqa: E402

SIGNER = IdentityKey(bytes(32)).public
LOGGED = (Result, Abort, Checkpoint)
READ: dict[str, Codec[Any]] = {
    **{kind.TAG: kind.codec() for kind in (*MESSAGES, *LOGGED)},
    "entry": ENTRY,
    "receipt": RECEIPT,
    "session-chain-proof": SESSION_CHAIN_PROOF,
    "log-state": LOG_STATE,
    "gateway-challenge": gateway.CHALLENGE,
    "gateway-hello": gateway.HELLO,
    "gateway-request": gateway.REQUEST,
    "gateway-answer": gateway.ANSWER,
    "gateway-enrolment": gateway.ENROLMENT,
    "gateway-renewal": gateway.RENEWAL,
}
KINDS = list(READ)


def one_input(data: bytes) -> None:
    """The first byte selects the format of the rest."""
    if not data:
        return
    choice, body = data[0] % (len(READ) + 6), data[1:]
    try:
        read(choice, body)
    except (ProtocolError, TrustError):
        return


def read(choice: int, body: bytes) -> None:
    """Decode ``body``; it must encode to the same bytes."""
    if choice < len(READ):
        codec = READ[KINDS[choice]]
        if codec.encode(codec.decode(body)) != body:
            raise AssertionError(f"{KINDS[choice]} has a second encoding")
    elif choice == len(READ):
        envelope.open_verified(MESSAGES[0], body, SIGNER, "coordinator")
    elif choice == len(READ) + 1:
        envelope.open_vector(body, 16, SIGNER, "device")
    elif choice == len(READ) + 2:
        bits, packed = body[0] % 64 + 1 if body else 1, body[1:]
        size = 8 * len(packed) // bits
        if ring.pack(ring.unpack(packed, size, bits), bits) != packed:
            raise AssertionError(f"a vector of {bits} bits has a second encoding")
    elif choice == len(READ) + 3:
        entries.read(MAGIC + body)
    elif choice == len(READ) + 4:
        unseal(body, bytes(32))
    else:
        window = gateway.retry_window(((gateway.RETRY_WINDOW, body.decode("latin-1")),))
        if window is not None and not 0 <= window.earliest <= window.latest <= gateway.LONGEST_WAIT:
            raise AssertionError(f"a window from {window.earliest} to {window.latest}")


def of_gateway() -> Iterator[bytes]:
    """A message of each kind, as ``one_input`` takes it."""
    valid = (
        gateway.CHALLENGE.encode(gateway.GatewayChallenge(bytes(32))),
        gateway.HELLO.encode(gateway.DeviceHello(b"c" * 300, "192.0.2.1", bytes(64), "1.2")),
        next(gateway.request_messages(7, "plan", {"body": b"b", "adapter": bytes(gateway.INLINE + 1)})),
        next(gateway.answer_messages(7, b"answer")),
        gateway.ENROLMENT.encode(gateway.DeviceEnrolment(bytes(32), bytes(64), b"request")),
        gateway.RENEWAL.encode(gateway.DeviceRenewal(b"c" * 300, bytes(64))),
    )
    first = KINDS.index("gateway-challenge")
    yield from (bytes([first + number]) + body for number, body in enumerate(valid))
    yield bytes([KINDS.index("gateway-answer")]) + gateway.reason_message(7, 100, "a reason")
    yield bytes([len(READ) + 5]) + b"1000-2000"


def seed(folder: Path) -> None:
    """Write every message of the frozen rounds, and those of the gateway, as files of a corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(of_gateway()):
        (folder / f"gateway-{number}").write_bytes(data)
    signed = ("offer", "adverts", "roster", "shares", "assignments", "survivors", "consistency_signatures", "unmask")
    for name, case in json.loads((ROOT / "tests" / "vectors" / "rounds.json").read_text()).items():
        for field in (*signed, "unmask_responses"):
            values = case[field] if isinstance(case[field], dict) else {"all": case[field]}
            for device, text in values.items():
                raw = bytes.fromhex(text)
                kind = KINDS.index(raw[4 : 4 + raw[3]].decode())
                (folder / f"{name}-{field}-{device}").write_bytes(bytes([kind]) + raw[8 + raw[3] : -64])


def main() -> None:
    if sys.argv[1:2] == ["--seed"]:
        seed(Path(sys.argv[2]))
        return
    atheris: Any = importlib.import_module("atheris")
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
