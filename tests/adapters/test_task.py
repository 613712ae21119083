"""The task that a plan carries, and the sums that a round makes: both sides read the same words or refuse."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.layout import Layout, TensorSpec
from adapters.manifest import PeftConfig
from adapters.task import MAX_LOSS, Task, contribution_spec
from aggregation.errors import ConfigError, ProtocolError
from tests.support import refused

TASK = Task(PeftConfig("LORA", 8, 16, ("query", "value")), ("off", "on"), 2, 16, 2e-3, 0.01, 0)
LAYOUT = Layout((TensorSpec("a", (2, 3)),))


@given(
    st.builds(
        Task,
        st.builds(
            PeftConfig,
            st.just("LORA"),
            st.integers(0, 99),
            st.integers(0, 99),
            st.lists(st.text(), max_size=3).map(tuple),
        ),
        st.lists(st.text(), max_size=4).map(tuple),
        st.integers(1, 100),
        st.integers(1, 1024),
        st.floats(0, 1, exclude_min=True),
        st.floats(0, 1),
        st.integers(0, 2**64),
    )
)
def test_a_task_is_read_as_it_was_written_and_has_one_form(task: Task) -> None:
    raw = task.encode()
    assert Task.decode(raw) == task
    assert Task.decode(raw).encode() == raw


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"epochs": 0}, "epochs"),
        ({"epochs": 101}, "epochs"),
        ({"epochs": "1"}, "epochs"),
        ({"epochs": True}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": 1.1}, "learning_rate"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"seed": -1}, "seed"),
        ({"labels": "on"}, "labels"),
        ({"peft_config": None}, "peft_config"),
        ({"peft_config": {**asdict(TASK.peft_config), "peft_type": "IA3"}}, "peft_config.peft_type"),
        ({"peft_config": {**asdict(TASK.peft_config), "r": -1}}, "peft_config.r"),
        ({"peft_config": {**asdict(TASK.peft_config), "code": "x"}}, "peft_config.code"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_field_that_is_unknown_or_out_of_range_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with refused(ProtocolError, f"task.{field}"):
        Task.decode(json.dumps({**asdict(TASK), **changes}).encode())


@pytest.mark.parametrize("name", list(asdict(TASK)))
def test_a_missing_field_is_refused_by_name(name: str) -> None:
    fields = {key: value for key, value in asdict(TASK).items() if key != name}
    with refused(ProtocolError, f"task.{name}"):
        Task.decode(json.dumps(fields).encode())


@given(st.binary(max_size=64) | st.integers(0, len(TASK.encode()) - 1).map(lambda n: TASK.encode()[:n]))
def test_any_other_bytes_are_refused_in_one_line(raw: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        Task.decode(raw)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rate", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_a_rate_that_is_no_number_is_refused(rate: bytes) -> None:
    raw = TASK.encode().replace(b'"learning_rate":0.002', b'"learning_rate":' + rate)
    assert rate in raw
    with refused(ProtocolError, "task.learning_rate"):
        Task.decode(raw)


def test_every_sum_has_its_bound_and_the_adapter_comes_first() -> None:
    spec = contribution_spec(LAYOUT, clip_norm=12.0, weight_cap=128, ring_bits=22, max_clients=15)
    assert [(s.name, s.size, s.bound) for s in spec.segments] == [
        ("delta", 6, 12.0 * 128),
        ("weight", 1, 128.0),
        ("correct", 1, 128.0),
        ("loss", 1, MAX_LOSS * 128),
        ("held_out", 1, 128.0),
    ]
    assert (spec.ring_bits, spec.max_clients, spec.size) == (22, 15, LAYOUT.size + 4)


@given(st.integers(16, 40), st.integers(1, 65_536), st.integers(3, 5_000))
def test_examples_are_counted_exactly_or_the_ring_is_refused(bits: int, cap: int, clients: int) -> None:
    try:
        spec = contribution_spec(LAYOUT, clip_norm=1.0, weight_cap=cap, ring_bits=bits, max_clients=clients)
    except ConfigError as error:
        assert str(bits) in str(error)  # noqa: PT017
        assert cap * clients >= 2 ** (bits - 1) - clients
        return
    for segment in spec.segments[1:]:
        if segment.name in ("weight", "correct", "held_out"):
            assert spec.step(segment) <= 1


def test_a_task_is_a_value() -> None:
    assert replace(TASK, seed=1) != TASK
    assert hash(replace(TASK)) == hash(TASK)
