"""The registry: signed, content-addressed versions of the global adapter, and a record of every round. It needs
SQLAlchemy and fsspec. An auditor reads the same files without them (``edgeadapt.auditing``)."""

from coordinator.registry.lease import Leadership, Lease, leadership
from coordinator.registry.transcripttable import TranscriptTable
from coordinator.registry.versions import Head, Registry, StoredAdapter, Version, state_digest
from edgeadapt.formats.blobs import Blobs

__all__ = [
    "Blobs",
    "Head",
    "Leadership",
    "Lease",
    "Registry",
    "StoredAdapter",
    "TranscriptTable",
    "Version",
    "leadership",
    "state_digest",
]
