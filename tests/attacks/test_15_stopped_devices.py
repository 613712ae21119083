"""Two sums from one adapter, from devices that are stopped between the two saves of a plan from the next adapter.

Such a device has saved that it trained from the next adapter, and is still in the round before, which is from the
adapter of the first sum. It no longer knows which sums from that one it helped to. The coordinator of this test sends
the plan between two steps of that round, and each device is stopped once. The devices run the real ClientApp.
"""

from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

import pytest
from flwr.app import Context, Message

from aggregation import envelope
from aggregation.messages import Assignment, Plan
from aggregation.spec import SessionSpec
from aggregation.steps import ADAPTER, BODY, RECORD, Step
from client.node import adapterstate, sumhistory
from client.node import app as device_app
from client.node.adapterstate import AdapterState
from client.node.statedir import DeviceStateDir
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.formats import files
from tests.client.node.conftest import refusals
from tests.support import FleetOf
from tests.support.subtracting import Subtracting, fleet_without_proofs

__all__ = ["refusals"]
pytestmark = pytest.mark.usefixtures("by_bytes_only")
on_survivors = adapterstate.on_survivors


def forgetting(
    known: AdapterState | None, plan: Plan, spec: SessionSpec, survivors: Mapping[str, int], revoked: Container[int]
) -> AdapterState:
    """``on_survivors`` of a device that takes an adapter that it does not remember for one without sums."""
    if known is None or known.digest != plan.adapter_digest:
        known = AdapterState(plan.adapter_version, plan.adapter_digest, bytes(32))
    return on_survivors(known, plan, spec, survivors, revoked)


class Stopping(Subtracting):
    """A coordinator that has the first sum, and repeats its round without the victim."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fleet: Any) -> None:
        super().__init__(monkeypatch, aborted=range(9), withheld={"2"})
        self.key = CoordinatorStateDir.open(fleet.out / "coordinator").key
        tensors = fleet.registry().newest_adapter().tensors
        self.next = files.encode({name: tensor / 2 + 0.01 for name, tensor in tensors.items()})
        self.plans: dict[str, Message] = {}
        self.stopping = False
        save = DeviceStateDir.save_state

        def save_state(state_dir: DeviceStateDir, state: Any) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            save(state_dir, state)

        monkeypatch.setattr(DeviceStateDir, "save_state", save_state)

    def __call__(self, message: Message, context: Context) -> Message:
        step, group = Step(message.metadata.message_type.partition(".")[2]), message.metadata.group_id
        node = message.metadata.dst_node_id
        if (step, group) == (Step.SURVIVORS, "2"):
            self.stop(self.plans[str(node)], context)
        if step is Step.PLAN:
            self.plans[str(node)] = message
        return super().__call__(message, context)

    def stop(self, plan: Message, context: Context) -> None:
        """Send a device the plan of the next round, from the next adapter; it stops when it saves its state."""
        fields = plan.content.config_records[RECORD]
        sent = Assignment.decode(envelope.unverified_body(fields[BODY]))  # type: ignore[arg-type]
        later = replace(sent.plan, round=3, adapter_version=1, adapter_digest=files.sha256(self.next))
        fields[BODY], fields[ADAPTER] = envelope.sign(self.key, replace(sent, plan=later)), self.next
        self.stopping = True
        with pytest.raises(KeyboardInterrupt):
            device_app.app(plan, context)
        self.stopping = False


def attacked(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> Stopping:
    settings = {"aggregation__session_rounds": 3, "training__batch_size": 64, "aggregation__ring_bits": 40}
    fleet = fleet_without_proofs(app_fleet_of, rounds=3, **settings)
    attack = Stopping(monkeypatch, fleet)
    fleet.configure({"rounds": 3})
    fleet.federate(fleet.grid(app=attack))
    return attack


def test_a_device_that_was_stopped_helps_to_no_sum_from_an_adapter_that_it_does_not_remember(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, refusals: list[str]
) -> None:
    assert len(attacked(app_fleet_of, monkeypatch).sums) == 1
    assert "survivors.adapter" in refusals


def test_otherwise_the_difference_is_the_update_of_the_victim(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapterstate, "on_survivors", forgetting)
    monkeypatch.setattr(sumhistory, "on_survivors", lambda known, *_: known)
    attack = attacked(app_fleet_of, monkeypatch)
    assert len(attack.sums) == 2
    assert attack.relative_error() < 1e-4
