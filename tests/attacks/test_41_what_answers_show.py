"""A coordinator measures the answers of devices: how long they are, and how much work each took, in calls of functions.

Half of the devices have many examples, or none that can be used; others have private parts besides. An answer of which
the work depends on examples is one for which a device reads a file that depends on them. These are the offer and the
plan, whose answers leave at a multiple of a fixed time (``test_14_answers_that_depend_on_data``).
"""

import gc
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from aggregation.steps import BODY, RECORD, Step
from client.node import step as node_step
from client.node.app import app
from client.node.statedir import EXAMPLES, PRIVATE, SNAPSHOT
from client.node.step import READS_EXAMPLES
from client.training.examples import Example, Split, read_examples, write_examples
from tests.support import FleetOf

DEVICES = tuple(f"device-{number:02d}" for number in range(8))
OTHERS = frozenset(DEVICES[::2])
FEW = (Example("turn on the light", 0), Example("kitchen light off", 0, Split.VALIDATION))
MANY = tuple(Example("turn off the lamp " * (number % 5 + 1), number % 3) for number in range(100))
ROUNDS = 3
AN_EXAMPLE = 100  # calls; it takes about 165 to read one
OF_EXAMPLES = frozenset({EXAMPLES, SNAPSHOT, PRIVATE})
_opened: list[set[str]] = []  # by whom the hook is asked, the innermost last


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened and event == "open" and isinstance(arguments[0], str | Path):
        _opened[-1].add(Path(arguments[0]).name)


@pytest.fixture(scope="module", autouse=True)
def hooked() -> Iterator[None]:
    """Python cannot take away a hook; it does nothing once nobody asks."""
    sys.addaudithook(_hook)
    yield
    _opened.clear()


@dataclass
class Observer:
    """The real app, and by step: each device's lengths of answers and calls for them, and the files it opened."""

    sizes: dict[Step, dict[str, list[int]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    calls: dict[Step, dict[str, list[int]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    files: dict[Step, set[str]] = field(default_factory=lambda: defaultdict(set))

    def __call__(self, message: Message, context: Context) -> Message:
        step, name = Step(message.metadata.message_type.partition(".")[2]), Path(str(context.node_config["state"])).name
        _opened.append(self.files[step])
        count = 0

        def called(*_event: Any) -> None:
            nonlocal count
            count += 1

        gc.disable()  # it would call what ends an object, whenever it likes
        sys.setprofile(called)
        reply = app(message, context)
        sys.setprofile(None)
        gc.enable()
        _opened.pop()
        self.calls[step][name].append(count)
        content: Any = reply.content.config_records[RECORD][BODY]
        self.sizes[step][name].append(len(content))
        return reply


KINDS: dict[str, tuple[Example, ...] | None] = {
    "many": MANY,
    "of labels that nobody knows": (Example("turn on the light", 7),),
    "no file": None,
}


def observed(fleet_of: FleetOf, kind: str, method: str = "fedit") -> Observer:
    fleet, observer = fleet_of(len(DEVICES), rounds=ROUNDS, method=method), Observer()
    for name in DEVICES:
        path, examples = fleet.state_dir(name).examples, KINDS[kind] if name in OTHERS else FEW
        if examples is None:
            path.unlink()
        else:
            write_examples(path, examples)
    records = fleet.federate(fleet.grid(app=observer))
    assert [record.survivors for record in records] == [DEVICES] * ROUNDS
    return observer


def spreads(observer: Observer, step: Step) -> list[int]:
    """How many calls the devices differ by, in each round; the one asked first fills caches of the process."""
    rounds = zip(*observer.calls[step].values(), strict=True)
    return [sorted(counts)[-2] - min(counts) for counts in rounds]


def reading(observer: Observer) -> set[Step]:
    """The steps for which devices open what depends on their examples."""
    return {step for step, names in observer.files.items() if names & OF_EXAMPLES}


@pytest.mark.parametrize(("kind", "method"), [("many", "fedit"), ("no file", "fedit"), ("many", "fedper")])
def test_no_answer_shows_in_its_length_or_its_work_what_examples_a_device_has(
    app_fleet_of: FleetOf, kind: str, method: str
) -> None:
    observer = observed(app_fleet_of, kind, method)
    assert set(observer.sizes) == set(Step)
    for step, by_device in observer.sizes.items():
        assert len({tuple(sizes) for sizes in by_device.values()}) == 1, step
    assert reading(observer) == set(READS_EXAMPLES)
    for step in set(Step) - set(READS_EXAMPLES):
        assert max(spreads(observer, step)) < AN_EXAMPLE, step


def test_a_step_that_counted_the_examples_would_be_seen(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    load = node_step._after_sum

    def counting(state_dir: Any, *given: Any) -> Any:
        read_examples(state_dir.examples, 3)
        return load(state_dir, *given)

    monkeypatch.setattr(node_step, "_after_sum", counting)
    observer = observed(app_fleet_of, "many")
    assert reading(observer) == {*READS_EXAMPLES, Step.SURVIVORS, Step.UNMASK}
    assert min(spreads(observer, Step.SURVIVORS)) > len(MANY) / 2 * AN_EXAMPLE
