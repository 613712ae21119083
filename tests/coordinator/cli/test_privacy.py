"""``edgeadapt simulate privacy`` states what sessions of these settings account for."""

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from aggregation.errors import ConfigError
from coordinator.cli.privacy import privacy
from coordinator.settings import FederationSettings, PrivacySettings
from edgeadapt.formats.layout import Layout, TensorSpec
from tests.support import refused

NOISY = ("--set", "privacy.mechanism=skellam", "--set", "privacy.epsilon=4.0", "--set", "rounds=3")


def invoke(*arguments: str) -> str:
    done = CliRunner().invoke(privacy, ["--numbers", "2000", *arguments])
    if done.exception:
        raise done.exception
    return done.output


def test_a_plan_is_that_of_the_session_and_epsilon_is_met(tmp_path: Path) -> None:
    (found,) = json.loads(invoke(*NOISY, "--devices", "30", "--json"))["plans"]
    settings = FederationSettings(rounds=3, privacy=PrivacySettings(mechanism="skellam", epsilon=4.0))
    spec = settings.session_spec(30, Layout((TensorSpec("update", (2000,)),)), "0" * 64, 1)
    assert found["noise_multiplier"] == spec.noise_multiplier()
    assert found["epsilon"] == spec.spent(spec.minimum_survivors).times(3).epsilon(1e-6) <= 4.0
    assert found["epsilon_all"] == spec.spent(30).times(3).epsilon(1e-6) < found["epsilon"]
    assert found["noise"] == pytest.approx(spec.vector.segments[0].noise * math.sqrt(2000 / 30) / spec.clip_norm)
    path = tmp_path / "federation.toml"
    path.write_text(settings.to_toml())
    assert json.loads(invoke("--settings", str(path), "--devices", "30", "--json"))["plans"] == [found]


def test_a_plan_states_the_price_of_groups() -> None:
    grouped = (*NOISY, "--devices", "40", "--set", "aggregation.groups=5")
    (found,) = json.loads(invoke(*grouped, "--json"))["plans"]
    (one,) = json.loads(invoke(*NOISY, "--devices", "40", "--json"))["plans"]
    assert (one["groups"], one["smallest_sum"], one["price"]) == (1, one["minimum_survivors"], 1.0)
    assert (found["groups"], found["smallest_sum"]) == (5, 8)
    assert found["honest"] == 4  # 4 of 40 devices may be corrupt, and all in one group
    assert found["price"] == pytest.approx(found["noise"] / one["noise"])
    assert found["price"] == pytest.approx(math.sqrt(one["honest"] / found["honest"]), rel=0.05)
    assert "in 5 sums: one hides in a sum of 8 or more" in invoke(*grouped).splitlines()[-1]


def test_a_plan_without_noise_is_refused() -> None:
    with refused(ConfigError, "privacy.mechanism"):
        invoke()


def test_a_cohort_that_needs_more_bits_is_refused() -> None:
    with refused(ConfigError, "vector.ring_bits"):
        invoke(*NOISY, "--devices", "10000", "--set", "privacy.epsilon=0.001")


def test_too_little_noise_for_a_finite_epsilon_is_stated_as_none() -> None:
    little = ("--set", "privacy.mechanism=skellam", "--set", "privacy.noise_multiplier=0.01", "--devices", "30")
    (found,) = json.loads(invoke(*little, "--json"))["plans"]
    assert (found["epsilon"], found["noise_multiplier"]) == (None, pytest.approx(0.01))
