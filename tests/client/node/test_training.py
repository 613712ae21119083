"""How a device answers a plan that it must not or cannot train: within limits, and without telling why of its data."""

import json
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aggregation.steps import ADAPTER, BODY, Step
from client.node.statedir import SETTINGS
from client.training.control import TrainingControl
from client.training.trainer import ClassifierTrainer
from edgeadapt.formats import files, jsontext
from edgeadapt.formats.peftconfig import PeftConfig
from tests.client.node.test_app import DEVICES, FIRST, PHRASE, Talk, talk

__all__ = ["talk"]
SPOILED = {
    "example": f'{{"text": "{PHRASE}"',
    "examples.split": "",
    "examples": None,  # no file
}


@pytest.mark.parametrize("about", SPOILED)
def test_examples_that_cannot_be_used_are_answered_with_weight_zero(talk: Talk, about: str) -> None:
    path, content = talk.fleet.state_dir(FIRST).examples, SPOILED[about]
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert weight(talk) == sum(trained(talk, number) for number in range(1, DEVICES))
    assert talk.refusals == ([about] if content is not None else [about, "examples.split"])


def test_an_example_with_a_label_that_the_task_lacks_is_left_out(talk: Talk, caplog: pytest.LogCaptureFixture) -> None:
    with talk.fleet.state_dir(FIRST).examples.open("a") as file:
        file.write(json.dumps({"text": PHRASE, "label": 3}) + "\n")
    with caplog.at_level(logging.WARNING, "edgeadapt.device"):
        assert weight(talk) == sum(trained(talk, number) for number in range(DEVICES))
    assert "1 examples have a label that the task lacks" in caplog.text


def trained(talk: Talk, number: int) -> int:
    return len(talk.fleet.population.clients[number].train)


def weight(talk: Talk) -> float:
    """The total weight of a round in which every device answers every step."""
    collecting, plans = talk.plan(talk.established())
    unmasking, requests = talk.confirm(*talk.collect(collecting, plans))
    for device, body in requests.items():
        unmasking = unmasking.on_unmask_response(device, talk.ask(device, Step.UNMASK, body))
    _, result = unmasking.close()
    return float(result.values["weight"][0])


class PanicException(BaseException):
    """What a panic in Rust becomes in Python, where it is no ``Exception``."""


@pytest.mark.parametrize("kind", [RuntimeError, OSError, ValueError, MemoryError, PanicException])
def test_an_exception_in_training_is_answered_and_its_text_is_not_logged(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    _, plans = talk.plan(talk.established())

    def fail(*_: object, **__: object) -> None:
        raise kind(PHRASE)

    with monkeypatch.context() as broken, caplog.at_level(logging.DEBUG, "edgeadapt.device"):
        broken.setattr(ClassifierTrainer, "train", fail)
        talk.ask(FIRST, Step.PLAN, plans[FIRST], adapter=talk.adapter)
    assert "4711" not in caplog.text
    assert f"contributed nothing: {kind.__name__} in fail" in caplog.text
    assert talk.refusals == [kind.__name__]


def test_a_round_is_trained_within_the_owners_limits(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    with (talk.fleet.state_dir(FIRST).folder / SETTINGS).open("a") as settings:  # its last table is the policy
        settings.write("maximum_seconds = 90\nduty_cycle = 0.5\nmaximum_tokens = 7\nmaximum_gradient_norm = 3\n")
    train, seen = ClassifierTrainer.train, list[TrainingControl]()

    def watched(self: ClassifierTrainer, *rest: Any, control: TrainingControl, **named: Any) -> Any:
        seen.append(control)
        return train(self, *rest, control=control, **named)

    monkeypatch.setattr(ClassifierTrainer, "train", watched)
    _, plans = talk.plan(talk.established())
    talk.ask(FIRST, Step.PLAN, plans[FIRST], adapter=talk.adapter)
    assert seen == [TrainingControl(90.0, 0.5, 3.0, True, 7, step=seen[0].step)]


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("task.learning_rate", {"learning_rate": 0.2}),
    ("task.epochs", {"epochs": 11}),
    ("task.batch_size", {"batch_size": 65}),
    ("task.batch_size", {"batch_size": 1}),
    ("task.weight_decay", {"weight_decay": 0.2}),
    ("task.momentum", {"momentum": 0.999}),
    ("task.proximal", {"proximal": 11.0}),
    ("task.proximal", {"proximal": 9.95, "weight_decay": 0.1, "learning_rate": 0.1}),
    ("task.labels", {"labels": tuple(map(str, range(1025)))}),
    ("task.scaling", {"peft_config": PeftConfig("LORA", 2, 130, ("query", "value"))}),
    ("task.scaling", {"peft_config": PeftConfig("LORA", 4, 130, ("query", "value"), use_rslora=True)}),
    ("task.virtual_tokens", {"peft_config": PeftConfig("PROMPT_TUNING", 0, 0, (), num_virtual_tokens=129)}),
    ("rank_pattern", {"peft_config": PeftConfig("LORA", 2, 4, ("query",), (("query", 1),))}),
    ("feedforward_modules", {"peft_config": PeftConfig("IA3", 0, 0, ("key",), feedforward_modules=("query",))}),
    ("target_modules", {"peft_config": PeftConfig("IA3", 0, 0, ("nothing",))}),
    ("target_modules", {"peft_config": PeftConfig("LN_TUNING", 0, 0, ("encoder",))}),
    ("target_modules", {"peft_config": PeftConfig("LN_TUNING", 0, 0, ("word_embeddings",))}),
    ("target_modules", {"peft_config": PeftConfig("BEFT", 0, 0, ("LayerNorm",))}),
    ("num_virtual_tokens", {"peft_config": PeftConfig("PREFIX_TUNING", 0, 0, (), num_virtual_tokens=3)}),
    ("plan.layout", {"peft_config": PeftConfig("IA3", 0, 0, ("key",))}),
]
EXTRA: list[dict[str, Any]] = [  # a configuration that says more than can be trained
    {"peft_type": "ADAPTION_PROMPT"},
    {"modules_to_save": ["encoder"]},
    {"inference_mode": True},
    {"init_lora_weights": "pissa"},
    {"megatron_core": "os"},
    {"target_modules": "all-linear"},
]


def test_training_beyond_the_owners_limits_is_refused_before_an_example_is_read(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.node.training.parse_examples", lambda *_: pytest.fail("an example was read"))
    task, session = talk.coordinator.settings.task(talk.version().manifest), talk.established()
    tasks = [(about, replace(task, **changes).encode()) for about, changes in REFUSED]
    for changes in EXTRA:
        wrong = json.loads(task.encode())
        wrong["peft_config"] |= changes
        tasks.append((f"task.peft_config.{next(iter(changes))}", jsontext.encode(wrong)))
    for about, training in tasks:
        _, plans = talk.plan(session, training=training)
        talk.refused(FIRST, Step.PLAN, {BODY: plans[FIRST], ADAPTER: talk.adapter}, about)


def test_an_adapter_of_numbers_that_are_too_large_or_too_many_is_refused_before_an_example_is_read(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.node.training.parse_examples", lambda *_: pytest.fail("an example was read"))
    tensors, session = talk.coordinator.registry.tensors(0), talk.established()
    name = max(tensors)
    blob = files.encode({**tensors, name: np.full_like(tensors[name], -1000.5)})
    _, plans = talk.plan(session, adapter_digest=files.sha256(blob))
    talk.refused(FIRST, Step.PLAN, {BODY: plans[FIRST], ADAPTER: blob}, "adapter.magnitude")
    with (talk.fleet.state_dir(FIRST).folder / SETTINGS).open("a") as settings:
        settings.write(f"maximum_parameters = {sum(tensor.size for tensor in tensors.values()) - 1}\n")
    _, plans = talk.plan(session)
    talk.refused(FIRST, Step.PLAN, {BODY: plans[FIRST], ADAPTER: talk.adapter}, "adapter.parameters")
