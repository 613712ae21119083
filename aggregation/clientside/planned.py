"""Step 6 on the device: it masks what it trained."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aggregation import envelope, masks, ring
from aggregation.boxes import Pair, Secrets
from aggregation.clientside.device import Device
from aggregation.clientside.masked import Masked
from aggregation.masks import Mask
from aggregation.messages import MaskedInput, Plan
from aggregation.once import Once
from aggregation.ring import Ring
from aggregation.spec import SessionSpec

if TYPE_CHECKING:
    from aggregation.clientside.ready import Ready


@dataclass(frozen=True, slots=True)
class Planned:
    """A round has begun; the trained vector is next. Sealing this state gives up the round: see ``sealed``."""

    ready: "Ready"
    plan: Plan
    secrets: Secrets = field(repr=False)
    held: Mapping[str, Pair] = field(repr=False)
    once: Once = field(default_factory=Once, repr=False, compare=False)

    @property
    def spec(self) -> SessionSpec:
        """The session's parameters."""
        return self.ready.session.spec

    def on_plan(self, device: Device, plan: bytes) -> "Planned":
        """Give up this round for a later one."""
        return self.ready.on_plan(device, plan)

    def contribute(self, device: Device, ring_vector: Ring, threads: int = 1) -> tuple[Masked, bytes]:
        """Mask and sign the vector: step 6. This device's own secrets of the round end here.

        Args:
            device: This device.
            ring_vector: What ``spec.vector.encode`` gave. It is masked in place, so that the plain vector does
                not outlive this call: copy it first if it is still needed.
            threads: Those of ``masks.apply``.

        Raises:
            DataError: The vector has another size or type.
        """
        bits, context, plan = self.spec.vector.ring_bits, self.ready.session.context, self.plan.digest()
        ring.require(ring_vector, self.spec.vector.size, bits)
        self.once.take("masked input")
        masks.apply(ring_vector, [*self._pair_masks(plan), self._self_mask(context, plan)], threads)
        packed = ring.packed(ring_vector, bits)
        header = MaskedInput(plan, self.ready.me, hashlib.sha256(packed).digest())
        masked = Masked(self.ready, self.plan, self.held, header.vector)
        return masked, envelope.seal_vector(device.identity, header, packed)

    def _self_mask(self, context: bytes, plan: bytes) -> Mask:
        return Mask(masks.self_key(self.secrets.seed, context, plan, self.ready.me), add=True)

    def _pair_masks(self, plan: bytes) -> list[Mask]:
        """One for each neighbour in the round: added by the smaller id, subtracted by the larger."""
        session, me = self.ready.session, self.ready.me
        publics = session.mask_keys(session.neighbours(me, self.plan.members), self.plan.round)
        return masks.pair_masks(self.secrets.mask_key, me, publics, session.context, plan)
