"""Masks: what keys they come from, and their expansion into the ring, added in place.

A pair's mask key is HKDF-SHA256 (RFC 5869) of X25519 (RFC 7748) bound to the session, the plan and the pair; a
self-mask key is HKDF-SHA256 of the seed bound to the same. The plan in the key means that devices shown
different plans get masks that do not cancel. A key opens one AES-256-CTR stream (``keystream``), which is read as
ring elements in little-endian order, so every element is uniform over the ring.

Expansion allocates nothing but one block a thread: keystreams go into it one after another while a block of the
vector stays in the cache. A keystream is read from its beginning on, so threads do not share out the vector but the
masks: each follows the one before it through the blocks, and what is read and added is the same bit for bit.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from threading import Semaphore

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from aggregation.errors import ProtocolError
from aggregation.keystream import ZEROS, Keystream
from aggregation.ring import Ring

KEY = 32  # bytes: 256 bits, of every key and seed
BLOCK = ZEROS  # bytes of the vector that are masked at a time
MASKS_PER_BATCH = 1024  # masks: bounds the memory of open streams, whatever the cohort
BLOCKS_PER_THREAD = 4  # blocks of the vector for each thread: with fewer a thread would wait more than it works
_PAIR, _SELF = b"edgeadapt/pair-mask/1", b"edgeadapt/self-mask/1"


@dataclass(frozen=True, slots=True)
class Mask:
    """One mask on a vector: the key of its stream, and whether it is added or subtracted."""

    key: bytes = field(repr=False)
    add: bool


# The u-coordinates of small order on Curve25519, as listed at https://cr.yp.to/ecdh.html: with them the "secret" is
# the same whoever computes it. The list's others are these in another spelling: p or more, or with the top bit set.
_P = 2**255 - 19
SMALL_ORDER = frozenset(
    {
        0,
        1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
        _P - 1,
    }
)


def require_public_key(key: bytes) -> None:
    """Return if ``key`` is an X25519 public key with which secrets are secret, in its one spelling.

    Exchanges take u-coordinates mod p and ignore the top bit (RFC 7748, section 5). Here one key is one byte string,
    so that keys are different where their bytes are.

    Raises:
        ProtocolError: It is of small order, or spelled otherwise.
    """
    point = int.from_bytes(key, "little")
    if point >= _P:
        raise ProtocolError("an X25519 key is not in its canonical form")
    if point in SMALL_ORDER:
        raise ProtocolError("an X25519 key is of small order")


def public_key(private: bytes) -> bytes:
    """The X25519 public key of 32 private bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def shared_secret(private: bytes, public: bytes) -> bytes:
    """The X25519 secret of two parties. Never use it but through ``derive``.

    Raises:
        ProtocolError: ``public`` is a point of small order, or not 32 bytes.
    """
    return _exchange(X25519PrivateKey.from_private_bytes(private), public)


def _exchange(private: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise ProtocolError("an X25519 key is of small order or of the wrong length") from None


def derive(secret: bytes, *bound: bytes) -> bytes:
    """HKDF-SHA256 of ``secret`` bound to ``bound``, each with its length before it: 32 bytes."""
    info = b"".join(len(part).to_bytes(4, "big") + part for part in bound)
    return HKDF(algorithm=hashes.SHA256(), length=KEY, salt=None, info=info).derive(secret)


def pair_key(private: bytes, public: bytes, context: bytes, plan: bytes, pair: tuple[str, str]) -> bytes:
    """The key that two devices share for one plan; the same whichever of them computes it."""
    return _pair_key(shared_secret(private, public), context, plan, pair)


def _pair_key(secret: bytes, context: bytes, plan: bytes, pair: tuple[str, str]) -> bytes:
    low, high = sorted(pair)
    return derive(secret, _PAIR, context, plan, low.encode(), high.encode())


def pair_masks(private: bytes, me: str, publics: Mapping[str, bytes], context: bytes, plan: bytes) -> list[Mask]:
    """The masks of ``me`` with its peers: the smaller id of a pair adds, the larger subtracts.

    They also take off a sum what the peers of a ``me`` that dropped had put on: a pair's masks are opposites.

    Args:
        private: The mask key of ``me``; loading it costs as much as an exchange, so it is loaded once.
        me: A device id.
        publics: Peer → its public mask key.
        context: Of the session.
        plan: Digest of the plan.
    """
    key = X25519PrivateKey.from_private_bytes(private)
    return [
        Mask(_pair_key(_exchange(key, public), context, plan, (me, peer)), add=me < peer)
        for peer, public in publics.items()
    ]


def self_key(seed: bytes, context: bytes, plan: bytes, device: str) -> bytes:
    """The key of a device's own mask for one plan."""
    return derive(seed, _SELF, context, plan, device.encode())


def apply(vector: Ring, masks: Iterable[Mask], threads: int = 1) -> None:
    """Add or subtract ``masks`` on ``vector`` in place, wrapping.

    Args:
        vector: Shape ``(n,)``, contiguous ``uint32`` or ``uint64``.
        masks: In any order: the result is the same.
        threads: At most so many, one a core. A short vector has one.
    """
    waiting = iter(masks)
    while batch := list(itertools.islice(waiting, MASKS_PER_BATCH)):
        _apply(vector, batch, threads)


_Stream = tuple[Keystream, np.ufunc]


def _apply(vector: Ring, batch: Sequence[Mask], threads: int) -> None:
    streams = [(Keystream(mask.key), np.add if mask.add else np.subtract) for mask in batch]
    step = BLOCK // vector.itemsize
    blocks = [vector[start : start + step] for start in range(0, vector.size, step)]
    threads = max(1, min(threads, len(streams), len(blocks) // BLOCKS_PER_THREAD))
    gates = [Semaphore(len(blocks)), *(Semaphore(0) for _ in range(threads))]
    passes = iter([partial(_pass, blocks, streams[i::threads], *gates[i : i + 2]) for i in range(threads)])
    work = partial(_work, passes, gates, len(blocks) + 1)
    others: list[Future[None]] = []
    with ThreadPoolExecutor(threads) as pool:
        with suppress(RuntimeError):  # where no more threads are to be had, those that there are make all the passes
            others.extend(pool.submit(work) for _ in range(threads - 1))
        work()
    for other in others:
        other.result()


def _work(passes: Iterator[Callable[[], None]], gates: Sequence[Semaphore], every: int) -> None:
    """Make passes until none is left: they are taken in order, so one that another waits for is always being made."""
    try:
        for each in passes:
            each()
    except BaseException:
        for gate in gates:
            gate.release(every)  # the vector is lost, and nobody waits for this thread
        raise


def _pass(blocks: Sequence[Ring], streams: Sequence[_Stream], ready: Semaphore, done: Semaphore) -> None:
    """Combine ``streams`` with each block once it is ``ready``, and tell the pass that comes after."""
    buffer = memoryview(bytearray(BLOCK))
    for block in blocks:
        words: Ring = np.frombuffer(buffer[: block.nbytes], np.uint8).view(block.dtype)
        ready.acquire()
        for stream, combine in streams:
            stream.read_into(buffer[: block.nbytes])
            combine(block, words, out=block)
        done.release()


def expand(key: bytes, size: int, dtype: np.dtype[np.uint32] | np.dtype[np.uint64]) -> Ring:
    """The mask of ``key`` itself: shape ``(size,)``. For tests and auditors; masking uses ``apply``."""
    vector: Ring = np.zeros(size, dtype)
    apply(vector, [Mask(key, add=True)])
    return vector
