"""Where secret bytes come from. Nothing else in this package makes randomness for keys, seeds or shares.

Rounding coins are not secret and come from a ``numpy.random.Generator`` that the caller passes (``fixedpoint``).
"""

import secrets
from typing import Protocol


class Entropy(Protocol):
    """Bytes that nobody can predict: the operating system's in use, fixed ones in vector tests."""

    def bytes(self, n: int) -> bytes:
        """Return ``n`` fresh bytes."""
        ...


class SystemEntropy:
    """The operating system's generator. Holds no state, so nothing can be read from it or rewound."""

    def bytes(self, n: int) -> bytes:
        """Return ``n`` bytes from the operating system."""
        return secrets.token_bytes(n)
