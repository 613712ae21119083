"""What a suite reports: figures, differences, costs; in words that say no more than the numbers do."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.errors import DataError
from edgeadapt.formats.layout import Tensors
from simulations.plan import Kind, SearchOutcome, Suite, Trial
from simulations.report.pages import Page, Table, headline, markdown, notes, suite_page, write_suite_report
from simulations.report.summary import PairSummary, SuiteSummary, summarize
from simulations.result import CanaryBounds, RoundPoint, RoundTally, Tally, TrialResult
from simulations.scenario import Scenario
from simulations.suite.execute import compute, compute_rounds
from simulations.suite.store import Store
from simulations.suite.trial import aggregation_error
from tests.support import refused
from tests.support.pages import outline

NONE = SearchOutcome({}, (), 0.0)
HOSTILE = "<script>alert(1)</script>"
ARMS = {"base": {"kind": "base"}, "local": {"kind": "local"}, "personal": {"kind": "personal"}}


@pytest.fixture
def suite(suite_of: Callable[..., Suite]) -> Suite:
    return suite_of(ARMS, baseline="local", compare=[["personal", "base"]], target=0.7)


@pytest.fixture
def summary(suite: Suite, result_of: Callable[..., TrialResult]) -> SuiteSummary:
    """Two seeds with ten clients each, of which three are unseen; personal is better by 3 of 10 than local."""

    def results(*shifts: int) -> dict[int, TrialResult]:
        return {
            seed: result_of(*(min(10, 3 + i % 3 + shift) for i in range(10)), unseen=3, cpu_seconds=10.0 * (seed + 1))
            for seed, shift in enumerate(shifts)
        }

    rounds = (RoundPoint(1, 0.5, 100.0), RoundPoint(2, None, 200.0), RoundPoint(3, 0.75, 300.0))
    personal = {seed: replace(result, rounds=rounds if seed else rounds[:2]) for seed, result in results(3, 4).items()}
    chosen = SearchOutcome({"personal.epochs": 2}, (({}, 0.5), ({}, None)), 90.0)
    noisy = {"epsilon": 5.6, "canaries": CanaryBounds(1000, 712, 5.6, 0.6, 4.81, 0.95)}
    measured = {s: replace(result, aggregation_error=0.1 * (s + 1), **noisy) for s, result in personal.items()}
    return summarize(
        suite.settings, {"base": (NONE, results(-1, 0)), "local": (NONE, results(0, 1)), "personal": (chosen, measured)}
    )


def test_figures_are_means_over_seeds_of_the_clients_that_are_not_unseen(summary: SuiteSummary) -> None:
    local = summary.arms["local"].figures
    assert local["mean"].value == pytest.approx((27 / 70 + 34 / 70) / 2)
    assert local["worst"].value == pytest.approx(0.35)
    assert local["unseen"].value == pytest.approx((0.4 + 0.5) / 2)
    assert all(arm.figures[title].low <= arm.figures[title].value <= arm.figures[title].high
               for arm in summary.arms.values() for title in arm.figures)  # fmt: skip
    assert (summary.clients, summary.unseen) == (20, 6)


def test_the_aggregation_error_and_epsilon_are_means_over_seeds_where_they_were_measured(summary: SuiteSummary) -> None:
    assert summary.arms["personal"].aggregation_error == pytest.approx(0.15)
    assert math.isnan(summary.arms["local"].aggregation_error)
    rows = [line for line in markdown(summary).splitlines() if line.startswith(("| local", "| personal"))]
    assert [row.split(" | ")[-2:] for row in rows[:2]] == [["–", "– |"], [".150", "5.60 (canaries: 4.81) |"]]


def test_a_pair_is_compared_client_by_client(summary: SuiteSummary) -> None:
    assert [(pair.first, pair.second) for pair in summary.pairs] == [
        ("base", "local"),
        ("personal", "local"),
        ("personal", "base"),
    ]
    found = summary.pairs[1].figures["mean"]  # every client is better by exactly .3, whatever is drawn
    assert (found.value, found.low, found.high) == pytest.approx((0.3, 0.3, 0.3))
    assert not found.is_noise
    assert found.p <= found.adjusted < 0.01


def test_forgetting_is_what_the_base_knew_and_the_arm_does_not(
    suite: Suite, result_of: Callable[..., TrialResult]
) -> None:
    def result(right: str) -> TrialResult:
        one = result_of(5).clients[0]
        return replace(result_of(5), clients=(replace(one, test=Tally(right, 1.0)),))

    found = {"base": "1100", "local": "0101", "personal": "1100"}
    made = {name: (NONE, {0: result(right), 1: result(right)}) for name, right in found.items()}
    arms = summarize(suite.settings, made).arms
    assert [arms[name].forgotten for name in found] == [0.0, 0.5, 0.0]
    assert math.isnan(arms["local"].figures["unseen"].value)
    assert "unseen" not in summarize(suite.settings, made).pairs[0].figures


def test_costs_are_means_over_seeds_and_rounds_to_the_target_end_before_the_round_that_states_it(
    summary: SuiteSummary,
) -> None:
    personal = summary.arms["personal"]
    assert personal.cost.cpu_seconds == 15.0
    assert (personal.candidates, personal.search_cpu_seconds) == (2, 90.0)
    assert personal.reached is not None
    assert (personal.reached.seeds, personal.reached.rounds, personal.reached.bytes) == (1, 2.0, 200.0)
    assert summary.arms["local"].reached is None


def test_arms_with_other_clients_cannot_be_compared(suite: Suite, result_of: Callable[..., TrialResult]) -> None:
    found = {name: (NONE, {0: result_of(5, 6), 1: result_of(5, 6)}) for name in ARMS}
    found["personal"] = (NONE, {0: result_of(5, 6), 1: result_of(5)})
    with refused(DataError, "personal"):
        summarize(suite.settings, found)


def test_the_page_loads_nothing_has_every_number_and_escapes_names(summary: SuiteSummary) -> None:
    html = suite_page(summary)
    seen = outline(html).seen
    assert "//" not in html
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in seen}
    for arm in summary.arms.values():
        assert f'<td data-title="mean">{arm.figures["mean"].value:.3f} <small>('.replace("0.", ".") in html
    assert '<th scope="row">personal - local</th><td data-title="mean">+30.0 <small>(30.0 to 30.0)</small></td>' in html
    assert suite_page(summary) == html
    arms = {HOSTILE: replace(summary.arms["base"], constants={HOSTILE: HOSTILE}), **summary.arms}
    pairs = (PairSummary(HOSTILE, "local", summary.pairs[0].figures),)
    hostile = suite_page(replace(summary, name=HOSTILE, arms=arms, pairs=pairs))
    assert "<script" not in hostile
    assert "&lt;script" in hostile
    outline(hostile)


def test_the_headline_names_the_cheapest_arm_that_noise_does_not_tell_from_the_best(
    suite_of: Callable[..., Suite], result_of: Callable[..., TrialResult]
) -> None:
    kinds = {"local": "local", "ridge": "ridge-head", "personal": "personal", "central": "central", "base": "base"}
    settings = suite_of({name: {"kind": kind} for name, kind in kinds.items()}).settings
    right = {
        "local": ((5, 7, 6, 8), 50.0),
        "ridge": ((8, 5, 8, 7), 3.0),
        "personal": ((7, 8, 7, 8), 50.0),
        "central": ((9, 9, 9, 9), 1.0),  # gives up privacy
        "base": ((1, 1, 1, 1), 0.1),
    }
    found: dict[str, Any] = {
        name: (NONE, {seed: result_of(*counts, cpu_seconds=cpu) for seed in (0, 1)})
        for name, (counts, cpu) in right.items()
    }
    summary = summarize(settings, found)
    assert (summary.standing.best, summary.standing.cheapest) == ("personal", "ridge")
    assert "base" not in summary.standing.within_noise
    said = "ridge is the cheapest arm within noise of the best, .700 at 0.8 s of CPU a device; personal has the"
    assert headline(summary).startswith(said)
    assert all(headline(summary) in text for text in (suite_page(summary), markdown(summary)))
    assert summary.to_json()["standing"]["cheapest"] == "ridge"
    few = {name: (NONE, {seed: result_of(counts[0]) for seed in (0, 1)}) for name, (counts, _) in right.items()}
    assert "too few clients to say which arms are within noise" in headline(summarize(settings, few))
    few["personal"] = few["ridge"] = (NONE, {seed: result_of(9, bytes_up=9.0) for seed in (0, 1)})
    few["local"] = (NONE, {seed: result_of(9) for seed in (0, 1)})  # equal, and sends nothing
    assert summarize(settings, few).standing.cheapest == "local"


def test_an_arm_that_failed_or_lacks_rounds_is_marked_everywhere_and_never_averaged_silently(
    suite_of: Callable[..., Suite], result_of: Callable[..., TrialResult]
) -> None:
    settings = suite_of(ARMS | {"analytic": {"kind": "global"}}, baseline="local").settings
    good = {0: result_of(5, 6, 7, 8), 1: result_of(5, 6, 7, 8)}
    short, void = RoundTally(13, 1, resumed=(3,), retries=1), RoundTally(6, 6, unfitted=True)
    found: dict[str, Any] = {
        "base": (NONE, {0: good[0], 1: "the loss is not finite"}),
        "local": (NONE, good),
        "personal": (NONE, {seed: replace(result, round_tally=short) for seed, result in good.items()}),
        "analytic": (NONE, {0: replace(result_of(9, 9, 9, 9), round_tally=void), 1: good[1]}),
    }
    summary = summarize(settings, found)
    lines = notes(summary)
    assert lines == [
        "base (!) failed with seed 1 and has no figures: the loss is not finite; its mean is .650 with seed 0.",
        "personal (!), seeds 0, 1: 1 of 13 rounds aborted.",
        "personal (!), seeds 0, 1: the rounds began again 1 time, because some had aborted.",
        lines[3],  # of the interruption
        "analytic (!), seed 0: every round aborted, so its figures are not those of its method.",
        lines[5],
    ]
    assert "in round 3" in lines[3]
    assert "--retry" in lines[5]
    for text in (suite_page(summary), markdown(summary)):
        assert all(line in text for line in lines)
        assert text.count("analytic (!)") >= 3
    assert {name: arm["complete"] for name, arm in summary.to_json()["arms"].items()} == {
        "base": False,
        "local": True,
        "personal": False,
        "analytic": False,
    }
    assert math.isnan(summary.arms["base"].figures["mean"].value)
    assert [(pair.first, pair.second) for pair in summary.pairs] == [("personal", "local"), ("analytic", "local")]
    assert "analytic" not in headline(summary)


def test_the_page_of_one_arm_without_a_pair_has_no_comparison(
    suite_of: Callable[..., Suite], result_of: Callable[..., TrialResult]
) -> None:
    settings = suite_of({"base": {"kind": "base"}}).settings
    alone = summarize(settings, {"base": (NONE, {0: result_of(5), 1: result_of(6)})})
    assert "Differences" not in suite_page(alone)
    assert "| base | .550 |" in markdown(alone)


def test_an_interval_is_printed_small_but_not_the_mark_of_an_arm_nor_what_follows_it() -> None:
    html = Page("map", "m", "h", [Table("t", "", ["place", "ours", "other"], [["x", ".7 (.6–.8)", "b (!) .5"]])]).html()
    assert ">.7 <small>(.6–.8)</small></td>" in html
    assert ">b (!) .5</td>" in html


def test_all_files_are_written_and_equal_suites_give_equal_files(summary: SuiteSummary, tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        write_suite_report(summary, folder)
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"report.html", "report.md", "report.png", "report.json"}
    assert contents[0]["report.png"].startswith(b"\x89PNG")
    table: dict[str, Any] = json.loads(contents[0]["report.json"])
    assert table["arms"]["personal"]["kind"] == "personal"
    assert table["arms"]["local"]["reached"] is None
    assert not re.search(rb"NaN|Infinity", contents[0]["report.json"])


# The error of the mean of LoRA's factors, against its definition; and which methods have one.
WEIGHTS = (3.0, 1.0, 4.0)


def device(seed: int, *, a: int | None = None, b: int | None = None) -> Tensors:
    """Two layers and a head; ``a`` and ``b`` seed the factors, if they are not the device's own."""
    found: Tensors = {"classifier.weight": np.full((2, 3), seed, np.float32)}
    for layer in range(2):
        for factor, own, shape in (("A", a, (2, 5)), ("B", b, (4, 2))):
            rng = np.random.default_rng([seed if own is None else own, layer, ord(factor)])
            found[f"layer.{layer}.lora_{factor}.weight"] = rng.normal(size=shape).astype(np.float32)
    return found


def test_the_error_is_that_of_the_definition() -> None:
    devices, shares = [device(seed) for seed in range(3)], np.array(WEIGHTS) / sum(WEIGHTS)

    def mean(name: str) -> np.ndarray:
        return np.tensordot(shares, np.stack([one[name].astype(np.float64) for one in devices]), 1)

    exact, product = [], []
    for layer in range(2):
        a, b = f"layer.{layer}.lora_A.weight", f"layer.{layer}.lora_B.weight"
        exact.append(sum(w * (one[b].astype(np.float64) @ one[a]) for w, one in zip(shares, devices, strict=True)))
        product.append(mean(b) @ mean(a))
    expected = np.linalg.norm(np.subtract(exact, product)) / np.linalg.norm(exact)
    assert aggregation_error(zip(devices, WEIGHTS, strict=True)) == pytest.approx(expected)
    assert expected > 0.3


@pytest.mark.parametrize("same", ["a", "b"])
def test_with_one_factor_in_common_the_error_is_zero(same: str) -> None:
    devices = [device(seed, **{same: 9}) for seed in range(3)]
    assert aggregation_error(zip(devices, WEIGHTS, strict=True)) < 1e-6


def test_without_an_update_there_is_no_share_of_it() -> None:
    zero = {name: np.zeros_like(value) if "lora_B" in name else value for name, value in device(0).items()}
    assert math.isnan(aggregation_error([(zero, 1.0)]))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_global_arm_has_the_error_of_its_method(scenario: Scenario, tmp_path: Path) -> None:
    found = {}
    for method in ("fedit", "ffa", "rolora", "fedsb", "fedsa", "head"):
        table = scenario.model_dump(mode="json")
        table["federation"] |= {"method": method}
        store, trial = Store(tmp_path), Trial(Kind.GLOBAL, Scenario.parse(table, "test"))
        compute_rounds(trial, store, lambda _: None)
        found[method] = compute(trial, store, lambda _: None).aggregation_error
    assert found.pop("head") is found.pop("fedsa") is None  # no update of LoRA; B stays on the devices
    assert found.pop("fedit") > 1e-3
    assert max(found.values()) < 1e-6
