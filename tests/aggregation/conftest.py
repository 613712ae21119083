"""The small fleet's fixtures."""

from tests.support.fleet import entropy, fleet_of, spec_of, vector_of

__all__ = ["entropy", "fleet_of", "spec_of", "vector_of"]
