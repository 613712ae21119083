"""Populations, the in-process grid, scenarios, reports and benchmarks."""
