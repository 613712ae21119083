"""Drops from an ONNX graph the shapes that it declares for its slots, so that one run can take an adapter for each row.

A graph declares the shapes of one adapter, as ONNX demands of every input, and ONNX Runtime refuses an input of another
number of dimensions than the declared one. MatMul, Mul and Add broadcast whatever was declared. The graph is edited as
protobuf bytes (protobuf.dev/programming-guides/encoding), because a device has no library for them."""

from collections.abc import Callable, Collection, Iterator

GRAPH, INPUT, NAME, TYPE, TENSOR_TYPE, SHAPE = 7, 11, 1, 2, 1, 2  # numbers of fields in onnx.proto
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # wire types


def without_shapes(model: bytes, slots: Collection[str]) -> bytes:
    """Remove the shapes of the inputs ``slots`` from a serialized ``ModelProto``, and keep all else byte for byte.
    Raises ValueError if it is not protobuf."""
    names = {name.encode() for name in slots}

    def declared(value: bytes) -> bytes:
        if not any(value[start:end] in names for number, _, start, end in _fields(value) if number == NAME):
            return value
        return _edited(value, TYPE, lambda kind: _edited(kind, TENSOR_TYPE, lambda of: _edited(of, SHAPE, None)))

    return _edited(model, GRAPH, lambda graph: _edited(graph, INPUT, declared))


def _edited(message: bytes, field: int, change: Callable[[bytes], bytes] | None) -> bytes:
    """Apply ``change`` to each message in ``field``; drop these if it is None."""
    parts = []
    for number, whole, start, end in _fields(message):
        if number != field:
            parts.append(message[whole:end])
        elif change is not None:
            content = change(message[start:end])
            parts += [_varint(field << 3 | LENGTH), _varint(len(content)), content]
    return b"".join(parts)


def _fields(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield the number of each field, and where it begins, where its content begins, and where both end."""
    at = 0
    while at < len(message):
        whole = at
        tag, at = _read(message, at)
        kind, start = tag & 7, at
        if kind == VARINT:
            _, at = _read(message, at)
        elif kind == LENGTH:
            size, start = _read(message, at)
            at = start + size
        elif kind in (FIXED64, FIXED32):
            at += 8 if kind == FIXED64 else 4
        else:
            raise ValueError("not protobuf: an unknown wire type")
        if at > len(message):
            raise ValueError("not protobuf: a field ends outside of its message")
        yield tag >> 3, whole, start, at


def _read(message: bytes, at: int) -> tuple[int, int]:
    """Read the varint at ``at``, and return where it ends."""
    value = shift = 0
    for index in range(at, min(at + 10, len(message))):
        value |= (message[index] & 127) << shift
        if message[index] < 128:
            return value, index + 1
        shift += 7
    raise ValueError("not protobuf: a number does not end")


def _varint(value: int) -> bytes:
    parts = []
    while value >= 128:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes((*parts, value))
