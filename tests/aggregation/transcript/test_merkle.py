"""The Merkle tree against a second implementation that follows the text of RFC 9162."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import TrustError
from aggregation.transcript import merkle
from aggregation.transcript.merkle import Tree, verify_consistency, verify_inclusion
from tests.support import refused

Entries = list[bytes]
logs = st.lists(st.binary(max_size=4), min_size=1, max_size=40)


# Section 2.1, as it is written there: recursive, over slices.


def mth(entries: Entries) -> bytes:
    if not entries:
        return hashlib.sha256().digest()
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    k = largest_power_below(len(entries))
    return hashlib.sha256(b"\x01" + mth(entries[:k]) + mth(entries[k:])).digest()


def largest_power_below(n: int) -> int:
    k = 1
    while 2 * k < n:
        k *= 2
    return k


def path(m: int, entries: Entries) -> list[bytes]:
    if len(entries) == 1:
        return []
    k = largest_power_below(len(entries))
    if m < k:
        return [*path(m, entries[:k]), mth(entries[k:])]
    return [*path(m - k, entries[k:]), mth(entries[:k])]


def subproof(m: int, entries: Entries, whole: bool) -> list[bytes]:
    if m == len(entries):
        return [] if whole else [mth(entries)]
    k = largest_power_below(len(entries))
    if m <= k:
        return [*subproof(m, entries[:k], whole), mth(entries[k:])]
    return [*subproof(m - k, entries[k:], False), mth(entries[:k])]


@given(logs)
def test_root_and_proofs_are_those_of_the_rfc(entries: Entries) -> None:
    tree = Tree(entries)
    for size in range(len(entries) + 1):
        assert tree.root(size) == mth(entries[:size])
    for index in range(len(entries)):
        assert tree.inclusion(index) == tuple(path(index, entries))
        assert tree.consistency(index + 1) == tuple(subproof(index + 1, entries, True))


@given(logs, st.data())
def test_proofs_about_an_earlier_size_are_those_of_the_smaller_tree(entries: Entries, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(entries)))
    index = data.draw(st.integers(0, size - 1))
    now, then = Tree(entries), Tree(entries[:size])
    assert now.inclusion(index, size) == then.inclusion(index)
    assert now.consistency(index + 1, size) == then.consistency(index + 1)


@given(logs)
def test_genuine_proofs_are_accepted(entries: Entries) -> None:
    tree, size = Tree(entries), len(entries)
    for index, entry in enumerate(entries):
        verify_inclusion(tree.root(), size, index, entry, tree.inclusion(index))
        verify_consistency(tree.root(index + 1), index + 1, tree.root(), size, tree.consistency(index + 1))


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=40, unique=True), st.data())
def test_an_inclusion_proof_proves_only_its_own_claim(numbers: list[int], data: st.DataObject) -> None:
    entries = [str(number).encode() for number in numbers]
    tree, size = Tree(entries), len(entries)
    index = data.draw(st.integers(0, size - 1))
    proof = tree.inclusion(index)
    for other in range(size):
        if other != index:
            with pytest.raises(TrustError):
                verify_inclusion(tree.root(), size, other, entries[index], proof)
            with pytest.raises(TrustError):
                verify_inclusion(tree.root(), size, index, entries[other], proof)
    assert_altered_proofs_fail(proof, lambda steps: verify_inclusion(tree.root(), size, index, entries[index], steps))


@given(st.integers(2, 40), st.data())
def test_a_consistency_proof_proves_no_other_prefix(size: int, data: st.DataObject) -> None:
    entries = [bytes([number]) for number in range(size)]
    old = data.draw(st.integers(1, size))
    changed = data.draw(st.integers(0, old - 1))
    rewritten = Tree([b"other" if index == changed else entry for index, entry in enumerate(entries)])
    tree, past = Tree(entries), Tree(entries[:old])
    with pytest.raises(TrustError):
        verify_consistency(past.root(), old, rewritten.root(), size, rewritten.consistency(old))
    assert_altered_proofs_fail(
        tree.consistency(old), lambda steps: verify_consistency(past.root(), old, tree.root(), size, steps)
    )


def assert_altered_proofs_fail(proof: tuple[bytes, ...], verify: object) -> None:
    altered = [(*proof, bytes(32))]
    for index, step in enumerate(proof):
        altered += [proof[:index] + proof[index + 1 :], (*proof[:index], bytes(32), *proof[index + 1 :])]
        altered += [(*proof[:index], step, *proof[index:])]
    for steps in altered:
        with pytest.raises(TrustError):
            verify(steps)  # type: ignore[operator]


@pytest.mark.parametrize("index", [-1, 5, 6])
def test_an_index_outside_the_tree_is_refused(index: int) -> None:
    tree = Tree([b"a", b"b", b"c", b"d", b"e"])
    with pytest.raises(ValueError, match="not among 5"):
        tree.inclusion(index)
    with pytest.raises(TrustError):
        verify_inclusion(tree.root(), 5, index, b"e", tree.inclusion(4))


@pytest.mark.parametrize("old", [-1, 0, 6])
def test_a_prefix_outside_the_tree_is_refused(old: int) -> None:
    tree = Tree([b"a", b"b", b"c", b"d", b"e"])
    with pytest.raises(ValueError, match="not the beginning of 5"):
        tree.consistency(old)
    with pytest.raises(TrustError):
        verify_consistency(merkle.EMPTY, old, tree.root(), 5, [])


def test_sizes_beyond_the_tree_are_refused() -> None:
    with pytest.raises(ValueError, match="3 leaves are not among 2"):
        Tree([b"a", b"b"]).root(3)


def test_a_node_never_passes_for_a_leaf() -> None:
    left, right = merkle.leaf_hash(b"a"), merkle.leaf_hash(b"b")
    assert Tree([left + right]).root() != Tree([b"a", b"b"]).root()


@pytest.mark.parametrize("index", [-1, 1, 2])
def test_an_index_outside_a_tree_of_one_leaf_is_refused(index: int) -> None:
    """With one leaf there is no step at which the proof could fail by itself."""
    tree = Tree([b"only"])
    verify_inclusion(tree.root(), 1, 0, b"only", ())
    with refused(TrustError, "log.inclusion"):
        verify_inclusion(tree.root(), 1, index, b"only", ())


@pytest.mark.parametrize(("old", "size", "claimed"), [(1, 2, 3), (1, 2, 20), (3, 5, 9), (6, 8, 17)])
def test_a_proof_does_not_pass_for_one_about_a_longer_log(old: int, size: int, claimed: int) -> None:
    tree = Tree(bytes([number]) for number in range(size))
    verify_consistency(tree.root(old), old, tree.root(), size, tree.consistency(old))
    with refused(TrustError, "log.consistency"):
        verify_consistency(tree.root(old), old, tree.root(), claimed, tree.consistency(old))


@pytest.mark.parametrize("old", [3, 4])
def test_an_empty_proof_proves_nothing(old: int) -> None:
    tree = Tree(bytes([number]) for number in range(5))
    with refused(TrustError, "log.consistency"):
        verify_consistency(tree.root(old), old, tree.root(), 5, ())
