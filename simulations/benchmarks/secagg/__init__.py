"""Secure aggregation against Flower's SecAgg+, in the same run."""
