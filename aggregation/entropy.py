"""The source of secret bytes. Nothing else in this package generates randomness for keys, seeds or shares.

Rounding coins are not secret; they come from a ``numpy.random.Generator`` that the caller passes (``vector``).
"""

import secrets
from typing import Protocol


class Entropy(Protocol):
    """Bytes that nobody can predict: from the operating system in production, fixed ones in vector tests."""

    def bytes(self, n: int) -> bytes:
        """Return ``n`` fresh bytes."""
        ...


class SystemEntropy:
    """The operating system's generator. It holds no state, so nothing can be read from it or rewound."""

    def bytes(self, n: int) -> bytes:
        """Return ``n`` bytes from the operating system."""
        return secrets.token_bytes(n)
