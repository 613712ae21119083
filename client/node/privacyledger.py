"""What the sums to which a device contributed may have revealed of it, and the owner's limit on that.

The device counts for itself, from the offers that it accepted, with as many corrupt devices as its policy assumes. A
contribution counts before it leaves, as part of the smallest sum that the session allows: others can unmask the sum
without this device. Once the device reveals its shares it knows the survivors, and their number replaces the smallest.
A contribution to a round that it did not see the end of counts in full, whether or not its sum was unmasked.

The ledger is kept when the device forgets a coordinator: what was revealed stays revealed. The file is encrypted."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from aggregation import graph, sealed, wire
from aggregation.messages import Uint32
from aggregation.policy import Policy
from aggregation.privacy.accounting import NOTHING, ORDERS, Spent
from aggregation.session import refused
from aggregation.spec import SessionSpec
from aggregation.wire import Codec

_SPENT: Codec[Spent] = wire.record(Spent, {"curve": wire.sequence(wire.real, len(ORDERS)), "draws": wire.uint(128)})


@dataclass(frozen=True, slots=True)
class PrivacyLedger(sealed.SealedRecord):
    """The account of one device. ``settled`` counts sums whose survivors it knows, and rounds that it did not see the
    end of."""

    MAGIC: ClassVar[bytes] = b"edgeadapt/privacy-ledger/1\x00"

    settled: Annotated[Spent, _SPENT] = NOTHING
    pending: Annotated[Spent, _SPENT] = NOTHING  # the contribution that left last, if neither is known of it yet
    noisy: Uint32 = 0  # contributions with noise
    bare: Uint32 = 0  # contributions without noise, which nothing bounds; they are in no other number

    @property
    def spent(self) -> Spent:
        return self.settled + self.pending


def on_plan(known: PrivacyLedger, spec: SessionSpec, cohort: int, policy: Policy) -> PrivacyLedger:
    """Make the ledger to save before the contribution to a round leaves. Raises ProtocolError: it would exceed the
    policy's ``maximum_epsilon``."""
    settled = known.spent
    if spec.privacy is None:
        return replace(known, settled=settled, pending=NOTHING, bare=known.bare + 1)
    cost = spec.spent(spec.minimum_survivors, graph.count_of(cohort, policy.corrupt_fraction))
    after, limit = (settled + cost).epsilon(policy.delta), policy.maximum_epsilon
    if limit and after > limit:
        text = f"plan refused: it would take the privacy that this device spends to an epsilon of {after:.2f}, above "
        text += f"its policy's maximum_epsilon of {limit:g} for delta {policy.delta:g}"
        raise refused(text, "plan.epsilon")
    return replace(known, settled=settled, pending=cost, noisy=known.noisy + 1)


def on_survivors(known: PrivacyLedger, spec: SessionSpec, cohort: int, survivors: int, policy: Policy) -> PrivacyLedger:
    """Make the ledger to save before the device reveals shares for a sum over this number of ``survivors``."""
    if spec.privacy is None:
        return known
    exact = spec.spent(survivors, graph.count_of(cohort, policy.corrupt_fraction))
    return replace(known, settled=known.settled + exact, pending=NOTHING)
