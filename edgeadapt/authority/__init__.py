"""The enrolment authority as a person runs it: its folder and its record. It needs the bare install only."""

from edgeadapt.authority.record import AuthorityRecord, CertificateIssued, CertificateRevoked, ListSigned, RecordWriter
from edgeadapt.authority.store import AuthorityStore

__all__ = ["AuthorityRecord", "AuthorityStore", "CertificateIssued", "CertificateRevoked", "ListSigned", "RecordWriter"]
