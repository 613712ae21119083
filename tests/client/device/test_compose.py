"""What adapters side by side give is what the sum of their updates gives."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.layout import Tensors
from aggregation.errors import ConfigError, TrustError
from aggregation.pki.identity import IdentityKey
from client.inference.compose import WeightedAdapter, choose, compose, parse, written
from client.inference.library import chosen
from client.inference.session import ClassificationSession
from client.inference.trust import Trust, VerifiedAdapter
from export.bundle.base import ExportedBase
from export.bundle.write import AdapterSource, add_adapter

Source = Callable[..., AdapterSource]
PHRASES = ["turn on the kitchen lights", "lock the door", "play music"]


@pytest.fixture
def with_anna(bundle: Path, exported: ExportedBase, source: Source, household: IdentityKey) -> Path:
    add_adapter(bundle, exported.plan, source("anna", seed=7, parent="a" * 64), key=household, form="fp32")
    return bundle


def verified(bundle: Path, *names: str) -> list[VerifiedAdapter]:
    trust = Trust.open(bundle)
    base = trust.base(bundle)
    return [trust.adapter(bundle, base, name) for name in names]


def updates(inputs: Tensors) -> dict[str, np.ndarray]:
    """``A @ B`` of each layer, in float64."""
    return {
        name: inputs[name].astype(np.float64) @ inputs[name.replace("lora_A", "lora_B")]
        for name in inputs
        if "lora_A" in name
    }


def test_the_update_is_the_weighted_sum_of_the_updates(with_anna: Path, exported: ExportedBase) -> None:
    anna, shared = verified(with_anna, "anna", "global")
    composed = compose(parse("global:0.5+anna:1.25"), [anna, shared], exported.card)
    assert composed.rank == 8
    for name, found in updates(composed.inputs).items():
        expected = 1.25 * updates(anna.inputs)[name] + 0.5 * updates(shared.inputs)[name]
        np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())
        assert np.abs(expected - updates(anna.inputs)[name]).max() > 0.01


def test_a_head_is_the_mean_with_the_weights_as_shares(with_anna: Path, exported: ExportedBase) -> None:
    anna, shared = verified(with_anna, "anna", "global")
    composed = compose(parse("global:0.5+anna:1.5"), [anna, shared], exported.card)
    for name in ("classifier.weight", "classifier.bias"):
        expected = 0.75 * anna.inputs[name] + 0.25 * shared.inputs[name]
        np.testing.assert_allclose(composed.inputs[name], expected, rtol=1e-6, atol=1e-6)


def test_the_same_head_twice_stays_the_same_to_the_bit(
    bundle: Path, exported: ExportedBase, source: Source, household: IdentityKey
) -> None:
    add_adapter(bundle, exported.plan, source("anna", parent="a" * 64), key=household)
    composed = compose(parse("global:0.3+anna:0.7"), verified(bundle, "anna", "global"), exported.card)
    (shared,) = verified(bundle, "global")
    np.testing.assert_array_equal(composed.inputs["classifier.weight"], shared.inputs["classifier.weight"])


def test_an_adapter_composed_of_its_halves_answers_as_the_whole(
    bundle: Path, exported: ExportedBase, source: Source, household: IdentityKey
) -> None:
    add_adapter(bundle, exported.plan, source("anna", parent="a" * 64), key=household)
    session = ClassificationSession.open(bundle)
    session.use("global")
    whole = session.rank(PHRASES, 4)
    session.use(["global", "anna"], weights=[0.5, 0.5])
    for one, other in zip(whole, session.rank(PHRASES, 4), strict=True):
        assert [p.label for p in one] == [p.label for p in other]
        assert [p.probability for p in one] == pytest.approx([p.probability for p in other], abs=1e-6)


def test_a_composition_is_named_by_its_parts_and_answers_unlike_each(with_anna: Path) -> None:
    session = ClassificationSession.open(with_anna)
    answers = []
    for names, shown in (("global", "global"), ("anna", "anna"), ("global:0.5+anna", "anna+global:0.5")):
        assert session.use(names).name == shown
        answers.append(session.rank(PHRASES, 4))
    assert answers[2] not in answers[:2]


def test_heads_for_other_labels_have_no_mean(
    bundle: Path, exported: ExportedBase, source: Source, household: IdentityKey
) -> None:
    other = replace(source("anna", parent="a" * 64), labels=("Light", "Lock", "Timer", "Music"))
    add_adapter(bundle, exported.plan, other, key=household)
    session = ClassificationSession.open(bundle)
    session.use("global")
    with pytest.raises(ConfigError, match="other labels, which have no mean"):
        session.use("global+anna")
    assert session.adapter is not None
    assert session.adapter.name == "global"


def test_ranks_that_add_up_above_the_bases_limit_are_refused(with_anna: Path, exported: ExportedBase) -> None:
    card = replace(exported.card, max_rank=7)
    with pytest.raises(ConfigError, match="rank 8, above the base's limit of 7"):
        compose(parse("anna+global"), verified(with_anna, "anna", "global"), card)


def test_each_part_of_a_composition_is_verified(with_anna: Path) -> None:
    (with_anna / "adapters" / "anna.onnx_adapter").write_bytes(b"")
    with pytest.raises(TrustError, match="not the file that was signed"):
        ClassificationSession.open(with_anna).use("global+anna")


@pytest.mark.parametrize("text", ["global", "anna+global", "anna:0.5+global", "a.b-c_d:16", "a:0.12345678+b:1e-05"])
def test_a_choice_reads_back_as_it_is_written(text: str) -> None:
    assert written(parse(text)) == text


def test_the_order_and_a_weight_of_one_make_no_difference() -> None:
    assert parse("global:1 + anna") == parse("anna : 1.0+global") == chosen(["global", "anna"]) == chosen("anna+global")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "adapter name ''"),
        ("global+", "adapter name ''"),
        ("../global", "adapter name"),
        ("global:x", "'x' is no weight"),
        ("global:", "'' is no weight"),
        ("global:1:2", "'1:2' is no weight"),
        ("global:nan", "above 0 and at most 16"),
        ("global:inf", "above 0 and at most 16"),
        ("global:0", "above 0 and at most 16"),
        ("global:-1", "above 0 and at most 16"),
        ("global+global:2", "named twice"),
    ],
)
def test_a_choice_that_is_none_is_refused_in_a_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_as_many_weights_as_names_are_needed() -> None:
    with pytest.raises(ConfigError, match="2 adapters were named and 1 weights given"):
        chosen(["global", "anna"], [1.0])
    with pytest.raises(ConfigError, match="no adapter was named"):
        chosen([])
    assert choose([WeightedAdapter("anna", 2.0)]) == chosen("anna", [2.0])


def test_a_repr_shows_no_weights(with_anna: Path, exported: ExportedBase) -> None:
    composed: Any = compose(parse("anna+global"), verified(with_anna, "anna", "global"), exported.card)
    assert "inputs" not in repr(composed)
