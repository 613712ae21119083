"""Parts of an adapter that devices trained and kept to themselves, in the sums of later rounds.

After a round of FedPer the coordinator has devices train the head alone, and shares it. Were it trained from the head
that a device keeps to itself, a step of SGD over all examples would move it by -η (g + λ w), where g is the gradient at
that head w, η the learning rate and λ the weight decay. Two rounds give that of a single device: one with it, and one
without. Two more, without weight decay, give -η g, whatever the examples are, and so its whole head w. Each round
begins from another adapter, so that no rule for sums from one adapter stands in the way.

The coordinator runs its own ServerApp, without the check of an honest one; the devices run the real ClientApp, each
session from the files that the one before left.
"""

from collections.abc import Container
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message
from numpy.typing import NDArray

from aggregation import rotation
from aggregation.client import Masked
from aggregation.sealedstate import ClientState
from aggregation.steps import Step
from client.node import app as device_app
from client.node.policy import TrainingLimits
from client.node.privateparts import PrivateParts
from client.node.statedir import DeviceStateDir
from client.training.control import TrainingControl
from client.training.examples import parse_examples
from edgeadapt.formats import files
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.methods.parts import Part, only
from edgeadapt.rounds.task import Task, weighted_mean
from tests.attacks.test_14_answers_that_depend_on_data import Observer
from tests.support import FleetOf
from tests.support.hostile import plans_anything
from tests.support.subtracting import DEVICES, VICTIM, Subtracting, fleet_without_proofs

RATE, DECAY = 0.05, 1.0
SETTINGS = {
    "training__optimizer": "sgd",
    "training__learning_rate": RATE,
    "training__batch_size": 64,  # all examples of a device
    "aggregation__session_rounds": 2,
    "aggregation__clip_norm": 2.0,  # longer than any update
    "aggregation__ring_bits": 48,
}
SAVE = DeviceStateDir.save_state
WITHHELD = {"3", "5"}  # rounds without the victim


class Summing(Subtracting):
    """A coordinator that has of each sum the update and the weight."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, aborted: Container[int] = (), withheld: Container[str] = ()
    ) -> None:
        super().__init__(monkeypatch, aborted=aborted, withheld=withheld)
        self.updates: list[NDArray[np.float64]] = []
        self.weights: list[float] = []

        def seen(spec: Any, task: Any, layout: Any, sums: Any, survivors: int, adapter: bytes) -> Any:
            self.updates.append(rotation.rotate_back(sums["delta"], rotation.seed(adapter)))
            self.weights.append(float(sums["weight"][0]))
            return weighted_mean(spec, task, layout, sums, survivors, adapter)

        monkeypatch.setattr("edgeadapt.rounds.task.weighted_mean", seen)

    def head(self) -> NDArray[np.float64]:
        """The victim's head, from the last four sums."""
        both, others, undecayed, undecayed_others = self.updates[-4:]
        weight = self.weights[-4] - self.weights[-3]
        return ((undecayed - undecayed_others) - (both - others)) / (weight * RATE * DECAY)


def after_a_round(app_fleet_of: FleetOf, method: str = "fedper", **grid: Any) -> Any:
    """A fleet whose devices trained what the method keeps on them."""
    fleet = fleet_without_proofs(app_fleet_of, rounds=1, method=method, **SETTINGS)
    fleet.configure({"training.epochs": 10, "training.learning_rate": 0.1})
    fleet.federate(fleet.grid(**grid))
    return fleet


def head_of(tensors: Tensors) -> NDArray[np.float64]:
    layout = only(Layout.of(tensors), {Part.HEAD})
    return layout.flatten(layout.select(tensors)).astype(np.float64)


def error_of_the_head(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> float:
    """How far what the coordinator has of the victim's head is from it, in lengths of the way that training moved it.

    The head alone is trained and shared in two sessions.
    """
    plans_anything(monkeypatch)
    monkeypatch.setattr(
        "edgeadapt.rounds.tasklimits.TaskLimits._check_number", lambda *given: None
    )  # owners who permit any
    monkeypatch.setattr(TrainingLimits, "control", lambda limits, step: TrainingControl(unfailing=True))
    coordinator = Summing(monkeypatch, withheld=WITHHELD)
    for rounds, decay in ((3, DECAY), (5, 0.0)):
        training = {"epochs": 1, "learning_rate": RATE, "weight_decay": decay}
        fleet.configure({"method": "head", "rounds": rounds, **{f"training.{key}": training[key] for key in training}})
        records = fleet.federate(fleet.grid(app=coordinator))
    assert [VICTIM in record.survivors for record in records[1:]] == [True, False, True, False]
    parts = fleet.state_dir(VICTIM).load(PrivateParts)
    first, head = (head_of(files.decode(raw)) for raw in (parts.before, parts.after))
    return float(np.linalg.norm(coordinator.head() - head) / np.linalg.norm(head - first))


def with_all(adapter: Tensors, own: bytes | None, task: Task) -> Tensors:
    """As it was: whatever the device kept of the subject, shared or not."""
    return adapter if own is None else adapter | files.decode(own)


def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.node.training.check_unshared", lambda *given: None)


def test_without_the_checks_four_sums_give_the_whole_head_of_a_chosen_device(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgetful(monkeypatch)
    monkeypatch.setattr("client.node.training.with_private", with_all)
    assert error_of_the_head(after_a_round(app_fleet_of), monkeypatch) < 1e-3


def test_a_shared_part_is_trained_from_the_adapter_on_offer_alone(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgetful(monkeypatch)
    assert error_of_the_head(after_a_round(app_fleet_of), monkeypatch) > 1


def refusals(fleet: Any, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> set[str]:
    """Why each device refuses the plans of another session with these settings, before it reads an example."""
    read = list[Any]()

    def watched(*given: Any) -> Any:
        read.append(given)
        return parse_examples(*given)

    plans_anything(monkeypatch)
    monkeypatch.setattr("client.node.training.parse_examples", watched)
    observer, done = Observer(), len(fleet.registry().rounds())
    fleet.configure({"rounds": done + 1, **changes})
    record = fleet.federate(fleet.grid(app=observer))[-1]
    assert (record.version, len(record.dropped), len(observer.seen)) == (None, DEVICES, DEVICES)
    assert {answer for answer, *_ in observer.seen.values()} == {"refused"}
    assert not read
    return {reason for _, reason, _ in observer.seen.values()}


@pytest.mark.parametrize(("before", "method", "part"), [("fedper", "head", "head"), ("fedsa", "fedsb", "B")])
def test_a_part_that_was_private_is_shared_by_no_device_in_any_later_session(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, before: str, method: str, part: str
) -> None:
    """Fed-SB shares R, which is added to B."""
    (reason,) = refusals(after_a_round(app_fleet_of, before), monkeypatch, method=method)
    assert f"task.shared: this device keeps the part {part} to itself" in reason
    assert "edgeadapt device forget" in reason


def silent(message: Message, context: Context) -> Message:
    """No device answers after it sent its update."""
    if message.metadata.message_type == Step.SURVIVORS.message_type:
        return Message(Error(1, "withheld"), reply_to=message)
    return device_app.app(message, context)


def killed(state_dir: DeviceStateDir, state: ClientState) -> None:
    """The device stops after it kept its parts, and before its update leaves."""
    if isinstance(state, Masked):
        raise OSError(28, "No space left on device")
    SAVE(state_dir, state)


@pytest.mark.parametrize(("app", "save"), [(silent, SAVE), (device_app.app, killed)])
def test_a_round_without_a_sum_made_its_parts_private_too(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, app: Any, save: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(DeviceStateDir, "save_state", save)
        fleet = after_a_round(app_fleet_of, app=app)
    assert fleet.registry().rounds()[-1].version is None
    refusals(fleet, monkeypatch, method="fedit")


def test_parts_stay_private_while_others_are_trained(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = after_a_round(app_fleet_of, "fedsa")
    fleet.configure({"rounds": 2, "method": "head"})
    assert fleet.federate(fleet.grid())[-1].version == 2
    refusals(fleet, monkeypatch, method="rolora")


def test_an_owner_who_forgets_the_coordinator_deletes_them_and_shares_such_parts_from_then_on(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = after_a_round(app_fleet_of)
    plans_anything(monkeypatch)
    for name in (f"device-{number:02d}" for number in range(DEVICES)):
        fleet.state_dir(name).forget()
        assert fleet.state_dir(name).load(PrivateParts) is None
    fleet.configure({"rounds": 2, "method": "fedit"})
    assert fleet.federate(fleet.grid())[-1].version == 2
