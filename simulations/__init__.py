"""Simulated federations: populations, the in-process grid, scenarios, reports and benchmarks."""
