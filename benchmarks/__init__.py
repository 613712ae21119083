"""Benchmarks that run this project and a named peer on the same work, in the same run.

Nothing is exported here: each imports its own frameworks only.
"""
