"""A coordinator that keeps the sums of its rounds: what it can subtract from each other is the attack."""

from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message
from numpy.typing import NDArray

from aggregation.messages import Plan
from aggregation.ring import Ring
from aggregation.server import AbortReason, RoundAborted, Unmasking
from aggregation.spec import SessionSpec
from aggregation.steps import Step
from client.node import app as device_app
from client.node import step as device_step
from client.node.adapterstate import AdapterState
from tests.support import FleetOf

VICTIM, DEVICES = "device-00", 6


class Subtracting:
    """A coordinator that keeps every sum.

    Args:
        aborted: The sums, counted from 1, after which it logs the round as aborted.
        withheld: Flower's groups, which are numbers of rounds, whose plan the victim does not get.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, aborted: Container[int], withheld: Container[str] = ()
    ) -> None:
        self.withheld = withheld
        self.sums: list[Ring] = []
        self.deltas: list[NDArray[np.float64]] = []  # of the sums: their first segments, in weight units
        self.vectors: dict[tuple[str, int], Ring] = {}  # device and round → what it sent under the mask, for comparison
        self.steps: dict[int, float] = {}  # round → step of its updates, in weight units
        self.device, self.bits, self.delta = "", 0, slice(0)
        contribute, close = device_step.contribute, Unmasking.close

        def contributed(device: Any, planned: Any, *given: Any) -> Any:
            spec = planned.spec.vector
            self.bits, self.delta = spec.ring_bits, slice(0, spec.segments[0].size)
            self.steps[len(self.sums)] = spec.step(spec.segments[0])
            vector, parts = contribute(device, planned, *given)
            self.vectors[self.device, len(self.sums)] = vector.copy()
            return vector, parts

        def kept(state: Unmasking, *given: Any) -> Any:
            closed = close(state, *given)
            if isinstance(closed, RoundAborted):
                return closed
            self.sums.append(state.survivor_set.totals[0].copy())
            self.deltas.append(closed[1].values[state.survivor_set.session.spec.vector.segments[0].name])
            if len(self.sums) in aborted:
                return RoundAborted(AbortReason.TOO_FEW, "as the coordinator says", closed[0])
            return closed

        monkeypatch.setattr(device_step, "contribute", contributed)
        monkeypatch.setattr(Unmasking, "close", kept)

    def __call__(self, message: Message, context: Context) -> Message:
        """A device. The victim does not get every plan."""
        self.device = Path(str(context.node_config[device_app.STATE])).name
        plan = message.metadata.message_type == Step.PLAN.message_type
        if self.device == VICTIM and plan and message.metadata.group_id in self.withheld:
            return Message(Error(1, "withheld"), reply_to=message)
        return device_app.app(message, context)

    def signed(self, vector: Ring) -> NDArray[np.float64]:
        """Elements of the ring as steps, from -2^(b-1) on."""
        half = 2 ** (self.bits - 1)
        return (((vector.astype(np.int64) + half) % (2 * half)) - half).astype(float)

    def found(self) -> NDArray[np.float64]:
        """The first sum minus the last one, in steps."""
        return self.signed(self.sums[0] - self.sums[-1])

    def sent(self) -> NDArray[np.float64]:
        """What the victim sent in the first round, in steps."""
        return self.signed(self.vectors[VICTIM, 0])

    def relative_error(self) -> float:
        """L2 error of the victim's update in the difference, relative to that update."""
        true, found = self.sent()[self.delta], self.found()[self.delta]
        return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def fleet_without_proofs(app_fleet_of: FleetOf, devices: int = DEVICES, **settings: Any) -> Any:
    """Devices that demand no proofs about the log: nothing but the checks under test stops the coordinator."""
    fleet = app_fleet_of(devices, **settings)
    for state_dir in (fleet.out / "devices").iterdir():
        with (state_dir / "device.toml").open("a") as file:
            file.write("demand_proofs = false\n")
    return fleet


def any_set(
    known: AdapterState, plan: Plan, spec: SessionSpec, survivors: Mapping[str, int], revoked: Container[int]
) -> AdapterState:
    return replace(known, sums=known.sums + 1, survivors=survivors)
