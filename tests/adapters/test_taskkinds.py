"""A plan's task is read as the kind that it is, and the sums of a round are those of its kind."""

import numpy as np
import pytest

from adapters import taskkinds
from adapters.analytic import AnalyticTask, ClassifierHead, moment_spec
from adapters.evaluation import EvaluationTask
from adapters.layout import Layout, TensorSpec
from adapters.parts import PARTS
from adapters.peftconfig import PeftConfig
from adapters.task import Task, contribution_spec
from aggregation.errors import DataError, ProtocolError
from tests.support import refused
from tests.support.fleet import session_spec

CONFIG, LABELS = PeftConfig("LORA", 2, 4, ("query",)), ("off", '{"ridge":1}')
TRAINING = Task(CONFIG, LABELS, 1, 4, 0.01, 0.0, 0.0, PARTS, PARTS)
ANALYTIC = AnalyticTask(CONFIG, LABELS, 1e-3, 16.0)
NOISY = AnalyticTask(CONFIG, LABELS, 1e-3, 16.0, dimensions=4)
EVALUATION = EvaluationTask(CONFIG, LABELS, "a" * 64, "b" * 64, 32)
LAYOUT = Layout((TensorSpec("m.classifier.bias", (2,)), TensorSpec("m.classifier.weight", (2, 5))))
BOUNDS = {"weight_cap": 100, "ring_bits": 32, "max_clients": 3}


@pytest.mark.parametrize("task", [TRAINING, ANALYTIC, NOISY, EVALUATION])
def test_a_task_is_read_as_it_was_written(task: taskkinds.AnyTask) -> None:
    assert taskkinds.decode(task.encode()) == task
    assert type(taskkinds.decode(task.encode())) is type(task)


@pytest.mark.parametrize("raw", [b"", b"[]", b'"ridge"', b"{}", b'{"ridge":1}', b"\xff", b"[" * 10**5])
def test_other_bytes_are_of_no_kind(raw: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        taskkinds.decode(raw)
    assert "\n" not in str(caught.value)


def test_a_mixture_of_two_kinds_is_refused() -> None:
    both = TRAINING.encode()[:-1] + b',"ridge":0.001}'
    with refused(ProtocolError, "task.scale"):
        taskkinds.decode(both)


def test_the_sums_are_those_of_the_kind() -> None:
    training = taskkinds.vector_spec(TRAINING, LAYOUT, clip_norm=2.0, **BOUNDS)
    moments = taskkinds.vector_spec(ANALYTIC, LAYOUT, clip_norm=2.0, **BOUNDS)
    assert training == contribution_spec(LAYOUT, clip_norm=2.0, **BOUNDS)
    assert moments == moment_spec(ClassifierHead.of(LAYOUT), **BOUNDS)
    noisy = taskkinds.vector_spec(NOISY, LAYOUT, clip_norm=2.0, noise=0.1, **BOUNDS)
    assert [segment.size for segment in noisy.segments] == [4 * 5 // 2 + 4 * 2]
    assert [taskkinds.kind_of(vector) for vector in (training, moments, noisy)] == [Task, AnalyticTask, AnalyticTask]
    counts = taskkinds.vector_spec(EVALUATION, LAYOUT, clip_norm=2.0, noise=0.1, **BOUNDS)
    assert [(segment.size, segment.noise) for segment in counts.segments] == [(4, 0.1)]
    assert taskkinds.kind_of(counts) is EvaluationTask


def test_an_adapter_without_a_head_has_no_moments() -> None:
    factors = Layout((TensorSpec("query.lora_A.weight", (2, 5)),))
    with refused(DataError, "task.head"):
        taskkinds.vector_spec(ANALYTIC, factors, clip_norm=2.0, **BOUNDS)


@pytest.mark.parametrize(("task", "about"), [(TRAINING, "vector.delta"), (ANALYTIC, "vector.xx")])
def test_a_sum_is_held_to_the_bounds_of_its_kind(task: taskkinds.AnyTask, about: str) -> None:
    vector = taskkinds.vector_spec(task, LAYOUT, clip_norm=2.0, **BOUNDS)
    spec = session_spec(3, vector=vector, clip_norm=2.0, weight_cap=100)
    taskkinds.require_reach(spec, vector.zeros(), 3)
    first = vector.segments[0]
    with refused(DataError, about):
        taskkinds.require_reach(spec, vector.zeros() | {first.name: np.full(first.size, 1.5)}, 3)
