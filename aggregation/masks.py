"""Masks: the keys they are derived from, and their expansion into the ring, added in place.

A pair's mask key is HKDF-SHA256 (RFC 5869) of X25519 (RFC 7748), bound to the session, the plan and the pair; a
self-mask key is HKDF-SHA256 of the seed, bound to the session, the plan and the device. Because the plan is bound,
devices that were shown different plans get masks that do not cancel. A key expands to one AES-256-CTR stream
(``keystream``), read as ring elements in little-endian order, so every element is uniform over the ring.

Expansion allocates one block for each thread: keystreams fill it one after another while a block of the vector stays in
the cache. A keystream is read sequentially, so threads divide the masks, not the vector: each thread follows the one
before it through the blocks, and the result is the same bit for bit."""

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

KEY = 32  # bytes of every key and seed
BLOCK = ZEROS  # bytes of the vector that are masked at a time
MASKS_PER_BATCH = 1024  # bounds the memory of open streams, whatever the size of the cohort
BLOCKS_PER_THREAD = 4  # of the vector; with fewer, a thread waits more than it works
_PAIR, _SELF = b"edgeadapt/pair-mask/1", b"edgeadapt/self-mask/1"


@dataclass(frozen=True, slots=True)
class Mask:
    """One mask on a vector: the key of its stream (32 bytes), and whether it is added or subtracted."""

    key: bytes = field(repr=False)
    add: bool


# The canonical u-coordinates of small order on Curve25519, from the list at https://cr.yp.to/ecdh.html: with them the
# shared secret is the same whoever computes it. The other entries of that list are not canonical.
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
    """Check that ``key`` (32 bytes) is a canonical X25519 public key that is not of small order. X25519 reduces
    u-coordinates mod p and ignores the top bit (RFC 7748, section 5). Here one key is one byte string, so that keys are
    different wherever their bytes are. Raises ProtocolError: the key is of small order, or not canonical."""
    point = int.from_bytes(key, "little")
    if point >= _P:
        raise ProtocolError("an X25519 key is not in its canonical form", about="x25519.encoding")
    if point in SMALL_ORDER:
        raise ProtocolError("an X25519 key is of small order", about="x25519.order")


def public_key(private: bytes) -> bytes:
    """The X25519 public key (32 bytes) of 32 private bytes (RFC 7748, section 6.1)."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def shared_secret(private: bytes, public: bytes) -> bytes:
    """The X25519 shared secret (32 bytes) of two parties. Pass it to ``derive``; never use it as a key itself.

    >>> a, b = bytes([1]) * 32, bytes([2]) * 32
    >>> shared_secret(a, public_key(b)) == shared_secret(b, public_key(a))
    True

    Raises ProtocolError: ``public`` is a point of small order, or not 32 bytes."""
    return exchange(private_key(private), public)


def private_key(private: bytes) -> X25519PrivateKey:
    """A private key to ``exchange`` with several others: loading it costs as much as an exchange."""
    return X25519PrivateKey.from_private_bytes(private)


def exchange(private: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        message = "an X25519 key is of small order or of the wrong length"
        raise ProtocolError(message, about="x25519.order") from None


def derive(secret: bytes, *bound: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869) of ``secret`` without salt: 32 bytes. ``secret``: input keying material of any length.
    ``bound``: parts of the info, each preceded by its length in 4 bytes, so that no other list of parts gives the
    same."""
    info = b"".join(len(part).to_bytes(4, "big") + part for part in bound)
    return HKDF(algorithm=hashes.SHA256(), length=KEY, salt=None, info=info).derive(secret)


def pair_key(private: bytes, public: bytes, context: bytes, plan: bytes, pair: tuple[str, str]) -> bytes:
    """The mask key that two devices share for one plan; both sides compute the same one. ``private``: mask key of one
    device of the pair. ``public``: public mask key of the other. ``pair``: the two device ids, in either order."""
    return _pair_key(shared_secret(private, public), context, plan, pair)


def _pair_key(secret: bytes, context: bytes, plan: bytes, pair: tuple[str, str]) -> bytes:
    low, high = sorted(pair)
    return derive(secret, _PAIR, context, plan, low.encode(), high.encode())


def pair_masks(private: bytes, me: str, publics: Mapping[str, bytes], context: bytes, plan: bytes) -> list[Mask]:
    """The masks of ``me`` with its peers: the smaller id of a pair adds, the larger subtracts.

    The two masks of a pair are opposites. The masks of a device that dropped out therefore also remove from a sum what
    its peers had added for it.

    Returns:
        One mask for each peer, in the order of ``publics``.

    ``private``: the mask key of ``me``. ``publics``: peer → its public mask key. Raises ProtocolError: a public key is
    of small order, or not 32 bytes."""
    key = private_key(private)
    return [
        Mask(_pair_key(exchange(key, public), context, plan, (me, peer)), add=me < peer)
        for peer, public in publics.items()
    ]


def self_key(seed: bytes, context: bytes, plan: bytes, device: str) -> bytes:
    """The key of a device's self mask for one plan, from its 32-byte ``seed``; bound to context, plan and device."""
    return derive(seed, _SELF, context, plan, device.encode())


def apply(vector: Ring, masks: Iterable[Mask], threads: int = 1) -> None:
    """Add or subtract ``masks`` on ``vector`` in place, wrapping.

    Guarantee: the result depends neither on the order of ``masks`` nor on ``threads``. A mask and its opposite cancel.

    >>> vector = np.arange(3, dtype=np.uint32)
    >>> apply(vector, [Mask(bytes(32), add=True), Mask(bytes(32), add=False)])
    >>> vector
    array([0, 1, 2], dtype=uint32)

    ``vector``: shape ``(n,)``, contiguous, of an element type of ``ring``; ``n`` may be 0. ``masks``: consumed in
    batches of ``MASKS_PER_BATCH``. ``threads``: largest number of threads, usually one for each core; a short vector
    uses one."""
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
        with suppress(RuntimeError):  # if no more threads can be started, those that run make all the passes
            others.extend(pool.submit(work) for _ in range(threads - 1))
        work()
    for other in others:
        other.result()


def _work(passes: Iterator[Callable[[], None]], gates: Sequence[Semaphore], every: int) -> None:
    """Run passes until none is left. They are taken in order, so a pass that another waits for is always running."""
    try:
        for each in passes:
            each()
    except BaseException:
        for gate in gates:
            gate.release(every)  # the vector is spoiled; no other thread waits for this one
        raise


def _pass(blocks: Sequence[Ring], streams: Sequence[_Stream], ready: Semaphore, done: Semaphore) -> None:
    """Combine ``streams`` with each block once it is ``ready``, then release it to the next pass (``done``)."""
    buffer = memoryview(bytearray(BLOCK))
    for block in blocks:
        words: Ring = np.frombuffer(buffer[: block.nbytes], np.uint8).view(block.dtype)
        ready.acquire()
        for stream, combine in streams:
            stream.read_into(buffer[: block.nbytes])
            combine(block, words, out=block)
        done.release()


def expand(key: bytes, size: int, dtype: np.dtype[np.uint16] | np.dtype[np.uint32] | np.dtype[np.uint64]) -> Ring:
    """The mask that ``key`` expands to: shape ``(size,)``, of ``dtype``. ``apply`` adds it without allocating it."""
    vector: Ring = np.zeros(size, dtype)
    apply(vector, [Mask(key, add=True)])
    return vector
