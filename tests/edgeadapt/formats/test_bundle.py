"""What is wrong with a bundle besides the cases of tests/vectors/test_bundle.py is refused before anything is used."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from aggregation.entropy import SystemEntropy
from aggregation.errors import DataError, EdgeAdaptError, TrustError
from aggregation.pki.identity import IdentityKey
from edgeadapt.formats import bundle as bundles
from edgeadapt.formats.bundle import (
    MODEL,
    TOKENIZER,
    WEB_MODEL,
    WEIGHTS,
    Bundle,
    VerifiedAdapter,
    adapter_names,
)
from edgeadapt.formats.cores import ahead, cores
from edgeadapt.formats.graphinputs import check_slots, from_inputs, layout_of, to_inputs
from edgeadapt.formats.layout import Floats, Layout, Tensors, TensorSpec
from export.bundle.write import add_adapter, write_bundle
from export.onnx.exported import ExportedBase
from tests.support import models, refused
from tests.support.bundles import flip, resign_base
from tests.support.models import Source

tiny_base, model, source, bundle = models.tiny_base, models.model, models.source, models.bundle
exported = models.exported
vendor, household = models.vendor, models.household

BASE_FILES = [f"base/{name}" for name in ("manifest.json", MODEL, WEIGHTS, WEB_MODEL, TOKENIZER)]
FILES = [*BASE_FILES, "adapters/global.json", "adapters/global.onnx_adapter"]


@pytest.fixture
def trusted(bundle: Path, vendor: IdentityKey, household: IdentityKey) -> Bundle:
    """``bundle``, whose manifests may be signed by vendor and household."""
    return Bundle(bundle, (vendor.public, household.public))


def accept(bundle: Bundle, name: str = "global") -> VerifiedAdapter:
    """The base and the adapter, verified."""
    return bundle.adapter(name, bundle.base().manifest)


def test_a_sound_bundle_is_accepted_with_its_tensors(trusted: Bundle, exported: ExportedBase, source: Source) -> None:
    base, adapter = trusted.base(), accept(trusted)
    assert base.manifest == exported.manifest
    assert {name: base.read(name) for name in base.manifest.files} == {
        n: exported.read(n) for n in exported.manifest.files
    }
    expected = to_inputs(source().tensors, exported.adapter_inputs.scaling)
    assert adapter.inputs.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(adapter.inputs[name], value, atol=np.abs(value).max() / 100)


@pytest.mark.parametrize("form", ["fp32", "fp16", "int8", "int4"])
def test_every_format_is_read(
    trusted: Bundle, exported: ExportedBase, source: Source, vendor: IdentityKey, form: Any
) -> None:
    write_bundle(trusted.folder, exported, [source()], key=vendor, form=form)
    adapter = accept(trusted)
    assert adapter.manifest.format == form
    for name, value in to_inputs(source().tensors, exported.adapter_inputs.scaling).items():
        np.testing.assert_allclose(adapter.inputs[name], value, atol=np.abs(value).max() / 5)


# --- files


@pytest.mark.parametrize("file", ["base/manifest.json", "adapters/global.json", "adapters/global.onnx_adapter"])
def test_a_file_above_its_limit_is_not_read_to_its_end(trusted: Bundle, file: str) -> None:
    with (trusted.folder / file).open("r+b") as raw:
        raw.truncate(2**40)  # sparse: more than any memory holds, and no byte on the disk
    with refused(TrustError, Path(file).name):
        accept(trusted)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_file_without_an_end_is_refused_and_not_waited_for(trusted: Bundle, file: str, kind: str) -> None:
    path = trusted.folder / file
    path.unlink()
    {"pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "folder": Path.mkdir}[kind](path)
    with refused(DataError, path.name):
        accept(trusted)


def test_files_of_file_managers_are_ignored(trusted: Bundle) -> None:
    (trusted.folder / "base" / ".DS_Store").write_bytes(b"x")
    (trusted.folder / "adapters" / "._global.json").write_bytes(b"x")
    assert accept(trusted).manifest.name == "global"
    assert adapter_names(trusted.folder) == ["global"]


@pytest.mark.parametrize("change", ["written", "replaced", "removed"])
def test_a_base_that_changes_between_check_and_use_is_refused(trusted: Bundle, change: str) -> None:
    base = trusted.base()
    base.check()
    data = trusted.folder / "base" / WEIGHTS
    stat, raw = data.stat(), data.read_bytes()
    if change != "written":
        data.unlink()
    if change != "removed":
        data.write_bytes(raw)
        os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a forger sets the times of writing back
    with refused(TrustError, WEIGHTS):
        base.check()


def test_a_file_that_is_read_after_the_check_is_verified_again(trusted: Bundle) -> None:
    base = trusted.base()
    flip(trusted.folder / "base" / WEIGHTS, 0.5)
    with refused(TrustError, WEIGHTS):
        base.read(WEIGHTS)


def test_only_small_files_of_the_base_are_held_in_memory(trusted: Bundle) -> None:
    assert sorted(trusted.base().files) == [MODEL, TOKENIZER]


def test_a_limit_above_all_memory_costs_no_memory(bundle: Path) -> None:
    path = bundle.parent / "trust.pem"
    assert bundles.read_file(path, 2**62) == path.read_bytes()


# --- manifests


def test_an_adapter_signed_by_someone_else_is_refused(trusted: Bundle, source: Source, exported: ExportedBase) -> None:
    stranger = IdentityKey.generate(SystemEntropy())
    add_adapter(trusted.folder, exported.adapter_inputs, source(version=9), key=stranger)
    with refused(TrustError, "keyid", value=stranger.public.key_id):
        accept(trusted)


@pytest.mark.parametrize("file", ["base/manifest.json", "adapters/global.json"])
def test_a_damaged_manifest_is_named_by_its_file_with_the_remedy(trusted: Bundle, file: str) -> None:
    (trusted.folder / file).write_bytes(b"{}")
    with refused(TrustError, "envelope") as caught:
        accept(trusted)
    assert str(caught.value).startswith(f"{trusted.folder / file}: not a signed document")
    assert str(caught.value).endswith("copy it again from a trusted source")


def test_a_private_adapter_signed_by_the_household_is_accepted(
    trusted: Bundle, source: Source, exported: ExportedBase, household: IdentityKey
) -> None:
    add_adapter(trusted.folder, exported.adapter_inputs, source("anna", parent="a" * 64), key=household)
    assert accept(trusted, "anna").manifest.parent == "a" * 64


def test_a_base_manifest_that_lists_a_file_too_many_or_too_few_is_refused(
    trusted: Bundle, exported: ExportedBase, vendor: IdentityKey
) -> None:
    listed = exported.manifest.files
    cases: list[tuple[dict[str, str], type[EdgeAdaptError], str]] = [
        (listed | {"extra": "0" * 64}, DataError, "extra"),
        ({name: digest for name, digest in listed.items() if name != MODEL}, TrustError, MODEL),
        ({name: digest for name, digest in listed.items() if name != WEB_MODEL}, TrustError, WEB_MODEL),
        ({}, TrustError, MODEL),
        ({"../trust.pem": "0" * 64, MODEL: "0" * 64}, TrustError, "base-manifest.files.../trust.pem.[key]"),
    ]
    for files, kind, about in cases:
        resign_base(trusted.folder, vendor, files=files)
        with refused(kind, about):
            trusted.base()


def test_an_unknown_name_is_answered_with_the_known_ones(trusted: Bundle) -> None:
    with refused(DataError, "anna.json", value="anna") as caught:
        accept(trusted, "anna")
    assert "it has: global" in str(caught.value)


# Layout laws: tensors to one flat vector and back, and the refusal of everything that does not fit.
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


# An adapter's tensors as inputs of a graph, and the slots that they fill exactly.
A, B, HEAD, BIAS = "x.query.lora_A.weight", "x.query.lora_B.weight", "head.weight", "head.bias"
SLOTS = {A: ("6", "rank_0"), B: ("rank_0", "5"), HEAD: ("labels", "4"), BIAS: ("labels",)}


def inputs(rank: int = 2, labels: int = 3) -> Tensors:
    rng = np.random.default_rng(0)
    shapes = {A: (6, rank), B: (rank, 5), HEAD: (labels, 4), BIAS: (labels,)}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def peft_tensors() -> Tensors:
    return {"base_model.model." + name: value.T.copy() if "lora" in name else value for name, value in inputs().items()}


def test_lora_is_transposed_and_its_scaling_is_folded_into_b() -> None:
    tensors = peft_tensors()
    found = to_inputs(tensors, {"x.query": 2.5})
    np.testing.assert_array_equal(found[A], tensors["base_model.model." + A].T)
    np.testing.assert_array_equal(found[B], tensors["base_model.model." + B].T * np.float32(2.5))
    np.testing.assert_array_equal(found[HEAD], tensors["base_model.model." + HEAD])
    assert all(value.flags.c_contiguous for value in found.values())


@pytest.mark.parametrize("scaling", [0.5, 2.5, 0.0])
def test_inputs_become_the_tensors_again_unless_the_scaling_is_zero(scaling: float) -> None:
    tensors = peft_tensors()
    found = from_inputs(to_inputs(tensors, {"x.query": scaling}), {"x.query": scaling})
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        expected = value * 0 if scaling == 0 and name.endswith(B) else value
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)


def test_the_layout_of_the_inputs_is_that_of_the_tensors() -> None:
    assert layout_of(to_inputs(peft_tensors(), {"x.query": 2.5})) == Layout.of(peft_tensors())


def test_an_adapter_that_fits_gives_each_free_dimension_its_size() -> None:
    assert check_slots(inputs(rank=7, labels=2), SLOTS) == {"rank_0": 7, "labels": 2}


@pytest.mark.parametrize(
    ("name", "shape"),
    [(A, (7, 2)), (B, (3, 5)), (BIAS, (4,)), (HEAD, (3, 4, 1))],
    ids=["width", "another rank than A", "another number of labels than the weight", "dimensions"],
)
def test_a_tensor_of_a_shape_that_its_slot_does_not_take_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with refused(DataError, name):
        check_slots(inputs() | {name: np.ones(shape, np.float32)}, SLOTS)


def test_a_missing_and_an_unknown_tensor_are_refused() -> None:
    with refused(DataError, "extra"):
        check_slots(inputs() | {"extra": np.ones(1, np.float32)}, SLOTS)
    with refused(DataError, BIAS):
        check_slots({name: value for name, value in inputs().items() if name != BIAS}, SLOTS)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_vector_is_there_once_or_not(rows: int) -> None:
    slots = {"key.output_scale": ("given_0", "5")}
    assert check_slots({"key.output_scale": np.ones((rows, 5), np.float32)}, slots) == {"given_0": rows}
    with refused(DataError, "key.output_scale"):
        check_slots({"key.output_scale": np.ones((2, 5), np.float32)}, slots)


# How many cores there are, also where the system does not say which of them are ours; and work that is done ahead.
def test_as_many_as_this_process_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3}, raising=False)
    assert cores() == 2


@pytest.mark.parametrize(("found", "count"), [(8, 8), (None, 1)])
def test_where_affinity_is_unknown_all_of_them(monkeypatch: pytest.MonkeyPatch, found: int | None, count: int) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: found)
    assert cores() == count


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_outcomes_come_in_order_each_with_its_item_and_its_error(threads: int) -> None:
    items = []
    for item, outcome in ahead(lambda item: 12 // item, [3, 0, 4, 1, 0], threads):
        items.append(item)
        if item:
            assert outcome() == 12 // item
        else:
            with pytest.raises(ZeroDivisionError):
                outcome()
    assert items == [3, 0, 4, 1, 0]


def test_calls_run_at_the_same_time() -> None:
    both = Barrier(2, timeout=10)
    assert sorted(outcome() for _, outcome in ahead(lambda item: both.wait(), range(4), 2)) == [0, 0, 1, 1]


@pytest.mark.parametrize(("threads", "first"), [(1, [0]), (3, [0, 1, 2, 3])])
def test_few_items_wait_for_the_caller(threads: int, first: list[int]) -> None:
    taken: list[int] = []
    go = Event()

    def items() -> Iterator[int]:
        for item in range(9):
            taken.append(item)
            if item == len(first) - 1:
                go.set()
            yield item

    outcomes = ahead(lambda item: go.wait(10) and taken[-1] < 0, items(), threads)
    next(outcomes)
    assert taken == first
    assert [item for item, _ in outcomes] == list(range(1, 9))
