"""What stays the same from the survivor set to the sum: steps 7 and 8 at the coordinator."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from aggregation import envelope
from aggregation.envelope import M
from aggregation.messages import Plan, Survivors, Unmask
from aggregation.ring import Ring
from aggregation.serverside.outcomes import AbortReason, RoundAborted
from aggregation.session import Session

if TYPE_CHECKING:
    from aggregation.serverside.established import Established


@dataclass(frozen=True, slots=True)
class Settled:
    """Who survived, with the digest of that message, and the sum of what they sent, still masked."""

    established: "Established"
    plan: Plan
    survivors: Survivors
    digest: bytes
    total: Ring = field(repr=False, compare=False)

    @property
    def session(self) -> Session:
        """The public side."""
        return self.established.session

    @property
    def counted(self) -> tuple[str, ...]:
        """The survivors, in ascending order."""
        return tuple(sorted(self.survivors.vectors))

    @property
    def dropped(self) -> tuple[str, ...]:
        """Who is in the plan and is no survivor."""
        return tuple(device for device in self.plan.members if device not in self.survivors.vectors)

    def hear(self, kind: type[M], peer: str, body: bytes) -> M:
        """Open a message of a survivor's."""
        return envelope.open_as(kind, body, self.session.peers[peer].identity, peer)

    def unmask(self, signatures: Mapping[str, bytes]) -> bytes:
        """The request to open the sum, with the agreements in it."""
        return envelope.seal(self.established.key, Unmask(self.survivors, signatures))

    def aborted(
        self, reason: AbortReason, detail: str, blamed: Collection[str] = (), left_out: Collection[str] = ()
    ) -> RoundAborted:
        """The end of this round without a sum. ``left_out``: who is in no further round of the session."""
        after = replace(self.established, left_out=self.established.left_out.union(left_out))
        return RoundAborted(reason, detail, after, tuple(sorted(blamed)))
