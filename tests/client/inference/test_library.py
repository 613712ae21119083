"""A composition gives the weighted sum of its adapters' updates, and adapters stay loaded within the cache's limits."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from aggregation.errors import ConfigError, DataError, TrustError
from client.inference.library import AdapterCache, Composition, Library, WeightedAdapter, compose
from client.inference.session import ClassificationSession
from client.inference.trust import Trust, VerifiedAdapter
from edgeadapt.formats.graphinputs import DOWN, DOWN_BIAS, UP, UP_BIAS
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.methods.bottleneck import change
from export.bundle.write import AdapterSource
from export.onnx.exported import ExportedBase
from tests.support import refused
from tests.support.models import Source

Add = Callable[[AdapterSource], None]
PHRASES = ["turn on the kitchen lights", "lock the door", "play music"]


def verified(bundle: Path, *names: str) -> list[VerifiedAdapter]:
    trust = Trust.open(bundle)
    base = trust.bundle.base()
    return [trust.adapter(name, base) for name in names]


def updates(inputs: Tensors) -> dict[str, np.ndarray]:
    """``A @ B`` of each layer, in float64."""
    return {
        name: inputs[name].astype(np.float64) @ inputs[name.replace("lora_A", "lora_B")]
        for name in inputs
        if "lora_A" in name
    }


def test_the_update_is_the_weighted_sum_of_the_updates(with_anna: Path, exported: ExportedBase) -> None:
    anna, shared = verified(with_anna, "anna", "global")
    composed = compose(Composition.parse("global:0.5+anna:1.25"), [anna, shared], exported.manifest)
    assert composed.rank == 8
    for name, found in updates(composed.inputs).items():
        expected = 1.25 * updates(anna.inputs)[name] + 0.5 * updates(shared.inputs)[name]
        np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())
        assert np.abs(expected - updates(anna.inputs)[name]).max() > 0.01


def test_a_head_is_the_weighted_mean_of_the_heads(with_anna: Path, exported: ExportedBase) -> None:
    anna, shared = verified(with_anna, "anna", "global")
    composed = compose(Composition.parse("global:0.5+anna:1.5"), [anna, shared], exported.manifest)
    for name in ("classifier.weight", "classifier.bias"):
        expected = 0.75 * anna.inputs[name] + 0.25 * shared.inputs[name]
        np.testing.assert_allclose(composed.inputs[name], expected, rtol=1e-6, atol=1e-6)


def test_the_mean_of_equal_heads_is_bitwise_the_same_head(
    bundle: Path, exported: ExportedBase, source: Source, add: Add
) -> None:
    add(source("anna", parent="a" * 64))
    composed = compose(Composition.parse("global:0.3+anna:0.7"), verified(bundle, "anna", "global"), exported.manifest)
    (shared,) = verified(bundle, "global")
    np.testing.assert_array_equal(composed.inputs["classifier.weight"], shared.inputs["classifier.weight"])


def test_the_temperature_of_a_composition_is_the_mean_weighted_as_the_heads_are(
    bundle: Path, exported: ExportedBase, source: Source, add: Add
) -> None:
    add(replace(source("anna", parent="a" * 64), temperature=3.0))
    for written, expected in (("anna", 3.0), ("global", 1.0), ("global:0.5+anna:1.5", 2.5), ("anna:7", 3.0)):
        composition = Composition.parse(written)
        parts = verified(bundle, *(part.name for part in composition.parts))
        assert compose(composition, parts, exported.manifest).temperature == pytest.approx(expected)


SCALE, SHIFT, NORM = "q.output_scale", "q.output_offset", "norm.weight.replaced"


def with_vectors(adapters: list[VerifiedAdapter], **vectors: list[list[list[float]]]) -> list[VerifiedAdapter]:
    """The adapters with vectors besides: of each name, one value for each adapter."""
    rows = {name: [np.array(value, np.float32).reshape(-1, 2) for value in values] for name, values in vectors.items()}
    return [
        VerifiedAdapter(one.manifest, one.inputs | {name: values[number] for name, values in rows.items()})
        for number, one in enumerate(adapters)
    ]


def test_what_vectors_change_is_added_up(with_anna: Path, exported: ExportedBase) -> None:
    vectors = {SCALE: [[[3.0, 0.0]], [[0.5, 2.0]]], SHIFT: [[[1.0, -1.0]], []], NORM: [[], [[7.0, 0.0]]]}
    adapters = with_vectors(verified(with_anna, "anna", "global"), **vectors)
    composed = compose(Composition.parse("anna:-0.5+global"), adapters, exported.manifest).inputs
    np.testing.assert_array_equal(composed[SCALE], [[1 - 0.5 * 2 - 0.5, 1 + 0.5 + 1]])
    np.testing.assert_array_equal(composed[SHIFT], [[-0.5, 0.5]])
    np.testing.assert_array_equal(composed[NORM], [[7.0, 0.0]])


def test_what_bottleneck_adapters_add_is_added_up(with_anna: Path, exported: ExportedBase) -> None:
    rng = np.random.default_rng(0)
    shapes = {DOWN[2]: (4, 5), DOWN_BIAS[2]: (1, 5), UP[2]: (5, 4), UP_BIAS[2]: (1, 4)}
    parts = [{f"q{end}": rng.standard_normal(shape, np.float32) for end, shape in shapes.items()} for _ in range(2)]
    both = zip(verified(with_anna, "anna", "global"), parts, strict=True)
    adapters = [VerifiedAdapter(one.manifest, one.inputs | part) for one, part in both]
    composed = compose(Composition.parse("anna:-0.5+global"), adapters, exported.manifest).inputs
    y = torch.from_numpy(rng.standard_normal((5, 4), np.float32))

    def added(inputs: Tensors) -> Floats:
        one = {name: torch.from_numpy(value) for name, value in inputs.items() if ".bottleneck" in name}
        return change("bottleneck_gelu", y, lambda part: one[f"q.bottleneck_gelu_{part}"]).numpy()

    np.testing.assert_allclose(added(composed), added(parts[1]) - 0.5 * added(parts[0]), atol=1e-5)
    with refused(ConfigError, "composition.rank", value=10):
        compose(Composition.parse("anna+global"), adapters, replace(exported.manifest, max_rank=9))


def test_replaced_parameters_are_composed_with_weights_that_add_up_to_one(
    with_anna: Path, exported: ExportedBase
) -> None:
    adapters = with_vectors(verified(with_anna, "anna", "global"), **{NORM: [[[1.0, 2.0]], [[3.0, 0.0]]]})
    composed = compose(Composition.parse("anna:1.5+global:-0.5"), adapters, exported.manifest).inputs
    np.testing.assert_array_equal(composed[NORM], [[0.0, 3.0]])
    with refused(ConfigError, "composition.weight"):
        compose(Composition.parse("anna+global"), adapters, exported.manifest)
    with refused(ConfigError, "composition.weight"):
        compose(Composition.parse("anna:0.5"), adapters[:1], exported.manifest)


def test_a_subtracted_adapter_loses_its_update_and_has_no_part_in_the_head(
    with_anna: Path, exported: ExportedBase
) -> None:
    anna, shared = verified(with_anna, "anna", "global")
    composed = compose(Composition.parse("global+anna:-0.5"), [anna, shared], exported.manifest)
    np.testing.assert_array_equal(composed.inputs["classifier.weight"], shared.inputs["classifier.weight"])
    for name, found in updates(composed.inputs).items():
        expected = updates(shared.inputs)[name] - 0.5 * updates(anna.inputs)[name]
        np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())
    with refused(ConfigError, "composition.weight"):
        compose(Composition.parse("anna:-1"), [anna], exported.manifest)


def test_adapters_with_different_labels_are_not_composed(bundle: Path, source: Source, add: Add) -> None:
    add(replace(source("anna", parent="a" * 64), labels=("Light", "Lock", "Timer", "Music")))
    session = ClassificationSession.open(bundle)
    with refused(ConfigError, "composition.labels", value="global"):
        session.load("global+anna")


def test_a_composition_above_the_bases_maximum_rank_is_refused(with_anna: Path, exported: ExportedBase) -> None:
    manifest = replace(exported.manifest, max_rank=7)
    with refused(ConfigError, "composition.rank", value=8) as caught:
        compose(Composition.parse("anna+global"), verified(with_anna, "anna", "global"), manifest)
    assert str(caught.value) == "anna+global has rank 8, above the base's limit of 7; leave one out"


def test_each_part_of_a_composition_is_verified(with_anna: Path) -> None:
    (with_anna / "adapters" / "anna.onnx_adapter").write_bytes(b"")
    with pytest.raises(TrustError):
        ClassificationSession.open(with_anna).load("global+anna")


# Compositions in writing


@pytest.mark.parametrize(
    "text", ["global", "anna+global", "anna:0.5+global", "a.b-c_d:16", "a:0.12345678+b:1e-05", "a+b:-0.5"]
)
def test_a_composition_reads_back_as_it_is_written(text: str) -> None:
    assert str(Composition.parse(text)) == text


def test_the_order_of_names_and_a_weight_of_one_make_no_difference() -> None:
    expected = Composition((WeightedAdapter("anna"), WeightedAdapter("global")))
    for given in ("global:1 + anna", "anna : 1.0+global", "anna+global", ["global", "anna"]):
        assert Composition.of(given) == expected


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("global:x", "composition.weight"),
        ("global:", "composition.weight"),
        ("global:1:2", "composition.weight"),
        ("global:nan", "composition.weight"),
        ("global:inf", "composition.weight"),
        ("global:0", "composition.weight"),
        ("global:-16.1", "composition.weight"),
        ("global:16.1", "composition.weight"),
        ("global+global:2", "composition"),
    ],
)
def test_a_wrong_composition_is_refused(text: str, about: str) -> None:
    with refused(ConfigError, about):
        Composition.parse(text)


@pytest.mark.parametrize("text", ["", "global+", "../global"])
def test_a_composition_with_a_wrong_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Composition.parse(text)


def test_a_composition_names_an_adapter() -> None:
    with refused(ConfigError, "composition"):
        Composition.of([])


# The bundle


def test_a_bundle_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with refused(DataError, "bundle", value=str(tmp_path / "nowhere")):
        Library.open(tmp_path / "nowhere", None)


def test_the_default_is_the_personal_adapter_else_the_global_one(bundle: Path, source: Source, add: Add) -> None:
    assert Library.open(bundle, None).default() == "global"
    add(source("anna", parent="a" * 64))
    assert Library.open(bundle, None).default() == "anna"
    add(source("bert", parent="a" * 64))
    with refused(ConfigError, "adapter"):
        Library.open(bundle, None).default()


def test_a_bundle_without_adapters_has_no_default(bundle: Path) -> None:
    for path in (bundle / "adapters").iterdir():
        path.unlink()
    with refused(DataError, "adapter"):
        Library.open(bundle, None).default()


# The cache


class Entry:
    """A value of the cache, with its size."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def cache_of(count: int, nbytes: int, evicted: Callable[[Entry], object] = lambda _: None) -> AdapterCache[Entry]:
    return AdapterCache[Entry](count, nbytes, lambda entry: entry.nbytes, lambda _: True, evicted)


def named(name: str) -> Composition:
    return Composition.of(name)


def test_the_least_recently_used_adapter_is_evicted_when_there_are_too_many() -> None:
    evicted: list[Entry] = []
    cache, entries = cache_of(2, 100, evicted.append), {name: Entry(1) for name in "abc"}
    cache[named("a")], cache[named("b")] = entries["a"], entries["b"]
    assert cache.get(named("a")) is entries["a"]
    cache[named("c")] = entries["c"]
    assert evicted == [entries["b"]]
    assert [named(name) in cache for name in "abc"] == [True, False, True]


def test_as_many_adapters_are_evicted_as_the_limit_of_bytes_requires() -> None:
    evicted: list[Entry] = []
    cache, entries = cache_of(10, 100, evicted.append), [Entry(size) for size in (40, 40, 20, 70)]
    for name, entry in zip("abc", entries, strict=False):
        cache[named(name)] = entry
    assert (evicted, cache.currsize) == ([], 100)
    cache[named("d")] = entries[3]
    assert (evicted, cache.currsize) == (entries[:2], 90)


def test_an_adapter_above_the_limit_is_held_alone() -> None:
    evicted: list[Entry] = []
    cache, small, huge, last = cache_of(10, 100, evicted.append), Entry(10), Entry(500), Entry(1)
    cache[named("a")] = small
    cache[named("huge")] = huge
    assert evicted == [small]
    assert cache.get(named("huge")) is huge
    cache[named("b")] = last
    assert (evicted, cache.currsize, len(cache)) == ([small, huge], 1, 1)


@pytest.mark.parametrize(
    ("count", "nbytes", "about"), [(0, 1, "loaded"), (1, 0, "loaded_bytes"), (-1, 5, "loaded"), (5, -1, "loaded_bytes")]
)
def test_a_limit_below_one_is_refused(count: int, nbytes: int, about: str) -> None:
    with refused(ConfigError, about):
        cache_of(count, nbytes)


class Yielding(Composition):
    """A key that lets other threads run whenever it is looked up."""

    __slots__ = ()

    def __hash__(self) -> int:
        time.sleep(0)
        return super().__hash__()


def test_threads_that_share_a_cache_leave_the_sizes_right() -> None:
    cache, failed = cache_of(2, 100), []

    def work() -> None:
        try:
            for turn in range(300):
                if cache.get(key := Yielding((WeightedAdapter("abc"[turn % 3]),))) is None:
                    cache[key] = Entry(10)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert cache.currsize == 10 * len(cache) == 20


@pytest.mark.parametrize(
    ("installed", "accepted"), [("1.21.9", False), ("1.22.0", True), ("2.0", True), ("0.99", False)]
)
def test_a_base_for_a_newer_runtime_is_refused_before_it_is_loaded(
    bundle: Path, exported: ExportedBase, monkeypatch: pytest.MonkeyPatch, installed: str, accepted: bool
) -> None:
    monkeypatch.setattr(ort, "__version__", installed)
    monkeypatch.setattr(ort, "InferenceSession", None)
    assert exported.manifest.onnxruntime == "1.22"
    if accepted:
        assert Library.open(bundle, None).manifest == exported.manifest
    else:
        with refused(ConfigError, "onnxruntime", value=installed) as caught:
            ClassificationSession.open(bundle)
        assert "1.22" in str(caught.value)
