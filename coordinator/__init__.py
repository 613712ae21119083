"""The fleet: cohorts, rounds, server optimizer, registry."""
