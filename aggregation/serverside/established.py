"""A session between rounds, and step 5: a plan goes out."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from aggregation import envelope, ring
from aggregation.identity import IdentityKey
from aggregation.messages import Assignment, Box, Plan
from aggregation.serverside.collecting import Collecting
from aggregation.serverside.outcomes import AbortReason, RoundAborted, too_few
from aggregation.session import Session


@dataclass(frozen=True, slots=True)
class Established:
    """A session between rounds.

    Args:
        key: The coordinator's.
        session: The public side.
        dealt: Dealer → holder → box.
        last_round: The last round begun.
        delivered: Devices known to have their boxes.
        left_out: Devices whose secrets did not open, and by their own fault: in no further round.
    """

    key: IdentityKey
    session: Session
    dealt: Mapping[str, Mapping[str, Box]]
    last_round: int = 0
    delivered: frozenset[str] = frozenset()
    left_out: frozenset[str] = frozenset()

    @property
    def rounds_left(self) -> int:
        """Rounds that may still begin."""
        return self.session.spec.rounds - self.last_round

    @property
    def devices(self) -> tuple[str, ...]:
        """Who may take part, in ascending order."""
        return tuple(sorted(set(self.dealt) - self.left_out))

    def plan(
        self, *, adapter_version: int, adapter_digest: str, training: bytes, cohort: Collection[str] | None
    ) -> "tuple[Collecting, dict[str, bytes]] | RoundAborted":
        """Begin a round: step 5.

        Args:
            adapter_version: Number of the adapter that training starts from.
            adapter_digest: Its SHA-256, in hex.
            training: Settings for the trainer, opaque here.
            cohort: Who takes part, of ``devices``; everyone where none.

        Returns:
            The next state, and what to send to each member.
        """
        if not self.rounds_left:
            return RoundAborted(AbortReason.SESSION_OVER, "the session has no round left: open a new one", self)
        members = tuple(device for device in self.devices if cohort is None or device in cohort)
        aborted = too_few(self.session.spec, len(members), "members of the plan", self)
        if aborted:
            return aborted
        begun = replace(self, last_round=self.last_round + 1)
        plan = Plan(self.session.context, begun.last_round, members, adapter_version, adapter_digest, training)
        out = {device: self._assignment(plan, device) for device in members}
        vector = self.session.spec.vector
        return Collecting(begun, plan, plan.digest(), ring.zeros(vector.size, vector.ring_bits)), out

    def _assignment(self, plan: Plan, device: str) -> bytes:
        dealers = () if device in self.delivered else self.session.neighbours(device, self.dealt)
        return envelope.seal(self.key, Assignment(plan, {dealer: self.dealt[dealer][device] for dealer in dealers}))
