"""What a device demands of the log before it takes part again: what it did and how it ended is in it, and it only grew.

A *receipt* goes beside a plan: the coordinator's newest checkpoint, and proofs that the log which it covers begins with
what the device saw before, holds the device's own messages of its last round, and says how that round ended.
A *passage* goes beside an offer: the receipt of the closed log of the session that the device joined last, and from
there link by link to the new session. So a coordinator cannot take back what a device has seen, a recorded offer leads
nowhere, and nobody can show devices different logs without each of these holding for ever.

A *witness* is what a device keeps of that, from round to round and from session to session.
"""

from aggregation.receipts.proofs import PASSAGE, RECEIPT, Passage, Proof, Receipt, passage, receipts
from aggregation.receipts.witness import WITNESS, Witness, first

__all__ = ["PASSAGE", "RECEIPT", "WITNESS", "Passage", "Proof", "Receipt", "Witness", "first", "passage", "receipts"]
