"""An authority in a folder."""

from tests.support.authority import signer, store

__all__ = ["signer", "store"]
