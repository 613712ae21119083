"""Exchanges over the in-process grid: one reply for each node, with its answer or the reason for its absence."""

import json
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation.errors import EdgeAdaptError
from aggregation.steps import ADAPTER, BODY, RECORD, Step
from coordinator import launch
from coordinator.launch import GATEWAY, JSON, STATE, Connection, connected
from coordinator.transport import LAST_POLL, PayloadBytes, Reply, Transport
from simulations.engine.grid import FaultModel, InProcessGrid
from tests.support import refused

NODES = tuple(range(2, 10))
ADAPTER_FILE = b"a" * 1000
GARBAGE: tuple[Callable[[Message], Message], ...] = (
    lambda m: Message(RecordDict(), reply_to=m),
    lambda m: Message(RecordDict({"other": ConfigRecord({BODY: b"x"})}), reply_to=m),
    lambda m: Message(RecordDict({RECORD: ConfigRecord({})}), reply_to=m),
    lambda m: Message(RecordDict({RECORD: ConfigRecord({BODY: "text"})}), reply_to=m),
    lambda m: Message(RecordDict({RECORD: ConfigRecord({BODY: [b"x"]})}), reply_to=m),
    lambda m: Message(RecordDict({RECORD: MetricRecord({BODY: 1})}), reply_to=m),
)


def answer(message: Message, context: Context) -> Message:
    """The body that came, with the node's number behind it."""
    body = message.content.config_records[RECORD][BODY]
    assert isinstance(body, bytes)
    return Message(RecordDict({RECORD: ConfigRecord({BODY: body + bytes([context.node_id])})}), reply_to=message)


def transport_of(app: Any = answer, deadline: float = 60.0, **faults: Any) -> Transport:
    grid = InProcessGrid(
        app, dict.fromkeys(NODES, ""), FaultModel(**{"seed": 0, "message_loss": 0.0, "mean_delay": 1.0, **faults})
    )
    return Transport(grid, grid.clock, deadline)


def ask(
    transport: Transport, bodies: Mapping[int, bytes] | None = None, adapter: bytes | None = None
) -> dict[int, Reply]:
    """The replies by node; each of those asked is there once."""
    bodies = dict.fromkeys(NODES, b"hello") if bodies is None else bodies
    attachments = {} if adapter is None else {node: {ADAPTER: adapter} for node in bodies}
    replies = list(transport.ask(Step.PLAN, bodies, "1", attachments))
    assert sorted(reply.node for reply in replies) == sorted(bodies)
    return {reply.node: reply for reply in replies}


def test_after_a_lost_request_or_reply_the_node_did_not_answer_in_time() -> None:
    replies = ask(transport_of(message_loss=0.3, seed=4))
    outcomes = FaultModel(4, 0.3, 1.0).outcomes("1", Step.PLAN, NODES)
    lost = {node for node, outcome in outcomes.items() if outcome.request_lost or outcome.reply_lost}
    assert lost
    assert {node for node, reply in replies.items() if reply.body is None} == lost
    assert {replies[node].reason for node in lost} == {"did not answer in time"}


def test_a_late_reply_is_ignored_and_the_wait_ends_at_the_deadline() -> None:
    transport = transport_of(deadline=1.0, mean_delay=3.0)
    replies = ask(transport)
    outcomes = FaultModel(0, 0.0, 3.0).outcomes("1", Step.PLAN, NODES)
    late = {node for node, outcome in outcomes.items() if outcome.delay > 1.0 + LAST_POLL}
    assert late
    assert all(replies[node].body is None for node in late)
    assert 1.0 <= transport.clock.now() <= 1.0 + LAST_POLL
    assert all(reply.body for reply in ask(transport_of(deadline=1e6)).values())


def test_a_late_reply_is_not_taken_for_the_answer_to_the_next_message() -> None:
    transport = transport_of(deadline=1.0, mean_delay=3.0)
    assert not all(reply.body for reply in ask(transport).values())
    transport.deadline = 1e6
    assert ask(transport, dict.fromkeys(NODES, b"second")) == {
        node: Reply(node, b"second" + bytes([node])) for node in NODES
    }


def test_an_error_reply_carries_its_reason() -> None:
    def refuse(message: Message, context: Context) -> Message:
        return Message(Error(100, "no usable examples" if context.node_id % 2 else None), reply_to=message)

    replies = ask(transport_of(refuse))
    assert {replies[node].reason for node in NODES} == {"no usable examples", "failed"}
    assert not any(reply.body for reply in replies.values())


@pytest.mark.parametrize("number", range(len(GARBAGE)))
def test_an_ill_formed_answer_counts_as_none_and_affects_no_other_node(number: int) -> None:
    def app(message: Message, context: Context) -> Message:
        return GARBAGE[number](message) if context.node_id == 4 else answer(message, context)

    replies = ask(transport_of(app))
    assert replies.pop(4) == Reply(4, None, "answered without a protocol body")
    assert all(reply.body for reply in replies.values())


def test_bytes_count_bodies_and_adapters_down_and_answers_up() -> None:
    transport = transport_of()
    ask(transport, dict.fromkeys(NODES, b"12345"), ADAPTER_FILE)
    ask(transport, {2: b"123"})
    assert transport.take_carried() == PayloadBytes(up=8 * 6 + 4, down=8 * 1005 + 3)
    assert transport.take_carried() == PayloadBytes(0, 0)


def test_the_adapter_travels_in_the_same_message_as_the_body() -> None:
    seen: list[set[str]] = []

    def app(message: Message, context: Context) -> Message:
        seen.append(set(message.content.config_records[RECORD]))
        return answer(message, context)

    transport = transport_of(app)
    ask(transport, {2: b""}, ADAPTER_FILE)
    ask(transport, {2: b""})
    assert seen == [{BODY, ADAPTER}, {BODY}]


class Odd(InProcessGrid):
    """Flower's grids at their worst: a message that cannot be pushed, replies twice, replies to other questions."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = list(messages)
        ids = list(super().push_messages(batch[1:]))
        return [None, *ids]  # type: ignore[list-item]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        stranger = Message(RecordDict(), 1, "query.hello")
        return [stranger, *(copy for reply in replies for copy in (reply, reply))]


def test_what_could_not_be_pushed_or_comes_twice_or_unasked_is_sorted_out() -> None:
    grid = Odd(answer, dict.fromkeys(NODES, ""), FaultModel(0, 0.0, 1.0))
    replies = ask(Transport(grid, grid.clock, 60.0))
    assert replies.pop(2) == Reply(2, None, "could not be reached", silent=True)
    assert all(reply.body for reply in replies.values())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**20), st.floats(0, 0.9), st.floats(0.01, 10.0))
def test_each_node_comes_back_once_whatever_the_faults(seed: int, loss: float, deadline: float) -> None:
    transport = transport_of(deadline=deadline, seed=seed, message_loss=loss)
    for _ in range(3):
        ask(transport)


# A run on a SuperLink, with a stand-in for Flower's command line that records its calls and has an answer for each.
FAKE = """
import json, os, pathlib, shutil, sys
folder = pathlib.Path(sys.argv[1])
arguments = sys.argv[2:]
with (folder / "calls.jsonl").open("a") as file:
    file.write(json.dumps(arguments) + "\\n")
for name in ("config.toml",):
    if (path := pathlib.Path(os.environ["FLWR_HOME"]) / name).exists():
        shutil.copy(path, folder)
if "--run-config" in arguments:
    shutil.copy(arguments[arguments.index("--run-config") + 1], folder)
answers = json.loads((folder / "answers.json").read_text())
answer = answers[arguments[0]]
print(answer["out"])
print(answer.get("err", ""), file=sys.stderr)
sys.exit(answer.get("code", 0))
"""
STARTED = {"out": 'some words\n{"success": true, "run-id": "17"}'}


@pytest.fixture
def flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Install the stand-in, with an answer for each of Flower's commands; its folder has what it was called with."""

    def install(**answers: dict[str, Any]) -> Path:
        folder = tmp_path / "flower"
        folder.mkdir()
        (folder / "answers.json").write_text(json.dumps(answers))
        monkeypatch.setattr(launch, "FLWR", (sys.executable, "-c", FAKE, str(folder)))
        return folder

    return install


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


def listed(status: str, details: str = "") -> dict[str, Any]:
    return {"out": json.dumps({"success": True, "runs": [{"status": status, "status-details": details}]})}


@pytest.mark.parametrize("name", ["coordinator", "a folder with 'quotes' and \"more\""], ids=["plain", "quotes"])
def test_a_run_is_started_with_the_bundle_and_the_state_directory(
    flower: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder = flower(run=STARTED)
    with connected("127.0.0.1:8000", tmp_path / "ca.pem", insecure=False) as connection:
        assert connection.start(tmp_path / name) == "17"
    ((command, bundle, used, *_),) = calls(folder)
    assert (command, Path(bundle).name, (Path(bundle) / "pyproject.toml").is_file()) == ("run", "flower", True)
    assert tomllib.loads((folder / "run.toml").read_text()) == {STATE: str(tmp_path / name)}
    assert tomllib.loads((folder / "config.toml").read_text()) == {
        "superlink": {used: {"address": "127.0.0.1:8000", "root-certificates": str(tmp_path / "ca.pem")}}
    }


def test_a_run_that_also_serves_light_devices_is_started_with_the_gateways_address(
    flower: Callable[..., Path], tmp_path: Path
) -> None:
    folder = flower(run=STARTED)
    Connection("mine", {"FLWR_HOME": str(tmp_path)}).start(tmp_path, "0.0.0.0:9443", as_json=True)
    found = tomllib.loads((folder / "run.toml").read_text())
    assert found == {STATE: str(tmp_path), GATEWAY: "0.0.0.0:9443", JSON: True}
    bundle = tomllib.loads((launch.BUNDLE / "pyproject.toml").read_text())
    assert found.keys() == bundle["tool"]["flwr"]["app"]["config"].keys()  # Flower refuses other keys


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"out": '{"success": false, "error-message": "not\\nreachable"}'}, "not reachable"),
        ({"out": "", "err": "Traceback\nNo module named flwr"}, "No module named flwr"),
    ],
)
def test_a_superlink_that_refuses_or_a_command_that_breaks_is_reported_in_one_line(
    flower: Callable[..., Path], tmp_path: Path, said: dict[str, str], text: str
) -> None:
    flower(run={**said, "code": 1})
    with refused(EdgeAdaptError, "superlink") as caught:
        Connection("mine", {"FLWR_HOME": str(tmp_path)}).start(tmp_path)
    assert text in str(caught.value)


@pytest.mark.parametrize("status", ["finished:failed", "finished:stopped", "running"])
def test_a_run_that_did_not_complete_is_an_error_with_its_details(
    flower: Callable[..., Path], tmp_path: Path, status: str
) -> None:
    flower(list=listed(status, "no session after 3 attempts:\n2 devices answered"))
    with refused(EdgeAdaptError, "run", value=status) as caught:
        Connection("mine", {"FLWR_HOME": str(tmp_path)}).require_completed("17")
    assert "2 devices answered" in str(caught.value)
