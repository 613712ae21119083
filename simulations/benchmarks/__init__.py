"""Benchmarks that compare with a named peer in the same process and run."""
