"""The exchanges of a session: what the coordinator asks, what a device answers, and the fields of a transport record.
``docs/reference/protocol.md`` describes them. The step names travel as Flower message actions, so they are letters
only."""

from enum import Enum

RECORD = "edgeadapt"  # the one record in a Flower message
BODY = "body"  # the signed protocol message
ADAPTER = "adapter"  # with a plan: the safetensors bytes of the adapter, whose digest the plan signs
PROOF = "proof"  # with an offer: a session chain proof; with a plan: a receipt (``transcript.logstate``)
CONSENT = "consent"  # with a challenge: what the session sums that needs the owner's consent, if anything
REVOCATIONS = "revocations"  # with an offer: the authority's newest revocation list, if there is one


class Step(Enum):
    CHECK_IN = "checkin"  # challenge → the device's certificate, with proof of possession of its key
    OFFER = "offer"  # offer → advert
    ROSTER = "roster"  # roster → encrypted shares
    PLAN = "plan"  # plan and adapter → masked input
    SURVIVORS = "survivors"  # survivor set → consistency signature
    UNMASK = "unmask"  # consistency signatures → shares

    @property
    def message_type(self) -> str:
        """Flower's ``<category>.<action>``: a plan asks to train, every other step is a query."""
        return f"{'train' if self is Step.PLAN else 'query'}.{self.value}"
