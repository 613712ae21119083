"""The commands ``edgeadapt demo``, ``simulate``, ``suite`` and ``data``, which ``edgeadapt.program`` mounts.

This package imports nothing, so that a command starts without the libraries of the others.
"""
