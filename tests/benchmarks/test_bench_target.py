"""``benchmarks target``: both sides learn, until they answer well enough, and the table has what that took."""

import json

from click.testing import CliRunner

from benchmarks import target
from benchmarks.__main__ import bench


def test_both_sides_reach_the_target_and_fewer_layers_are_sent() -> None:
    done = CliRunner().invoke(bench, ["target", "--quick", "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    for side in target.SIDES:
        assert found[side]["accuracy"]["median"] >= target.QUICK.target
        assert found[side]["cpu"]["median"] > 0
    assert found["ours"]["bytes"]["median"] != found["peft"]["bytes"]["median"]
    assert "ours / peft" in target.table(found)
