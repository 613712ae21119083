"""A mixed batch answers each row as it is answered alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aggregation.errors import ConfigError, DataError
from aggregation.pki.identity import IdentityKey
from client.inference.library import Composition, Library
from client.inference.session import ClassificationSession
from edgeadapt.bases.classifiergraph import MAX_ROWS, group_rows, stack
from edgeadapt.formats.layout import Tensors
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.exported import ExportedBase
from tests.support.models import Source

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


def loaded(bundle: Path, names: str) -> Tensors:
    return Library.open(bundle, None).load(Composition.parse(names)).inputs


def test_each_row_answers_as_it_does_alone(mixed: tuple[Path, ExportedBase]) -> None:
    session = ClassificationSession.open(mixed[0])
    together = session.rank_mixed(ROWS, 4)
    for (text, names), found in zip(ROWS, together, strict=True):
        (alone,) = session.rank([text], names, 4)
        assert [p.label for p in found] == [p.label for p in alone]
        assert [p.probability for p in found] == pytest.approx([p.probability for p in alone], abs=1e-6)


def test_rows_of_equal_length_and_rank_are_bitwise_the_same_as_alone(mixed: tuple[Path, ExportedBase]) -> None:
    session = ClassificationSession.open(mixed[0])
    rows = [("lock the door", "global"), ("lock the door", "anna"), ("open the door", "anna")]
    together = session.rank_mixed(rows, 4)
    for (text, names), found in zip(rows, together, strict=True):
        assert [found] == session.rank([text], names, 4)


def test_a_batch_without_rows_has_no_answers(mixed: tuple[Path, ExportedBase]) -> None:
    assert ClassificationSession.open(mixed[0]).rank_mixed([], 1) == []


@pytest.mark.parametrize("bad", [("", "global"), ("unlock", "nobody"), ("unlock", "../x")])
def test_one_wrong_row_refuses_the_batch(mixed: tuple[Path, ExportedBase], bad: tuple[str, str]) -> None:
    with pytest.raises((DataError, ConfigError)) as caught:
        ClassificationSession.open(mixed[0]).rank_mixed([*ROWS, bad], 1)
    assert "\n" not in str(caught.value)


def test_a_head_with_fewer_labels_is_padded_with_zeros(mixed: tuple[Path, ExportedBase]) -> None:
    bundle, base = mixed
    one, other = loaded(bundle, "global"), loaded(bundle, "anna")
    other = other | {n: v[:3] for n, v in other.items() if "classifier" in n}
    assert group_rows([one, other], base.manifest.slots) == [[0, 1]]
    for name, value in stack([one, other], base.manifest.slots).items():
        assert value.shape == (2, *one[name].shape)
        np.testing.assert_array_equal(value[0], one[name])
        kept = tuple(slice(size) for size in other[name].shape)
        np.testing.assert_array_equal(value[1][kept], other[name])
        assert np.count_nonzero(value[1]) == np.count_nonzero(other[name])


def test_rows_share_a_run_only_if_their_ranks_agree(mixed: tuple[Path, ExportedBase]) -> None:
    bundle, base = mixed
    rows = [loaded(bundle, name) for name in ("global", "small", "anna", "global", "anna+global", "small")]
    assert group_rows(rows, base.manifest.slots) == [[0, 2, 3], [1, 5], [4]]


def test_a_single_row_is_not_copied(mixed: tuple[Path, ExportedBase]) -> None:
    one = loaded(mixed[0], "global")
    for name, value in stack([one], mixed[1].manifest.slots).items():
        assert np.shares_memory(value, one[name])


def test_a_large_batch_is_split_into_runs_of_bounded_size(mixed: tuple[Path, ExportedBase]) -> None:
    session = ClassificationSession.open(mixed[0])
    rows = [("lock the door", "global"), ("play", "small")] * (MAX_ROWS + 1)
    runs = group_rows([loaded(mixed[0], name) for _, name in rows], mixed[1].manifest.slots)
    assert sorted(map(len, runs)) == [1, 1, MAX_ROWS, MAX_ROWS]
    answers = session.rank_mixed(rows, 3)
    assert answers == session.rank_mixed(rows[:2], 3) * (MAX_ROWS + 1)


def test_modules_to_save_other_than_a_head_are_shared_only_if_they_are_equal(mixed: tuple[Path, ExportedBase]) -> None:
    norm = {"norm.weight": ("32",)}
    values = [np.full(32, i, np.float32) for i in (0, 1, 0)]
    rows = [{"norm.weight": value} for value in values]
    assert group_rows(rows, norm) == [[0, 2], [1]]
    assert stack([rows[0], rows[2]], norm)["norm.weight"].shape == (32,)
