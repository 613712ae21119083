"""The Merkle tree of RFC 9162, section 2.1, over SHA-256: root, inclusion proof, consistency proof. A proof is a short
list of hashes. With it, whoever has the signed root of a log can check that an entry is in the log, or that a log seen
earlier is a prefix of the present one, without the log itself."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

from aggregation.errors import TrustError

HASH = 32  # bytes
EMPTY = hashlib.sha256(b"").digest()  # the root of an empty tree
_LEAF, _NODE = b"\x00", b"\x01"  # domain separation: no leaf hash can be a node hash (section 2.1.1)


def leaf_hash(entry: bytes) -> bytes:
    return hashlib.sha256(_LEAF + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(_NODE + left + right).digest()


class Tree:
    """A growing tree. It holds 64 bytes a leaf; a new leaf costs two hashes on average, root and proofs O(log² n).

    >>> tree = Tree([b"a", b"b", b"c"])
    >>> verify_inclusion(tree.root(), 3, 1, b"b", tree.inclusion(1))
    >>> verify_consistency(tree.root(2), 2, tree.root(), 3, tree.consistency(2))
    >>> Tree().root() == EMPTY
    True
    """

    __slots__ = ("_levels",)

    def __init__(self, entries: Iterable[bytes] = ()) -> None:
        # _levels[k][i] is the root of the leaves from i * 2^k up to (i + 1) * 2^k, as soon as all of these exist.
        self._levels: list[list[bytes]] = [[]]
        for entry in entries:
            self.append(entry)

    @property
    def size(self) -> int:
        return len(self._levels[0])

    def append(self, entry: bytes) -> None:
        self._levels[0].append(leaf_hash(entry))
        for level, nodes in enumerate(self._levels):
            if len(nodes) % 2:
                return
            if level + 1 == len(self._levels):
                self._levels.append([])
            self._levels[level + 1].append(node_hash(nodes[-2], nodes[-1]))

    def root(self, size: int | None = None) -> bytes:
        """The root of the first ``size`` leaves; of all leaves by default. ``EMPTY`` for none. Raises ValueError: there
        are fewer leaves."""
        return self._range(0, self._upto(size))

    def inclusion(self, index: int, size: int | None = None) -> tuple[bytes, ...]:
        """PATH of section 2.1.3.1: proof that leaf ``index`` is among the first ``size`` leaves (by default all).
        Raises ValueError: there is no such leaf."""
        end = self._upto(size)
        if not 0 <= index < end:
            raise ValueError(f"leaf {index} is not among {end}")
        return self._beside(index, end, index + 1)[1]

    def consistency(self, old: int, size: int | None = None) -> tuple[bytes, ...]:
        """PROOF of section 2.1.4.1: proof that the tree of ``old`` leaves is a prefix of that of ``size`` (by default
        all). Raises ValueError: there are fewer leaves, or ``old`` is 0: an empty tree needs no proof."""
        end = self._upto(size)
        if not 0 < old <= end:
            raise ValueError(f"{old} leaves are not the beginning of {end}")
        start, path = self._beside(0, end, old)
        # The verifier knows the root of the old tree and needs no hash for it.
        return (*([self._range(start, old)] if start else []), *path)

    def _beside(self, first: int, end: int, last: int) -> tuple[int, tuple[bytes, ...]]:
        """Descend from the root of ``end`` leaves to the largest subtree that ends with leaf ``last`` - 1 and begins at
        ``first`` or later: where it begins, and the roots of the subtrees beside the way, the lowest one first."""
        start, path = 0, list[bytes]()
        while end != last or start < first:
            middle = start + _split(end - start)
            if last <= middle:
                path.append(self._range(middle, end))
                end = middle
            else:
                path.append(self._range(start, middle))
                start = middle
        return start, tuple(reversed(path))

    def _upto(self, size: int | None) -> int:
        end = self.size if size is None else size
        if not 0 <= end <= self.size:
            raise ValueError(f"{end} leaves are not among {self.size}")
        return end

    def _range(self, start: int, end: int) -> bytes:
        """MTH of section 2.1.1 of the leaves ``start`` to ``end``, where ``start`` is a multiple of the split sizes."""
        count = end - start
        if count == 0:
            return EMPTY
        if count & (count - 1) == 0:
            level = count.bit_length() - 1
            return self._levels[level][start >> level]
        middle = start + _split(count)
        return node_hash(self._range(start, middle), self._range(middle, end))


def _split(count: int) -> int:
    """The largest power of two below ``count``."""
    return 1 << (count - 1).bit_length() - 1


def verify_inclusion(root: bytes, size: int, index: int, entry: bytes, path: Sequence[bytes]) -> None:
    """Check that ``path`` proves that ``entry`` is leaf ``index`` of the tree of ``size`` leaves with this root.
    Source: RFC 9162, section 2.1.3.2. Raises TrustError."""
    problem = TrustError(
        f"the proof does not show that entry {index} is in the log of {size} entries", about="log.inclusion"
    )
    if not 0 <= index < size:
        raise problem
    found = leaf_hash(entry)
    for is_left, step in _climb(index, size - 1, path, problem):
        found = node_hash(step, found) if is_left else node_hash(found, step)
    if found != root:
        raise problem


def verify_consistency(old_root: bytes, old: int, root: bytes, size: int, path: Sequence[bytes]) -> None:
    """Check that ``path`` proves that the tree of ``old`` leaves is a prefix of the tree of ``size`` leaves, by their
    roots. Source: RFC 9162, section 2.1.4.2. Raises TrustError."""
    problem = TrustError(
        f"the proof does not show that the log of {size} entries begins with the {old} entries seen before",
        about="log.consistency",
    )
    if not 0 < old <= size:
        raise problem
    if old == size:
        if path or old_root != root:
            raise problem
        return
    steps = [old_root, *path] if old & (old - 1) == 0 else list(path)
    if not steps:
        raise problem
    node, last = old - 1, size - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    first = second = steps[0]
    for is_left, step in _climb(node, last, steps[1:], problem):
        first = node_hash(step, first) if is_left else first
        second = node_hash(step, second) if is_left else node_hash(second, step)
    if first != old_root or second != root:
        raise problem


def _climb(node: int, last: int, path: Sequence[bytes], problem: TrustError) -> Iterator[tuple[bool, bytes]]:
    """Yield the steps of a proof from ``node`` of a level whose last one is ``last`` up to the root, and whether each
    is the left neighbor. Raises ``problem``: there are too few or too many."""
    for step in path:
        if last == 0:
            raise problem
        is_left = bool(node & 1) or node == last
        yield is_left, step
        while is_left and not node & 1 and node:
            node, last = node >> 1, last >> 1
        node, last = node >> 1, last >> 1
    if last:
        raise problem
