"""Layout laws: tensors to one flat vector and back, and the refusal of everything that does not fit."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from aggregation.errors import DataError
from edgeadapt.formats.layout import Floats, Layout, Tensors, TensorSpec
from tests.support import refused

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
tensor = array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4).flatmap(
    lambda shape: arrays(np.float32, shape, elements=finite)
)
adapters = st.dictionaries(st.text(min_size=1, max_size=12), tensor, min_size=1, max_size=5)


def example() -> Tensors:
    return {"b": np.arange(3, dtype=np.float32), "a": np.arange(6, dtype=np.float32).reshape(2, 3)}


@given(adapters)
def test_unflatten_gives_back_what_flatten_took_bit_for_bit(tensors: Tensors) -> None:
    layout = Layout.of(tensors)
    back = layout.unflatten(layout.flatten(tensors))
    assert list(back) == sorted(tensors)
    for name, value in tensors.items():
        assert back[name].dtype == np.float32
        assert back[name].shape == value.shape
        assert back[name].tobytes() == value.tobytes()


@given(adapters)
def test_a_layout_depends_on_names_and_shapes_alone(tensors: Tensors) -> None:
    reversed_zeros = {name: np.zeros_like(tensors[name]) for name in reversed(tensors)}
    assert Layout.of(reversed_zeros) == Layout.of(tensors)
    assert Layout.of(reversed_zeros).digest == Layout.of(tensors).digest


@given(adapters, adapters)
def test_different_layouts_have_different_digests(one: Tensors, other: Tensors) -> None:
    assert (Layout.of(one) == Layout.of(other)) == (Layout.of(one).digest == Layout.of(other).digest)


@given(adapters)
def test_size_counts_every_element_once(tensors: Tensors) -> None:
    layout = Layout.of(tensors)
    assert layout.size == sum(value.size for value in tensors.values())
    assert layout.flatten(tensors).shape == (layout.size,)


def test_the_flat_vector_is_in_name_order_and_row_major() -> None:
    tensors = example()
    tensors["a"] = np.asfortranarray(tensors["a"])
    assert Layout.of(tensors).flatten(tensors).tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]


def test_the_digest_is_the_one_that_other_machines_compute() -> None:
    # printf '[["a",[2,3]],["b",[3]]]' | sha256sum
    assert Layout.of(example()).digest == "71db505eec0d01482da669044460bfd3a23e766539b4c19cd43492cf00276a64"


def _without(tensors: Tensors) -> None:
    del tensors["b"]


def _surplus(tensors: Tensors) -> None:
    tensors["c"] = np.zeros(1, np.float32)


def _put(name: str, value: Floats) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "about", "value"),
    [
        (_without, "b", "missing"),
        (_surplus, "c", "unknown"),
        (_put("a", np.zeros((3, 2), np.float32)), "a", "float32 [3, 2]"),
        (_put("b", np.zeros(3, np.float64)), "b", "float64 [3]"),
        (_put("b", np.zeros(3, ">f4")), "b", ">f4 [3]"),
        (_put("b", np.array([0, np.nan, 0], np.float32)), "b", None),
        (_put("b", np.array([0, np.inf, 0], np.float32)), "b", None),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    change: Callable[[Tensors], None], about: str, value: str | None
) -> None:
    layout, tensors = Layout.of(example()), example()
    layout.check(tensors)
    change(tensors)
    with refused(DataError, about, value=value):
        layout.check(tensors)
    with refused(DataError, about, value=value):
        layout.flatten(tensors)


@pytest.mark.parametrize(
    "vector", [np.zeros(8, np.float32), np.zeros((1, 9), np.float32), np.zeros(9, np.float64)], ids=str
)
def test_a_vector_of_another_size_or_type_is_refused(vector: Floats) -> None:
    with refused(DataError, "vector", value=vector.shape):
        Layout.of(example()).unflatten(vector)


def test_a_layout_without_tensors_or_out_of_order_cannot_be_built() -> None:
    a, b = TensorSpec("a", (1,)), TensorSpec("b", (1,))
    Layout((a, b))
    for specs in [(), (b, a), (a, a)]:
        with pytest.raises(DataError):
            Layout(specs)
