"""Derived entropy: the keystream of its secret, however it is drawn."""

from hypothesis import given
from hypothesis import strategies as st

from aggregation.entropy import DerivedEntropy


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
