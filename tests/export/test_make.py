import json
from pathlib import Path
from typing import Any

import pytest

from adapters.base import Base
from aggregation.errors import DataError
from export.make import usual_task


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "text-generation"),
        ({"architectures": ["GPT2LMHeadModel"]}, "text-generation"),
        ({"architectures": ["BertModel"]}, "text-classification"),
        ({"architectures": None}, "text-classification"),
        ({}, "text-classification"),
    ],
)
def test_a_base_says_what_it_was_made_for(tmp_path: Path, config: Any, task: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert usual_task(Base(tmp_path, "0" * 64)) == task


@pytest.mark.parametrize("config", ["", "[]", "{", '{"architectures": {"a": 1}}'])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(DataError, match="no configuration of a model"):
        usual_task(Base(tmp_path, "0" * 64))
