"""The coordinator's side of the protocol: one frozen type a state, whose methods are the legal steps.

    open_session → Offering → Sharing → Established → Collecting → Confirming → Unmasking → Established …
                                                      Collecting ─────────────→ Unmasking     (honest-but-curious)

``on_…`` takes one device's answer and returns the next state; a bad answer raises ``ProtocolError`` with the
peer's name, leaves the state as it was, and whoever drives the round counts that peer as lost. ``close`` ends a
step with whoever answered: time is the caller's. Where too few are left it returns ``RoundAborted``, with the
session for the next round. A round ends with the sum of its survivors or without one, never with another sum.
"""

from aggregation.serverside.collecting import Collecting
from aggregation.serverside.confirming import Confirming
from aggregation.serverside.established import Established
from aggregation.serverside.joining import Offering, Sharing, open_session
from aggregation.serverside.outcomes import AbortReason, RoundAborted, RoundResult
from aggregation.serverside.unmasking import Unmasking

__all__ = [
    "AbortReason",
    "Collecting",
    "Confirming",
    "Established",
    "Offering",
    "RoundAborted",
    "RoundResult",
    "Sharing",
    "Unmasking",
    "open_session",
]
