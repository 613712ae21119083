"""A device between rounds, and step 5: it takes a plan."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from aggregation import boxes, checks
from aggregation.boxes import Pair, Secrets
from aggregation.clientside.device import Device
from aggregation.clientside.planned import Planned
from aggregation.messages import Assignment
from aggregation.once import Once
from aggregation.session import Session


@dataclass(frozen=True, slots=True)
class Ready:
    """Between rounds.

    Args:
        session: The public side.
        me: This device's id.
        last_round: The last round begun; 0 before the first.
        dealers: Those whose boxes arrived, or nothing before they do.
        box_key: For opening boxes; gone once they are open.
        secrets: This device's own, of rounds still to come.
        held: Round → dealer → shares, of rounds still to come.
    """

    session: Session
    me: str
    last_round: int
    dealers: frozenset[str] | None
    box_key: bytes | None = field(repr=False)
    secrets: Mapping[int, Secrets] = field(repr=False)
    held: Mapping[int, Mapping[str, Pair]] = field(repr=False)
    once: Once = field(default_factory=Once, repr=False, compare=False)

    def on_plan(self, device: Device, plan: bytes) -> Planned:
        """Accept the plan of a round: step 5. Skipped rounds can no longer be joined; their secrets are dropped.

        Raises:
            ProtocolError: Not the coordinator's, of another session, of a round begun before, without this
                device, with a member that shared no secrets, or too small.
        """
        message = device.hear(Assignment, plan)
        opened = self if self.box_key is None else self._open(message)
        dealers = opened.dealers or frozenset()
        checks.plan(self.session, self.me, dealers, self.last_round, message.plan)
        self.once.take("plan")
        round_ = message.plan.round
        later = Ready(
            self.session,
            self.me,
            round_,
            opened.dealers,
            opened.box_key,
            {number: secret for number, secret in self.secrets.items() if number > round_},
            {number: pairs for number, pairs in opened.held.items() if number > round_},
        )
        return Planned(later, message.plan, self.secrets[round_], opened.held[round_])

    def _open(self, message: Assignment) -> "Ready":
        checks.boxes(self.session, self.me, message.boxes)
        held = {round_: dict(pairs) for round_, pairs in self.held.items()}
        for dealer, box in message.boxes.items():
            pairs = boxes.open_box(self.session, self.box_key or b"", dealer, self.me, box)
            for round_, pair in (pairs or {}).items():
                held[round_][dealer] = pair
        dealers = frozenset(message.boxes)
        return Ready(self.session, self.me, self.last_round, dealers, None, self.secrets, held)
