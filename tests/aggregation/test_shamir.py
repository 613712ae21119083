"""Secret sharing: any t shares reconstruct the secret, fewer are consistent with every secret."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation import shamir
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, ProtocolError
from tests.support import refused

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
