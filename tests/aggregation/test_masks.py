"""Masks: both sides of a pair compute the same one, no other device does, and an added mask can be removed."""

import hashlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregation import masks, ring, shamir
from aggregation.entropy import DerivedEntropy, SystemEntropy
from aggregation.errors import ConfigError, ProtocolError
from aggregation.keystream import Keystream
from aggregation.masks import Mask
from tests.support import refused

CONTEXT, PLAN = hashlib.sha256(b"context").digest(), hashlib.sha256(b"plan").digest()
A, B = hashlib.sha256(b"a").digest(), hashlib.sha256(b"b").digest()
PUBLIC_A, PUBLIC_B = masks.public_key(A), masks.public_key(B)
P = 2**255 - 19
KEYS = st.binary(min_size=32, max_size=32)


def test_both_devices_of_a_pair_compute_the_same_key() -> None:
    assert masks.pair_key(A, PUBLIC_B, CONTEXT, PLAN, ("u", "v")) == masks.pair_key(
        B, PUBLIC_A, CONTEXT, PLAN, ("v", "u")
    )


def test_the_masks_of_a_pair_are_opposites() -> None:
    (mine,) = masks.pair_masks(A, "u", {"v": PUBLIC_B}, CONTEXT, PLAN)
    (yours,) = masks.pair_masks(B, "v", {"u": PUBLIC_A}, CONTEXT, PLAN)
    assert mine == Mask(masks.pair_key(A, PUBLIC_B, CONTEXT, PLAN, ("u", "v")), add=True)
    assert yours == Mask(mine.key, add=False)
    with refused(ProtocolError, "x25519.order"):
        masks.pair_masks(A, "u", {"v": PUBLIC_B, "w": bytes(32)}, CONTEXT, PLAN)


def test_another_session_plan_pair_or_purpose_gives_another_key() -> None:
    other = hashlib.sha256(b"other").digest()
    keys = {
        masks.pair_key(A, PUBLIC_B, CONTEXT, PLAN, ("u", "v")),
        masks.pair_key(A, PUBLIC_B, other, PLAN, ("u", "v")),
        masks.pair_key(A, PUBLIC_B, CONTEXT, other, ("u", "v")),
        masks.pair_key(A, PUBLIC_B, CONTEXT, PLAN, ("u", "w")),
        masks.pair_key(A, PUBLIC_A, CONTEXT, PLAN, ("u", "v")),
        masks.self_key(A, CONTEXT, PLAN, "u"),
        masks.self_key(A, CONTEXT, other, "u"),
        masks.self_key(A, other, PLAN, "u"),
        masks.self_key(A, CONTEXT, PLAN, "v"),
        masks.self_key(B, CONTEXT, PLAN, "u"),
    }
    assert len(keys) == 10
    assert {len(key) for key in keys} == {32}


def test_the_parts_bound_to_a_key_cannot_be_split_differently() -> None:
    assert masks.derive(A, b"ab", b"c") != masks.derive(A, b"a", b"bc")
    assert masks.derive(A, b"ab") != masks.derive(A, b"ab", b"")


@settings(deadline=None, max_examples=40)
@given(
    size=st.sampled_from([1, 5, 2**17 - 1, 2**17, 2**17 + 3, 300_000]),
    bits=st.sampled_from([24, 40]),
    keys=st.lists(st.tuples(KEYS, st.booleans()), max_size=5),
)
def test_added_masks_are_removed_in_any_order(size: int, bits: int, keys: list[tuple[bytes, bool]]) -> None:
    vector = ring.zeros(size, bits)
    vector += np.arange(size, dtype=np.uint32)
    before = vector.copy()
    masks.apply(vector, [Mask(key, add) for key, add in keys])
    masks.apply(vector, [Mask(key, not add) for key, add in reversed(keys)])
    assert np.array_equal(vector, before)


@pytest.mark.parametrize("bits", [16, 24, 64])
def test_a_mask_does_not_depend_on_the_block_size(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = np.dtype(ring.dtype(bits))
    whole = masks.expand(A, 10_001, dtype)
    monkeypatch.setattr(masks, "BLOCK", 64)
    monkeypatch.setattr(masks, "MASKS_PER_BATCH", 2)
    assert np.array_equal(masks.expand(A, 10_001, dtype), whole)
    vector = ring.zeros(10_001, bits)
    masks.apply(vector, (Mask(key, add=True) for key in (A, B, A, B, A)))
    total = np.zeros_like(vector)
    for key in (A, B, A, B, A):
        total += masks.expand(key, 10_001, dtype)
    assert np.array_equal(vector, total)


@pytest.mark.parametrize("sizes", [[1] * 40, [16, 16, 16], [31, 2, 100], [0, 7, 0, 90], [1000], [2**18 + 33, 2**19, 5]])
def test_a_keystream_is_aes_ctr_however_it_is_read(sizes: list[int]) -> None:
    stream, found = Keystream(A), bytearray(sum(sizes))
    at = 0
    for size in sizes:
        stream.read_into(memoryview(found)[at : at + size])
        at += size
    plain = Cipher(algorithms.AES(A), modes.CTR(bytes(16))).encryptor().update(bytes(len(found)))
    assert bytes(found) == plain


def test_a_keystream_takes_a_key_of_256_bits_only() -> None:
    with pytest.raises(ValueError, match="key"):
        Keystream(A[:16])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_masking_allocates_one_block_for_each_thread_and_no_vector(threads: int) -> None:
    import tracemalloc

    vector = ring.zeros(4 * 10**6, 24)  # 16 MB
    tracemalloc.start()
    masks.apply(vector, [Mask(A, add=True), Mask(B, add=False), Mask(A, add=False)], threads)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (threads + 1) * masks.BLOCK


FEW = masks.BLOCKS_PER_THREAD - 1  # blocks, too few for two threads


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.sampled_from([0, 1, 255, 256 * FEW, 256 * 2 * masks.BLOCKS_PER_THREAD - 1, 256 * 40, 256 * 40 + 3]),
    bits=st.sampled_from([24, 40]),
    keys=st.lists(st.tuples(KEYS, st.booleans()), max_size=9),
    threads=st.integers(2, 12),
)
def test_the_result_does_not_depend_on_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, size: int, bits: int, keys: list[tuple[bytes, bool]], threads: int
) -> None:
    monkeypatch.setattr(masks, "BLOCK", 1024)
    alone, together = ring.zeros(size, bits), ring.zeros(size, bits)
    found = [Mask(key, add) for key, add in keys]
    masks.apply(alone, found, threads=1)
    masks.apply(together, found, threads)
    assert np.array_equal(alone, together)


@pytest.mark.parametrize(
    ("blocks", "count", "asked", "used"),
    [(FEW, 9, 4, 1), (2 * masks.BLOCKS_PER_THREAD, 9, 4, 2), (40, 9, 4, 4), (40, 3, 8, 3), (40, 9, 1, 1)],
)
def test_each_thread_takes_its_part_of_the_masks_and_a_short_vector_uses_one(
    monkeypatch: pytest.MonkeyPatch, blocks: int, count: int, asked: int, used: int
) -> None:
    readers: dict[int, set[int]] = {}  # thread → the streams that it reads
    all_started = threading.Event()

    class Watched(Keystream):
        __slots__ = ("begun",)

        def read_into(self, buffer: memoryview) -> None:
            readers.setdefault(threading.get_ident(), set()).add(id(self))
            if len(readers) == used:
                all_started.set()
            # Every thread reads its first block, then waits for the others: none can take another's part.
            assert not hasattr(self, "begun") or all_started.wait(20)
            self.begun = True
            super().read_into(buffer)

    monkeypatch.setattr(masks, "Keystream", Watched)
    monkeypatch.setattr(masks, "BLOCK", 1024)
    masks.apply(ring.zeros(blocks * 256, 24), [Mask(A, add=True)] * count, asked)
    assert len(readers) == used
    assert sum(map(len, readers.values())) == count
    assert max(map(len, readers.values())) - min(map(len, readers.values())) <= 1


def test_a_block_is_in_one_pass_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []  # stream numbers, in the order of their reads

    class Slow(Keystream):
        __slots__ = ("number",)

        def read_into(self, buffer: memoryview) -> None:
            time.sleep((3 - self.number) / 1000)  # the later the pass, the faster
            super().read_into(buffer)
            read.append(self.number)

    numbers = iter(range(3))

    def numbered(key: bytes) -> Slow:
        stream = Slow(key)
        stream.number = next(numbers)
        return stream

    monkeypatch.setattr(masks, "Keystream", numbered)
    monkeypatch.setattr(masks, "BLOCK", 1024)
    masks.apply(ring.zeros(256 * 12, 24), [Mask(A, add=True)] * 3, threads=3)
    times = [[at for at, number in enumerate(read) if number == each] for each in range(3)]
    assert all(first < second < third for first, second, third in zip(*times, strict=True))
    assert times[2][0] < times[0][-1]  # all three run at the same time


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("broken", range(3))
def test_an_error_in_a_thread_is_raised_and_leaves_none_waiting(
    monkeypatch: pytest.MonkeyPatch, broken: int, error: type[BaseException]
) -> None:
    class Broken(Keystream):
        __slots__ = ()

        def read_into(self, buffer: memoryview) -> None:
            raise error

    made = iter(range(3))
    monkeypatch.setattr(masks, "Keystream", lambda key: (Broken if next(made) == broken else Keystream)(key))
    monkeypatch.setattr(masks, "BLOCK", 1024)
    before = threading.active_count()
    with pytest.raises(error):
        masks.apply(ring.zeros(256 * 40, 24), [Mask(A, add=True)] * 3, threads=3)
    assert threading.active_count() == before


def fail_after(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, calls: int, error: type[BaseException]) -> None:
    left, genuine = iter(range(calls)), getattr(owner, name)

    def failing(*args: Any) -> Any:
        if next(left, None) is None:
            raise error
        return genuine(*args)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("there", range(3))
def test_if_no_more_threads_can_be_started_the_running_ones_do_the_work(
    monkeypatch: pytest.MonkeyPatch, there: int
) -> None:
    monkeypatch.setattr(masks, "BLOCK", 1024)
    found = [Mask(hashlib.sha256(bytes([i])).digest(), add=i % 3 > 0) for i in range(7)]
    alone, together = ring.zeros(256 * 40, 24), ring.zeros(256 * 40, 24)
    masks.apply(alone, found)
    fail_after(monkeypatch, threading.Thread, "start", there, RuntimeError)
    masks.apply(together, found, threads=4)
    assert np.array_equal(alone, together)


@pytest.mark.parametrize("there", range(3))
def test_ctrl_c_while_threads_are_started_leaves_none_waiting(monkeypatch: pytest.MonkeyPatch, there: int) -> None:
    monkeypatch.setattr(masks, "BLOCK", 1024)
    before = threading.active_count()
    fail_after(monkeypatch, ThreadPoolExecutor, "submit", there, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        masks.apply(ring.zeros(256 * 40, 24), [Mask(A, add=True)] * 9, threads=4)
    assert threading.active_count() == before


@pytest.mark.parametrize("point", sorted({*masks.SMALL_ORDER, P, P + 1}))
@pytest.mark.parametrize("top", [0, 2**255])
def test_keys_of_small_order_are_refused_in_any_encoding(point: int, top: int) -> None:
    key = (point + top).to_bytes(32, "little")
    with refused(ProtocolError, "x25519.encoding" if point + top >= P else "x25519.order"):
        masks.require_public_key(key)
    with refused(ProtocolError, "x25519.order"):
        masks.shared_secret(A, key)
    # The list is right: the library refuses them with any private key.
    with pytest.raises(ValueError, match=r".*"):
        X25519PrivateKey.from_private_bytes(B).exchange(X25519PublicKey.from_public_bytes(key))


@pytest.mark.parametrize("other", [2**255, P])
def test_a_key_has_one_encoding(other: int) -> None:
    point = 9 if other == P else int.from_bytes(PUBLIC_A, "little")  # only those below 19 fit in with p on top
    key, other_key = (number.to_bytes(32, "little") for number in (point, point + other))
    assert masks.shared_secret(B, key) == masks.shared_secret(B, other_key)
    masks.require_public_key(key)
    with refused(ProtocolError, "x25519.encoding"):
        masks.require_public_key(other_key)


def test_a_genuine_key_is_accepted() -> None:
    masks.require_public_key(PUBLIC_A)
    assert masks.shared_secret(A, PUBLIC_B) == masks.shared_secret(B, PUBLIC_A)


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(ProtocolError):
        masks.shared_secret(A, PUBLIC_B[:31])


def test_keys_are_in_no_repr() -> None:
    assert repr(Mask(A, add=True)) == "Mask(add=True)"


# Derived entropy


@given(st.lists(st.integers(0, 100), max_size=20))
def test_derived_bytes_do_not_depend_on_how_they_are_drawn(sizes: list[int]) -> None:
    drawn, whole = DerivedEntropy(bytes(32)), DerivedEntropy(bytes(32))
    assert b"".join(drawn.bytes(size) for size in sizes) == whole.bytes(sum(sizes))


def test_derived_bytes_are_aes_256_in_counter_mode() -> None:
    """The first two blocks of AES-256-CTR under a key of zeros."""
    known = "dc95c078a2408989ad48a21492842087530f8afbc74536b9a963b4f1c4cb738b"
    assert DerivedEntropy(bytes(32)).bytes(32).hex() == known


def test_another_secret_gives_other_bytes() -> None:
    assert DerivedEntropy(bytes(32)).bytes(32) != DerivedEntropy(bytes([1]) * 32).bytes(32)


# Secret sharing: any t shares reconstruct the secret, fewer are consistent with every secret.
SECRETS = st.one_of(st.binary(min_size=32, max_size=32), st.sampled_from([bytes(32), b"\xff" * 32]))


def reconstruct(points: Sequence[int], shares: Sequence[bytes]) -> bytes | None:
    return shamir.combine(shamir.lagrange(points), shares)


def test_the_modulus_is_prime() -> None:
    # Miller and Rabin's test for the first twenty primes: a composite passes with probability below 4^-20.
    p, odd, twos = shamir.PRIME, shamir.PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71):
        power = pow(base, odd, p)
        assert power in (1, p - 1) or any((power := power * power % p) == p - 1 for _ in range(twos - 1))


@given(secret=SECRETS, n=st.integers(1, 9), data=st.data())
def test_any_threshold_of_the_shares_reconstructs_the_secret(secret: bytes, n: int, data: st.DataObject) -> None:
    t = data.draw(st.integers(1, n))
    points = data.draw(st.lists(st.integers(1, 10_000), min_size=n, max_size=n, unique=True))
    shares = dict(zip(points, shamir.split(secret, t, points, SystemEntropy()), strict=True))
    chosen = data.draw(st.permutations(points))[: data.draw(st.integers(t, n))]
    assert reconstruct(chosen, [shares[x] for x in chosen]) == secret


@given(secret=SECRETS, other=SECRETS)
def test_fewer_shares_are_consistent_with_every_secret(secret: bytes, other: bytes) -> None:
    # For t - 1 shares and any other secret a polynomial passes through them all: they exclude no secret.
    shares = shamir.split(secret, 3, [1, 2, 3], SystemEntropy())[:2]
    values = [int.from_bytes(other, "big"), *(int.from_bytes(share, "big") for share in shares)]
    at_three = sum(c * y for c, y in zip(shamir.lagrange([0, 1, 2], at=3), values, strict=True)) % shamir.PRIME
    assert reconstruct([1, 2, 3], [*shares, at_three.to_bytes(33, "big")]) == other


def test_a_wrong_share_gives_another_secret() -> None:
    shares = shamir.split(bytes(32), 2, [1, 2], SystemEntropy())
    wrong = (int.from_bytes(shares[0], "big") ^ 1).to_bytes(33, "big")
    assert reconstruct([1, 2], [wrong, shares[1]]) != bytes(32)


def test_a_value_above_256_bits_is_not_a_secret() -> None:
    share = (2**256 + 5).to_bytes(33, "big")
    assert reconstruct([1], [share]) is None


def test_a_share_has_one_encoding() -> None:
    shares = shamir.split(bytes(range(32)), 2, [1, 2], SystemEntropy())
    again = (int.from_bytes(shares[0], "big") + shamir.PRIME).to_bytes(33, "big")
    assert reconstruct([1, 2], shares) == bytes(range(32))
    assert reconstruct([1, 2], [again, shares[1]]) is None


def test_the_same_secret_is_shared_anew_every_time() -> None:
    first, second = (shamir.split(bytes(32), 2, [1, 2], SystemEntropy()) for _ in range(2))
    assert not set(first) & set(second)


def test_the_polynomial_takes_48_bytes_a_coefficient(entropy: Any) -> None:
    asked: list[int] = []

    class Counting:
        def bytes(self, n: int) -> bytes:
            asked.append(n)
            return entropy.bytes(n)  # type: ignore[no-any-return]

    shamir.split(bytes(32), 5, range(1, 8), Counting())
    assert asked == [4 * 48]


@pytest.mark.parametrize(
    ("secret", "threshold", "points"),
    [
        (bytes(31), 2, [1, 2]),
        (bytes(32), 3, [1, 2]),
        (bytes(32), 0, [1, 2]),
        (bytes(32), 2, [1, 1]),
        (bytes(32), 2, [0, 1]),
    ],
)
def test_invalid_parameters_are_refused(secret: bytes, threshold: int, points: list[int]) -> None:
    with refused(ConfigError, "shamir.split"):
        shamir.split(secret, threshold, points, SystemEntropy())


def test_two_shares_of_one_holder_are_refused() -> None:
    with refused(ProtocolError, "shamir.points"):
        shamir.lagrange([1, 2, 1])
