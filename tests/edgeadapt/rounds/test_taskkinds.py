"""A plan's task is read as the kind that it is, and the sums of a round are those of its kind."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import DataError, ProtocolError
from edgeadapt.formats.layout import Layout, TensorSpec
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.parts import PARTS
from edgeadapt.rounds import taskkinds
from edgeadapt.rounds.analytic import AnalyticTask, ClassifierHead, moment_spec
from edgeadapt.rounds.evaluation import EvaluationTask
from edgeadapt.rounds.roundtask import RoundTask
from edgeadapt.rounds.sums import Bounds
from edgeadapt.rounds.task import Task, contribution_spec
from tests.support import refused
from tests.support.fleet import session_spec

CONFIG, LABELS = PeftConfig("LORA", 2, 4, ("query",)), ("off", '{"ridge":1}')
TRAINING = Task(CONFIG, LABELS, 1, 4, 0.01, 0.0, 0.0, PARTS, PARTS)
ANALYTIC = AnalyticTask(CONFIG, LABELS, 1e-3, 16.0)
NOISY = AnalyticTask(CONFIG, LABELS, "gcv", 16.0, dimensions=4)
EVALUATION = EvaluationTask(CONFIG, LABELS, "a" * 64, "b" * 64, 32)
LAYOUT = Layout((TensorSpec("m.classifier.bias", (2,)), TensorSpec("m.classifier.weight", (2, 5))))
BOUNDS = {"weight_cap": 100, "ring_bits": 32, "max_clients": 3}


TASKS = (TRAINING, ANALYTIC, NOISY, EVALUATION)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_read_as_it_was_written_and_with_exactly_its_fields(task: RoundTask) -> None:
    raw = task.encode()
    assert taskkinds.decode(raw) == task
    assert type(taskkinds.decode(raw)) is type(task)
    assert taskkinds.decode(raw).encode() == raw
    fields = json.loads(raw)
    for name in fields:
        with refused(ProtocolError, f"task.{name}"):
            taskkinds.decode(json.dumps({key: fields[key] for key in fields if key != name}).encode())
    for name in {"unknown"} | {name for kind in taskkinds.KINDS for name in kind.names()} - set(fields):
        with refused(ProtocolError, f"task.{name}"):
            taskkinds.decode(json.dumps(fields | {name: fields["labels"]}).encode())


@pytest.mark.parametrize(
    ("task", "changes", "field"),
    [
        (ANALYTIC, {"ridge": 0.0}, "ridge"),
        (ANALYTIC, {"ridge": "most"}, "ridge"),
        (ANALYTIC, {"scale": "16"}, "scale"),
        (ANALYTIC, {"labels": []}, "labels"),
        (EVALUATION, {"newest": "a" * 63}, "newest"),
        (EVALUATION, {"newest": "b" * 64}, "newest"),
        (EVALUATION, {"most": 2**17}, "most"),
        *((TRAINING, {"learning_rate": rate}, "learning_rate") for rate in (0.0, math.nan, math.inf, True)),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(task: RoundTask, changes: dict[str, Any], field: str) -> None:
    with refused(ProtocolError, f"task.{field}"):
        taskkinds.decode(json.dumps(json.loads(task.encode()) | changes).encode())


@given(
    st.binary(max_size=64)
    | st.sampled_from([b"[]", b'"ridge"', b"{}", b'{"ridge":1}', b"\xff", b"[" * 10**5])
    | st.sampled_from(TASKS).flatmap(
        lambda task: st.integers(0, len(task.encode()) - 1).map(lambda n: task.encode()[:n])
    )
)
def test_any_other_bytes_are_refused_in_one_line(raw: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        taskkinds.decode(raw)
    assert "\n" not in str(caught.value)


def test_the_sums_are_those_of_the_kind() -> None:
    training = TRAINING.vector(LAYOUT, Bounds(2.0, **BOUNDS))
    moments = ANALYTIC.vector(LAYOUT, Bounds(2.0, **BOUNDS))
    assert training == contribution_spec(LAYOUT, Bounds(2.0, **BOUNDS))
    assert moments == moment_spec(ClassifierHead.of(LAYOUT), Bounds(1.0, **BOUNDS))
    noisy = NOISY.vector(LAYOUT, Bounds(2.0, noise=0.1, **BOUNDS))
    assert [segment.size for segment in noisy.segments] == [4 * 5 // 2 + 4 * 2]
    assert [taskkinds.kind_of(vector) for vector in (training, moments, noisy)] == [Task, AnalyticTask, AnalyticTask]
    counts = EVALUATION.vector(LAYOUT, Bounds(2.0, noise=0.1, **BOUNDS))
    assert [(segment.size, segment.noise) for segment in counts.segments] == [(4, 0.1)]
    assert taskkinds.kind_of(counts) is EvaluationTask


def test_an_adapter_without_a_head_has_no_moments() -> None:
    factors = Layout((TensorSpec("query.lora_A.weight", (2, 5)),))
    with refused(DataError, "task.head"):
        ANALYTIC.vector(factors, Bounds(2.0, **BOUNDS))


@pytest.mark.parametrize(("task", "about"), [(TRAINING, "vector.delta"), (ANALYTIC, "vector.xx")])
def test_a_sum_is_held_to_the_bounds_of_its_kind(task: RoundTask, about: str) -> None:
    vector = task.vector(LAYOUT, Bounds(2.0, **BOUNDS))
    spec = session_spec(3, vector=vector, clip_norm=2.0, weight_cap=100)
    taskkinds.kind_of(vector).check_sum(spec, vector.zeros(), 3)
    first = vector.segments[0]
    with refused(DataError, about):
        taskkinds.kind_of(vector).check_sum(spec, vector.zeros() | {first.name: np.full(first.size, 1.5)}, 3)
