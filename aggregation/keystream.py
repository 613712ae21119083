"""The AES-256-CTR keystream of a key, read on and on into a caller's buffer.

Counter blocks run 0, 1, 2, … as in NIST SP 800-38A. From block 2 on they are just those with which AES-GCM under a
nonce of twelve zero bytes encrypts (SP 800-38D, section 7.1), and the library's GCM uses wider instructions than its
CTR where the processor has them. So the bytes come out of GCM, its tag is never asked for, and what is read is CTR to
the last bit: ``docs/decisions/0007`` has the measurements.
"""

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

ZEROS = 2**18  # bytes made at a time: keystream, zeros and what it is added to fit a second-level cache of 1 MiB
_ZEROS = memoryview(bytes(ZEROS))
_HEAD = 32  # bytes: counter blocks 0 and 1, which GCM keeps for itself


class Keystream:
    """One stream. A key must never have a second use: GCM with a fixed nonce is not for messages."""

    __slots__ = ("_head", "_rest")

    def __init__(self, key: bytes) -> None:
        aes = algorithms.AES256(key)
        self._head = Cipher(aes, modes.CTR(bytes(16))).encryptor().update(bytes(_HEAD))
        self._rest = Cipher(aes, modes.GCM(bytes(12))).encryptor()

    def read_into(self, buffer: memoryview) -> None:
        """Fill ``buffer``, of bytes, with what comes next. A stream ends after 64 GB."""
        head, self._head = self._head[: len(buffer)], self._head[len(buffer) :]
        buffer[: len(head)] = head
        for start in range(len(head), len(buffer), ZEROS):
            part = buffer[start : start + ZEROS]
            self._rest.update_into(_ZEROS[: len(part)], part)
