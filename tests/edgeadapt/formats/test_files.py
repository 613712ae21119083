"""Adapter files: deterministic bytes that plain safetensors opens, and damage that always ends in a ``DataError``."""

import numpy as np
import pytest
import safetensors.numpy

from aggregation.errors import DataError
from edgeadapt.formats import files
from edgeadapt.formats.layout import Layout, Tensors
from tests.support import refused

TENSORS: Tensors = {
    "base.classifier.bias": np.array([0.5, -0.25], np.float32),
    "base.query.lora_A.weight": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "base.query.lora_B.weight": np.zeros((4, 3), np.float32),
}
LAYOUT = Layout.of(TENSORS)
BLOB = files.encode(TENSORS)


def _equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_decode_gives_back_what_encode_took() -> None:
    assert _equal(files.decode(BLOB, LAYOUT), TENSORS)
    assert _equal(files.decode(BLOB), TENSORS)


def test_equal_tensors_give_equal_bytes_in_any_order_and_any_memory_layout() -> None:
    shuffled = {name: np.asfortranarray(TENSORS[name]) for name in reversed(TENSORS)}
    assert files.encode(shuffled) == BLOB
    assert files.sha256(files.encode(shuffled)) == files.sha256(BLOB)


def test_a_strided_view_is_written_by_value() -> None:
    wide = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (wide[:, ::2], wide.T, wide[::-1]):
        assert np.array_equal(files.decode(files.encode({"a": view}))["a"], view)


def test_a_scalar_tensor_keeps_its_shape() -> None:
    assert files.decode(files.encode({"a": np.array(3, np.float32)}))["a"].shape == ()


def test_the_bytes_of_a_known_adapter_never_change() -> None:
    header = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    padded = header + b" " * (-len(header) % 8)
    expected = len(padded).to_bytes(8, "little") + padded + np.array([1, 2], "<f4").tobytes()
    assert files.encode({"a": np.array([1, 2], np.float32)}) == expected


def test_plain_safetensors_opens_the_file() -> None:
    assert _equal(safetensors.numpy.load(BLOB), TENSORS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_neither_written_nor_read(value: float) -> None:
    broken = {**TENSORS, "base.classifier.bias": np.array([0.5, value], np.float32)}
    with refused(DataError, "base.classifier.bias", value=None):
        files.encode(broken)
    with refused(DataError, "base.classifier.bias", value=None):
        files.decode(safetensors.numpy.save(broken))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int8])
def test_tensors_of_another_type_are_refused(dtype: type) -> None:
    with refused(DataError, "a", value=f"{np.dtype(dtype)} [3]"):
        files.decode(safetensors.numpy.save({"a": np.zeros(3, dtype)}))


def test_bfloat16_which_numpy_lacks_is_refused() -> None:
    with pytest.raises(DataError):
        files.decode(files.encode({"a": np.zeros(3, np.float32)}).replace(b'"F32"', b'"BF16"'))
    header = b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    with refused(DataError, "adapter", value=None):
        files.decode(len(header).to_bytes(8, "little") + header + bytes(4))


def test_an_adapter_of_another_layout_is_refused() -> None:
    with refused(DataError, "base.classifier.bias", value="missing"):
        files.decode(files.encode({"other": np.zeros(2, np.float32)}), LAYOUT)


def test_a_file_without_tensors_is_refused() -> None:
    with refused(DataError, "layout"):
        files.decode(safetensors.numpy.save({}))


def test_an_oversized_file_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ADAPTER", len(BLOB) - 1)
    monkeypatch.setattr(files, "load", lambda _: pytest.fail("parsed"))
    with refused(DataError, "adapter", value=len(BLOB)):
        files.decode(BLOB)


def test_a_header_that_claims_a_huge_tensor_is_refused() -> None:
    header = b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,18446744073709551615]}}'
    with refused(DataError, "adapter", value=None):
        files.decode(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize("length", range(0, len(BLOB), 7))
def test_a_truncated_file_is_refused(length: int) -> None:
    with refused(DataError, "adapter", value=None):
        files.decode(BLOB[:length], LAYOUT)


def test_a_file_with_bytes_left_over_is_refused() -> None:
    with refused(DataError, "adapter", value=None):
        files.decode(BLOB + b"\0", LAYOUT)


def test_a_flipped_byte_in_names_shapes_types_or_offsets_is_refused() -> None:
    start, end = 8 + BLOB[8:].index(b'"base.'), 8 + int.from_bytes(BLOB[:8], "little")
    header = BLOB[:end].rstrip()
    for position in range(start, len(header)):
        with pytest.raises(DataError):
            files.decode(BLOB[:position] + bytes([BLOB[position] ^ 1]) + BLOB[position + 1 :], LAYOUT)
