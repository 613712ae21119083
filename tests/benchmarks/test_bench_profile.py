"""`python -m benchmarks profile` on a tiny language model: stages, operators, and what is subtracted."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import bench
from benchmarks.ondevice.profile import operators
from tests.support import models

globals().update(models.FIXTURES)


def event(name: str, kind: str, microseconds: int, size: int = 1) -> dict[str, Any]:
    arguments = {"op_name": kind, "output_size": str(size)}
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": arguments}


def test_the_profilers_own_time_is_subtracted_and_the_prompts_run_does_not_count() -> None:
    prompt = [event("q", "MatMul", 900), event("shape", "Reshape", 5)]
    token = [
        event("q", "MatMul", 24),
        event("q.lora_A", "MatMul", 9),
        event("head", "MatMul", 104, size=100),
        event("attention", "Attention", 34, size=1000),
        event("shape", "Reshape", 4),
    ]
    found = operators([{"cat": "Session", "name": "model_run", "dur": 7}, *prompt, *token, *token], 2)
    assert [(one.name, one.nodes, round(1e6 * one.seconds)) for one in found] == [
        ("MatMul, of the logits", 1, 100),
        ("Attention", 1, 30),
        ("MatMul", 1, 20),
        ("MatMul, of the adapter", 1, 5),
        ("Reshape", 1, 0),
    ]


@pytest.mark.slow
def test_the_stages_of_a_start_and_the_operators_of_a_token_are_shown(lm_bundle: Path) -> None:
    given = ["profile", "--bundle", str(lm_bundle), "--adapter", "anna", "--tokens", "5", "--threads", "1"]
    result = CliRunner().invoke(bench, [*given, "--json"])
    assert result.exception is None, result.output
    found = json.loads(result.stdout)
    stages = [stage["name"] for stage in found["stages"]]
    assert stages[1:5] == ["imports", "verification", "model and tokenizer", "adapter"]
    assert stages[-1] == "5 tokens"
    assert all(stage["seconds"] > 0 for stage in found["stages"])
    if sys.platform == "linux":
        assert all(stage["resident"] > 10**6 for stage in found["stages"])
    nodes = {one["name"]: one["nodes"] for one in found["operators"]}
    assert nodes["GroupQueryAttention"] == 2
    assert nodes["MatMul, of the adapter"] == 2 * nodes["Add, of the adapter"] > 0
    assert sum(name.endswith(", of the logits") for name in nodes) == 1
    assert found["token_s"] > 0 < found["profiled_s"]
    assert 0 < found["library"]["resident"] < found["stages"][-1]["resident"]
    shown = CliRunner().invoke(bench, given).stdout
    assert "GroupQueryAttention" in shown
    assert "not attributed" in shown
