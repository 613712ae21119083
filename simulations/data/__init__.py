"""Populations: the examples of the simulated devices."""
