"""``python -m benchmarks privacy``: its rows come from real contributions, and canaries stay below the account."""

import json
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import bench


def run(tiny_base: Any, *options: str) -> Any:
    small = {
        "population.households": 30,
        "population.utterances_min": 8,
        "population.utterances_max": 12,
        "federation.analytic.dimensions": 8,
        "base.model": json.dumps(str(tiny_base.folder)),
    }
    settings = [text for key, value in small.items() for text in ("--set", f"{key}={value}")]
    return CliRunner().invoke(bench, ["privacy", *settings, "--canaries", "60", *options])


def test_each_row_states_its_noise_its_accuracy_and_what_canaries_find(tiny_base: Any) -> None:
    found = json.loads(run(tiny_base, "--epsilon", "0", "--epsilon", "8", "--epsilon", "1", "--json").stdout)
    bare, weak, strong = found["rows"]
    assert found["devices"] == 24
    assert (bare["epsilon"], bare["account"], bare["multiplier"]) == (None, None, 0)
    assert bare["bytes_up"] > 4 * weak["bytes_up"]
    assert (weak["ring_bits"], strong["ring_bits"]) == (16, 16)
    assert strong["multiplier"] > 4 * weak["multiplier"] > 0
    assert 0 < strong["account"] < 1 < weak["account"] < 8  # more devices survive than must
    for row in (weak, strong):
        assert 0 <= row["one_run"] <= row["account"]
        assert 0 <= row["gaussian"] <= row["account"]
        assert 0 <= row["p10"] <= row["mean"] <= 1


def test_the_table_has_a_line_for_each_row(tiny_base: Any) -> None:
    lines = run(tiny_base, "--epsilon", "0", "--epsilon", "4").output.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["epsilon", "vendor", "none", "4"]


@pytest.mark.parametrize("options", [("--epsilon", "-1"), ("--canaries", "0"), ("missing.toml",)])
def test_what_makes_no_row_is_refused_in_one_line(tiny_base: Any, options: tuple[str, ...]) -> None:
    outcome = run(tiny_base, *options)
    assert outcome.exit_code != 0
    assert "Traceback" not in outcome.output
