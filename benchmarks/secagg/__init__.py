"""Secure aggregation compared with Flower's SecAgg+, in the same run.

Nothing is exported here, so that a command's ``--help`` does not import Flower.
"""
