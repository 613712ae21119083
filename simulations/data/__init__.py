"""Populations: whose examples the simulated devices hold."""
