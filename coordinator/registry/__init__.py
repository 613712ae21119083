"""The registry: signed, content-addressed versions of the global adapter, and a record of every round.

Needs SQLAlchemy and fsspec. An auditor reads the same files without them (``coordinator.audit``).
"""

from coordinator.registry.blobs import Blobs
from coordinator.registry.roundrecord import RoundRecord
from coordinator.registry.versions import Registry, StoredAdapter, Version

__all__ = ["Blobs", "Registry", "RoundRecord", "StoredAdapter", "Version"]
