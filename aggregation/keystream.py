"""The AES-256-CTR keystream of a key, read sequentially into buffers of the caller.

The counter blocks are 0, 1, 2, … as in NIST SP 800-38A. From block 2 on they equal the blocks with which AES-GCM under
a nonce of twelve zero bytes encrypts (SP 800-38D, section 7.1), and the library's GCM uses wider instructions than its
CTR where the processor has them. The bytes are therefore produced by GCM, whose tag is never requested; they equal CTR
bit for bit. ``docs/decisions/0007-fast-keystream.md`` has the measurements."""

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

ZEROS = 2**18  # bytes produced at a time: keystream, zeros and the target vector fit a second-level cache of 1 MiB
_ZEROS = memoryview(bytes(ZEROS))
_HEAD = 32  # bytes: counter blocks 0 and 1, which GCM reserves


class Keystream:
    """One stream under a 32-byte key. Use a key for nothing else: GCM with a fixed nonce must not encrypt messages.

    Source: NIST SP 800-38A, section 6.5. A key of another length raises ``ValueError``. A stream ends after 64 GB.

    >>> block = bytearray(4)
    >>> Keystream(bytes(32)).read_into(memoryview(block))
    >>> block.hex()  # AES-256 of a zero block under a zero key begins with these bytes
    'dc95c078'
    """

    __slots__ = ("_head", "_rest")

    def __init__(self, key: bytes) -> None:
        aes = algorithms.AES256(key)
        self._head = Cipher(aes, modes.CTR(bytes(16))).encryptor().update(bytes(_HEAD))
        self._rest = Cipher(aes, modes.GCM(bytes(12))).encryptor()

    def read_into(self, buffer: memoryview) -> None:
        """Fill ``buffer`` (format ``B``, any length) with the next bytes of the stream."""
        head, self._head = self._head[: len(buffer)], self._head[len(buffer) :]
        buffer[: len(head)] = head
        for start in range(len(head), len(buffer), ZEROS):
            part = buffer[start : start + ZEROS]
            self._rest.update_into(_ZEROS[: len(part)], part)
