"""The exchanges of a session, by name: what the coordinator asks, what a device answers (docs/reference/protocol.md).

The names travel as Flower message actions, so they are letters only. ``PLAN`` asks to train; others are queries.
"""

from enum import Enum

RECORD = "edgeadapt"  # the one record in a message
BODY = "body"  # its signed protocol message
ADAPTER = "adapter"  # beside a plan: the adapter's safetensors bytes, whose digest the plan signs
PROOF = "proof"  # beside an offer a passage, beside a plan a receipt (``receipts``)
REVOCATIONS = "revocations"  # beside an offer: the authority's newest revocation list, where there is one
LAST_OFFER = (
    "last-offer"  # beside a certificate: digest of the offer that the device joined last, if it keeps a witness
)


class Step(Enum):
    """Coordinator → device, and the answer."""

    CHECK_IN = "checkin"  # nothing → the device's certificate
    OFFER = "offer"  # offer → advert
    ROSTER = "roster"  # roster → encrypted shares
    PLAN = "plan"  # plan and adapter → masked input
    SURVIVORS = "survivors"  # survivor set → signed consistency statement
    UNMASK = "unmask"  # signatures → shares

    @property
    def message_type(self) -> str:
        """Flower's ``<category>.<action>``."""
        return f"{'train' if self is Step.PLAN else 'query'}.{self.value}"
