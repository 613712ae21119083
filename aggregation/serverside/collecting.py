"""Step 6 at the coordinator: masked inputs come in, and are added up as they come."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from aggregation import checks, envelope, ring
from aggregation.errors import ProtocolError
from aggregation.messages import Plan, Survivors
from aggregation.once import Once
from aggregation.ring import Ring
from aggregation.serverside.confirming import Confirming
from aggregation.serverside.outcomes import RoundAborted, too_few
from aggregation.serverside.settled import Settled
from aggregation.serverside.unmasking import Unmasking
from aggregation.spec import Adversary

if TYPE_CHECKING:
    from aggregation.serverside.established import Established


@dataclass(frozen=True, slots=True)
class Collecting:
    """The plan is out; masked inputs come in and are added up as they come, so that none is kept.

    ``total`` is one buffer that moves on with the state: a state that was moved on from refuses further inputs.
    ``digest`` is the plan's.
    """

    established: "Established"
    plan: Plan
    digest: bytes
    total: Ring = field(repr=False, compare=False)
    vectors: Mapping[str, bytes] = field(default_factory=dict)
    once: Once = field(default_factory=Once, repr=False, compare=False)

    def on_masked_input(self, peer: str, body: bytes) -> "Collecting":
        """Take one device's masked vector: step 6.

        Raises:
            ProtocolError: Not its signed vector for this plan, of another size, or its second.
        """
        session = self.established.session
        checks.turn(peer, self.plan.members, self.vectors, "masked input")
        signer = session.peers[peer].identity
        size, bits = session.spec.vector.size, session.spec.vector.ring_bits
        header, packed = envelope.open_vector(body, ring.packed_size(size, bits), signer, peer)
        if (header.plan, header.device) != (self.digest, peer):
            raise ProtocolError("masked input is for another plan or of another device", peer)
        try:
            self.once.require("next state")
            ring.add(self.total, packed, bits)
        except ProtocolError as error:
            raise ProtocolError(str(error), peer) from None
        self.once.take("next state")
        return replace(self, vectors={**self.vectors, peer: header.vector}, once=Once())

    def close(self) -> "tuple[Confirming | Unmasking, dict[str, bytes]] | RoundAborted":
        """End step 6: who answered are the survivors. The bytes go to each of them."""
        aborted = too_few(self.established.session.spec, len(self.vectors), "masked inputs", self.established)
        if aborted:
            return aborted
        self.once.take("end of the step")
        # A masked input proves that its sender has its boxes.
        proven = replace(self.established, delivered=self.established.delivered | set(self.vectors))
        message = Survivors(self.digest, self.vectors)
        settled = Settled(proven, self.plan, message, message.digest(), self.total)
        if proven.session.spec.adversary is Adversary.HONEST_BUT_CURIOUS:
            return Unmasking(settled, settled.counted), dict.fromkeys(settled.counted, settled.unmask({}))
        return Confirming(settled), dict.fromkeys(settled.counted, envelope.seal(proven.key, message))
