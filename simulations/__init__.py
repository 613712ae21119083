"""Simulated federations: populations, the in-process grid, scenarios and reports."""
