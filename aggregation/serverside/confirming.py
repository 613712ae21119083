"""Step 7 at the coordinator: survivors sign the set that they were shown."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from aggregation import checks, envelope
from aggregation.errors import ProtocolError
from aggregation.messages import Agreement
from aggregation.serverside.outcomes import AbortReason, RoundAborted
from aggregation.serverside.settled import Settled
from aggregation.serverside.unmasking import Unmasking


@dataclass(frozen=True, slots=True)
class Confirming:
    """The survivor set is out; agreements come in."""

    settled: Settled
    agreements: Mapping[str, bytes] = field(default_factory=dict)

    def on_signature(self, peer: str, body: bytes) -> "Confirming":
        """Take one survivor's agreement: step 7.

        Raises:
            ProtocolError: Not its signature on this survivor set, or its second.
        """
        checks.turn(peer, self.settled.survivors.vectors, self.agreements, "agreement")
        message = self.settled.hear(Agreement, peer, body)
        if message != Agreement(self.settled.digest, peer):
            raise ProtocolError("agreement is on another survivor set or of another device", peer)
        return replace(self, agreements={**self.agreements, peer: envelope.signature(body)})

    def close(self) -> "tuple[Unmasking, dict[str, bytes]] | RoundAborted":
        """End step 7. The bytes, a quorum of agreements, go to each that agreed."""
        agreed, quorum = tuple(sorted(self.agreements)), self.settled.session.spec.quorum
        if len(agreed) < quorum:
            detail = f"{len(agreed)} agreements, {quorum} are needed"
            return self.settled.aborted(AbortReason.TOO_FEW, detail)
        body = self.settled.unmask({device: self.agreements[device] for device in agreed[:quorum]})
        return Unmasking(self.settled, agreed), dict.fromkeys(agreed, body)
