"""The in-process grid and the run of a scenario, start to report."""
