"""Steps 7 and 8 on the device: it agrees to the survivors, once, and opens what it holds of them, once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aggregation import checks
from aggregation.boxes import Pair
from aggregation.clientside.device import Device
from aggregation.errors import ProtocolError
from aggregation.messages import Agreement, Opening, Plan, Survivors, Unmask
from aggregation.once import Once
from aggregation.session import COORDINATOR
from aggregation.spec import Adversary

if TYPE_CHECKING:
    from aggregation.clientside.planned import Planned
    from aggregation.clientside.ready import Ready


@dataclass(frozen=True, slots=True)
class Masked:
    """The masked input is out; the survivor set is next. ``vector`` is the digest of what was sent."""

    ready: "Ready"
    plan: Plan
    held: Mapping[str, Pair] = field(repr=False)
    vector: bytes
    once: Once = field(default_factory=Once, repr=False, compare=False)

    def on_plan(self, device: Device, plan: bytes) -> "Planned":
        """Give up this round for a later one."""
        return self.ready.on_plan(device, plan)

    def on_survivors(self, device: Device, survivors: bytes) -> tuple["Confirmed", bytes]:
        """Check the survivor set and sign it, once: step 7. The answer is the agreement.

        Raises:
            ProtocolError: Not the coordinator's for this plan, without this device and its own vector, with
                one who was not in the plan, or too small; or the session runs no consistency round.
        """
        self._demand(Adversary.ACTIVE, "survivor set")
        message = device.hear(Survivors, survivors)
        checks.survivors(self.ready.session, self.plan, self.ready.me, self.vector, message)
        self.once.take("agreement")
        confirmed = Confirmed(self.ready, self.plan, self.held, message)
        return confirmed, device.say(Agreement(message.digest(), self.ready.me))

    def on_unmask(self, device: Device, unmask: bytes) -> tuple["Ready", bytes]:
        """Open the survivor set without a consistency round: step 8, honest-but-curious sessions only.

        Raises:
            ProtocolError: As ``on_survivors``; always in an active session.
        """
        self._demand(Adversary.HONEST_BUT_CURIOUS, "unmask request without an agreement")
        message = device.hear(Unmask, unmask)
        checks.survivors(self.ready.session, self.plan, self.ready.me, self.vector, message.survivors)
        self.once.take("opening")
        return self.ready, _opening(device, self.ready, self.plan, self.held, message.survivors)

    def _demand(self, adversary: Adversary, what: str) -> None:
        if self.ready.session.spec.adversary is not adversary:
            raise ProtocolError(f"{what} is no step of this session", COORDINATOR)


@dataclass(frozen=True, slots=True)
class Confirmed:
    """This device agreed to a survivor set; the agreements of the others are next."""

    ready: "Ready"
    plan: Plan
    held: Mapping[str, Pair] = field(repr=False)
    survivors: Survivors
    once: Once = field(default_factory=Once, repr=False, compare=False)

    def on_plan(self, device: Device, plan: bytes) -> "Planned":
        """Give up this round for a later one."""
        return self.ready.on_plan(device, plan)

    def on_unmask(self, device: Device, unmask: bytes) -> tuple["Ready", bytes]:
        """Open the survivor set that this device agreed to: step 8. What it held of the round ends here.

        Raises:
            ProtocolError: Not the coordinator's, another survivor set, or too few valid agreements on it.
        """
        message = device.hear(Unmask, unmask)
        if message.survivors != self.survivors:
            raise ProtocolError("not the survivor set that this device agreed to", COORDINATOR)
        checks.agreements(self.ready.session, message.survivors, message.agreements)
        self.once.take("opening")
        return self.ready, _opening(device, self.ready, self.plan, self.held, message.survivors)


def _opening(device: Device, ready: "Ready", plan: Plan, held: Mapping[str, Pair], survivors: Survivors) -> bytes:
    """One kind of share a dealer: of the seed of a survivor, of the mask key of one who dropped."""
    alive, dropped = checks.owed(ready.session, plan, ready.me, survivors)
    seeds = {dealer: held[dealer].seed for dealer in alive if dealer in held}
    keys = {dealer: held[dealer].key for dealer in dropped if dealer in held}
    return device.say(Opening(survivors.digest(), ready.me, seeds, keys))
