"""The source of secret bytes. Nothing else in this package generates randomness for keys, seeds or shares. Rounding
coins come from a ``numpy.random.Generator`` that the caller passes (``vector``)."""

import secrets
from typing import Protocol

from aggregation.keystream import Keystream


class Entropy(Protocol):
    """Bytes that nobody can predict: from the operating system, or from a secret; fixed ones in vector tests."""

    def bytes(self, n: int) -> bytes: ...


class SystemEntropy:
    """The operating system's generator. It holds no state, so nothing can be read from it or rewound."""

    def bytes(self, n: int) -> bytes:
        return secrets.token_bytes(n)


class DerivedEntropy:
    """The keystream of AES-256-CTR under a secret of 32 bytes, which has no other use: equal secrets, equal bytes."""

    def __init__(self, secret: bytes) -> None:
        self._stream = Keystream(secret)

    def bytes(self, n: int) -> bytes:
        drawn = bytearray(n)
        self._stream.read_into(memoryview(drawn))
        return bytes(drawn)
