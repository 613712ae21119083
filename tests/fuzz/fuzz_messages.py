"""Fuzz target: any bytes decode to a message that encodes to the same bytes, or raise ProtocolError or TrustError.

It is not part of the suite: it needs atheris, which the project does not install.

    pip install atheris
    python tests/fuzz/fuzz_messages.py -max_total_time=600 corpus/

``--seed corpus/`` first fills a folder with the messages of the frozen rounds. A crash is written to a file
``crash-…``; pass that file as the only argument to reproduce it.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from aggregation import envelope, ring, transcript  # noqa: E402
from aggregation.errors import ProtocolError, TrustError  # noqa: E402
from aggregation.messages import MESSAGES  # noqa: E402
from aggregation.pki.identity import IdentityKey  # noqa: E402
from aggregation.sealed import unseal  # noqa: E402
from aggregation.wire import Codec  # noqa: E402

SIGNER = IdentityKey(bytes(32)).public
LOGGED = (transcript.Result, transcript.Abort, transcript.Checkpoint)
READ: dict[str, Codec[Any]] = {
    **{kind.TAG: kind.codec() for kind in (*MESSAGES, *LOGGED)},
    "entry": transcript.ENTRY,
    "receipt": transcript.RECEIPT,
    "session-chain-proof": transcript.SESSION_CHAIN_PROOF,
    "log-state": transcript.LOG_STATE,
}


def one_input(data: bytes) -> None:
    """The first byte selects the format of the rest."""
    if not data:
        return
    choice, body = data[0] % (len(READ) + 5), data[1:]
    try:
        read(choice, body)
    except (ProtocolError, TrustError):
        return


def read(choice: int, body: bytes) -> None:
    """Decode ``body``; it must encode to the same bytes."""
    if choice < len(READ):
        codec = list(READ.values())[choice]
        if codec.encode(codec.decode(body)) != body:
            raise AssertionError(f"{list(READ)[choice]} has a second encoding")
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
        transcript.read(transcript.MAGIC + body)
    else:
        unseal(body, bytes(32))


def seed(folder: Path) -> None:
    """Write every message of the frozen rounds as a file of a corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [kind.TAG for kind in MESSAGES]
    cases = json.loads((ROOT / "tests" / "vectors" / "rounds.json").read_text())
    for name, case in cases.items():
        for field in (
            "offer",
            "adverts",
            "roster",
            "shares",
            "assignments",
            "survivors",
            "consistency_signatures",
            "unmask",
            "unmask_responses",
        ):
            values = case[field] if isinstance(case[field], dict) else {"all": case[field]}
            for device, text in values.items():
                raw = bytes.fromhex(text)
                tag_size = raw[3]
                kind = kinds.index(raw[4 : 4 + tag_size].decode())
                (folder / f"{name}-{field}-{device}").write_bytes(bytes([kind]) + raw[8 + tag_size : -64])


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
