"""What a policy allows, as the vectors say; ``tests/browser/js/policy.test.mjs`` holds the page to the same ones."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from aggregation.errors import ConfigError, TrustError
from edgeadapt.formats.policy import Policy, blocks
from edgeadapt.formats.settings import LONGEST
from tests.support import refused

VECTORS = json.loads((Path(__file__).parents[2] / "vectors/policy.json").read_text(encoding="utf-8"))
POLICY = Policy.parse(VECTORS["policy"], "policy.json")


@pytest.mark.parametrize("case", VECTORS["answers"])
def test_an_answer_is_judged_by_its_label_its_probability_and_its_text(case: dict[str, Any]) -> None:
    (label, probability), *_ = case["ranked"]
    outcome = POLICY.outcome([case["text"]], label, probability)
    assert (outcome.value, POLICY.says(outcome)) == (case["outcome"], case["says"])


@pytest.mark.parametrize("case", VECTORS["texts"])
def test_a_pattern_finds_every_spelling(case: dict[str, Any]) -> None:
    assert blocks(POLICY.input, case["text"], case.get("read", case["text"])) == case["blocked"]


@pytest.mark.parametrize("case", VECTORS["combinations"])
def test_only_the_named_adapters_are_combined(case: dict[str, Any]) -> None:
    if case["allowed"]:
        POLICY.check_combination(case["names"])
    else:
        with refused(ConfigError, "composition.policy"):
            POLICY.check_combination(case["names"])


def test_what_is_signed_comes_back_and_nothing_else_is_read() -> None:
    assert Policy.decode(POLICY.encode()) == POLICY
    bodies = [{**VECTORS["policy"], **change} for change in VECTORS["malformed"]]
    for raw in (
        *(json.dumps(body).encode() for body in bodies),
        b"[]",
        b'{"deny":[],"deny":[]}',
        b" " * LONGEST + b"{}",
    ):
        with refused(TrustError, "policy.json") as caught:
            Policy.decode(raw)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", VECTORS["refused_patterns"])
def test_a_pattern_of_another_time_or_meaning_is_refused_when_the_policy_is_made(pattern: str) -> None:
    with pytest.raises(ConfigError):
        Policy.parse({"input": [pattern]}, "policy.toml")


def test_the_slowest_pattern_is_read_in_time_linear_in_the_text() -> None:
    slow = Policy.parse({"input": ["[a-z]{0,9}[a-z]{99}[0-9]"]}, "policy.toml").input

    def seconds(length: int) -> float:
        begun = time.process_time()
        assert not blocks(slow, "a" * length)
        return time.process_time() - begun

    short = min(seconds(4000) for _ in range(3))
    assert min(seconds(16000) for _ in range(3)) < 8 * short  # 16 times as long if it were quadratic


def test_a_label_that_no_adapter_has_is_refused() -> None:
    POLICY.check_labels([*POLICY.deny, *POLICY.confirm, *POLICY.thresholds])
    with refused(ConfigError, "--policy"):
        POLICY.check_labels(["unlock", "lights on", "__proto__"])
